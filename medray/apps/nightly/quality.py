"""Slide quality control of a night: measured and judged before anything is predicted.

NIGHT/quality.parquet has one row per slide of the night's plan. It is written once: a
night that was killed goes on with the verdicts that it began with.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields

import pyarrow as pa

from medray.apps.nightly.catalog import QC
from medray.apps.nightly.drift import stain_distance, staining_of
from medray.apps.nightly.folder import night_folder
from medray.apps.nightly.inbox import Watch
from medray.apps.nightly.measure import training_values
from medray.errors import SlideError
from medray.execution import map_rows, settle_executor
from medray.slides import (
    Quality,
    QualityLimits,
    SlideFile,
    Verdict,
    judge,
    measure_quality,
    open_slide,
)
from medray.storage import files
from medray.types import Row

log = logging.getLogger(__name__)

_TIMEOUT_S = 300.0  # for a thumbnail and some fields
_VALUES = [one.name for one in fields(Quality)]
_COLUMNS = pa.schema(
    [
        ("file", pa.string()),
        ("slide", pa.string()),
        ("digest", pa.string()),
        *((name, pa.float64()) for name in _VALUES),
        ("quarantined", pa.string()),
        ("flagged", pa.string()),
        ("message", pa.string()),
    ]
)


@dataclass(frozen=True)
class Checked:
    """What quality control found of a slide.

    Attributes:
        values: Those that could be measured, by their names in the catalog.
        verdict: What it says of them.
    """

    values: dict[str, float]
    verdict: Verdict


def check_quality(
    watch: Watch, plan: Row, check: Callable[[], None]
) -> dict[str, Checked]:
    """Measure and judge the slides of a night's plan, by slide.

    Args:
        watch: Has the limits; without them nothing is measured.
        plan: Of the night.
        check: Raises if the night may not go on.
    """
    table = files.join(night_folder(watch.out, plan["night"]), "quality.parquet")
    if not files.exists(table):
        if watch.limits is None or not plan["slides"]:
            return {}
        rows = _measure(watch, watch.limits, plan["slides"], check)
        check()
        files.write_table(table, pa.Table.from_pylist(rows, _COLUMNS))
    return {
        row["slide"]: Checked(
            values={
                f"{QC}{name}": row[name] for name in _VALUES if row[name] is not None
            },
            verdict=Verdict(row["quarantined"], row["flagged"]),
        )
        for row in files.read_table(table).to_pylist()
    }


def _measure(
    watch: Watch,
    limits: QualityLimits,
    slides: Sequence[Row],
    check: Callable[[], None],
) -> list[Row]:
    training = training_values(watch)
    by_slide = {row["slide"]: row for row in slides}
    wanted = [
        SlideFile(s["slide"], s["uri"], s["mpp"], s["scene"], s["plane"])
        for s in slides
    ]
    measure = functools.partial(_measure_slide, stained=bool(training))
    rows: dict[str, Row] = {}
    for file, result in map_rows(
        measure,
        wanted,
        executor=settle_executor("auto", [file.uri for file in wanted]),
        timeout=_TIMEOUT_S,
        bounded=True,
        check=check,
    ):
        named = {key: by_slide[file.slide][key] for key in ("file", "slide", "digest")}
        if isinstance(result, Exception):
            # The run says why, if that cannot read it either.
            log.warning("%s: its quality cannot be measured (%s)", file.uri, result)
            rows[file.slide] = named | asdict(Verdict()) | {"message": f"{result}"}
            continue
        quality, staining = result
        values = asdict(quality)
        values["stain_distance"] = stain_distance(staining, training)
        rows[file.slide] = named | values | asdict(judge(values, limits))
    return [rows[file.slide] for file in wanted]


def _measure_slide(
    file: SlideFile, *, stained: bool
) -> tuple[Quality, dict[str, float]]:
    """Return the quality of a slide, and its staining if that is asked for."""
    try:
        with open_slide(file.uri, scene=file.scene, plane=file.plane) as slide:
            quality = measure_quality(slide, file.mpp)
            return quality, staining_of(slide) if stained else {}
    except Exception as error:  # a night is not lost for it
        raise SlideError(f"{error}") from error
