"""Scanner, staining and class shares of slides, and whether they drift."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from medray.apps.nightly.catalog import Catalog, Outcome, values_of
from medray.apps.nightly.drift import (
    NIGHTS,
    Drift,
    SlideValues,
    class_shares,
    stain_values,
    watched,
)
from medray.apps.nightly.drift import watch as watch_drift
from medray.apps.nightly.inbox import Watch
from medray.datasets import slide_uri
from medray.errors import SlideError
from medray.execution import map_rows, settle_executor
from medray.slides import UNKNOWN, scanner_of, slide_digest
from medray.storage import files

log = logging.getLogger(__name__)

_TIMEOUT_S = 300.0  # for reading a thumbnail


@dataclass(frozen=True)
class Staining:
    """What a slide looks like.

    Attributes:
        scanner: That made it.
        values: Of its staining, by their names; none: they could not be measured.
    """

    scanner: str
    values: dict[str, float]


def measure_slides(
    uris: Mapping[str, str], scene: int | None = None, plane: int | None = None
) -> dict[str, Staining]:
    """Return scanner and staining of slides, whose addresses are given, by slide."""
    measure = functools.partial(_measure_slide, scene=scene, plane=plane)
    measured = {}
    for (slide, uri), result in map_rows(
        measure,
        uris.items(),
        executor=settle_executor("auto", uris.values()),
        timeout=_TIMEOUT_S,
        bounded=True,
    ):
        if isinstance(result, Exception):
            log.warning("%s: its staining cannot be measured (%s)", uri, result)
            result = Staining(UNKNOWN, {})
        measured[slide] = result
    return {slide: measured[slide] for slide in uris}


def _measure_slide(
    slide: tuple[str, str], scene: int | None, plane: int | None
) -> Staining:
    _, uri = slide
    try:
        return Staining(scanner_of(uri), stain_values(uri, scene, plane))
    except Exception as error:  # a night is not lost for it
        raise SlideError(f"{error}") from error


def training_values(watch: Watch) -> list[dict[str, float]]:
    """Return staining and classes of what was trained on; kept in OUT/reference.json.

    Raises:
        ConfigError: The reference is no dataset.
    """
    if watch.reference is None:
        return []
    table = files.join(watch.reference, "slides.parquet")
    kept = files.join(watch.out, "reference.json")
    digest = slide_digest(table)
    if files.exists(kept):
        before = files.read_json(kept)
        if before["slides"] == digest:
            return list(before["values"].values())
    slides = {
        row["slide"]: slide_uri(watch.reference, row["slide"])
        for row in files.read_table(table).to_pylist()
        if row["status"] == "done" and row["split"] == "train"
    }
    shares = class_shares(watch.reference)
    values = {
        slide: staining.values | shares.get(slide, {})
        for slide, staining in measure_slides(slides).items()
    }
    files.write_json(kept, {"slides": digest, "values": values})
    return list(values.values())


def find_drift(
    catalog: Catalog,
    outcomes: dict[str, Outcome],
    training: list[dict[str, float]],
    night: str,
) -> list[Drift]:
    """Compare tonight's slides with the last nights, and with the training slides."""
    before = [
        row
        for row in catalog.values()
        if row["status"] == "done" and row["night"] < night
    ]
    nights = sorted({row["night"] for row in before})[-NIGHTS:]
    tonight = [
        SlideValues(name, outcome.scanner, watched(outcome.values))
        for name, outcome in outcomes.items()
        if not outcome.reason
    ]
    last = [
        SlideValues(row["names"][0], row["scanner"], watched(values_of(row)))
        for row in before
        if row["night"] in nights
    ]
    # A model has seen all its training slides, whatever scanned them.
    trained = [
        SlideValues("", scanner, values)
        for scanner in {slide.scanner for slide in tonight}
        for values in training
    ]
    return watch_drift(tonight, last, against=f"the last {NIGHTS} nights") + (
        watch_drift(tonight, trained, against="the training slides")
    )
