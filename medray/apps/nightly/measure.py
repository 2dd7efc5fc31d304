"""Scanner, staining and class shares of slides, and whether they drift."""

from __future__ import annotations

import logging

import ray

from medray.apps.nightly.catalog import Catalog, Outcome, values_of
from medray.apps.nightly.drift import (
    NIGHTS,
    Drift,
    SlideValues,
    class_shares,
    stain_values,
)
from medray.apps.nightly.drift import watch as watch_drift
from medray.apps.nightly.inbox import Watch
from medray.datasets import slide_uri
from medray.errors import MedrayError
from medray.execution import cluster
from medray.slides import UNKNOWN, scanner_of, slide_digest
from medray.storage import files
from medray.types import Row

log = logging.getLogger(__name__)

_TIMEOUT_S = 300.0  # for reading a thumbnail


def measure_slides(
    slides: list[Row], scene: int | None = None, plane: int | None = None
) -> dict[str, tuple[str, dict[str, float]]]:
    """Return scanner and staining of slides, read in Ray tasks."""
    if not slides:
        return {}
    cluster.connect()
    measure = ray.remote(num_cpus=1, max_retries=1)(_measure_slide)
    pending = {s["slide"]: measure.remote(s["uri"], scene, plane) for s in slides}
    measured = {}
    for slide, reference in pending.items():
        try:
            measured[slide] = ray.get(reference, timeout=_TIMEOUT_S)
        except ray.exceptions.RayError as error:
            log.warning("%s: its staining cannot be measured (%s)", slide, error)
            ray.cancel(reference, force=True)
            measured[slide] = (UNKNOWN, {})
    return measured


def _measure_slide(
    uri: str, scene: int | None, plane: int | None
) -> tuple[str, dict[str, float]]:
    try:
        return scanner_of(uri), stain_values(uri, scene, plane)
    except (MedrayError, OSError) as error:
        log.warning("%s: its staining cannot be measured (%s)", uri, error)
        return UNKNOWN, {}


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
    slides = [
        {"slide": row["slide"], "uri": slide_uri(watch.reference, row["slide"])}
        for row in files.read_table(table).to_pylist()
        if row["status"] == "done" and row["split"] == "train"
    ]
    shares = class_shares(watch.reference)
    values = {
        slide: values | shares.get(slide, {})
        for slide, (_, values) in measure_slides(slides).items()
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
        SlideValues(name, outcome.scanner, dict(outcome.values))
        for name, outcome in outcomes.items()
        if not outcome.reason
    ]
    last = [
        SlideValues(row["names"][0], row["scanner"], values_of(row))
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
