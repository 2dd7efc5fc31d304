"""Masks and the truth -> counts of pixels, region by region."""

from __future__ import annotations

import functools
import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.errors import MedrayError
from medray.evaluation.curves import count_levels
from medray.evaluation.ground_truth import read_known, read_truth, truth_note
from medray.evaluation.metrics import Counts, confusion
from medray.evaluation.slide_metrics import SlideReport
from medray.execution import Progress, map_rows
from medray.geometry import Rectangle, plan_regions
from medray.inference import RunSettings, layer_uri, mask_uri, probabilities_uri
from medray.storage import ome_zarr
from medray.types import Executor, Row

FIELD_PX = 1024
"""Side of a field of view, pixels of the mask."""
_FIELDS, _FIELDS_OF_ONE = 4, 2  # that are shown of a kind, and of them of one slide


@dataclass(frozen=True)
class FieldOfView:
    """A square of a mask, `FIELD_PX` per side.

    Attributes:
        amount: What is summed up over its pixels.
        slide: Id.
        y: First row, pixels of the mask.
        x: First column.
    """

    amount: int
    slide: str
    y: int
    x: int


@dataclass(frozen=True)
class CountedRegion:
    """What was counted in a region.

    Attributes:
        counts: (C, C), see medray.evaluation.metrics.
        levels: See `medray.evaluation.curves.count_levels`; None without probabilities.
        note: What to know of the slide's truth; "": nothing.
        fields: Its worst squares, by the heading that they have in the report.
    """

    counts: Counts
    levels: npt.NDArray[np.int64] | None
    note: str
    fields: dict[str, list[FieldOfView]]


@dataclass(frozen=True)
class NotCounted:
    """Why a region could not be counted.

    Attributes:
        message: What is wrong.
    """

    message: str


@dataclass(frozen=True)
class Counted:
    """What the regions add up to.

    Attributes:
        slides: The result of each slide.
        levels: See `medray.evaluation.curves.count_levels`; None without probabilities.
        fields: The worst of them, by the heading that they have in the report.
    """

    slides: list[SlideReport]
    levels: npt.NDArray[np.int64] | None
    fields: dict[str, list[FieldOfView]]


_WRONG, _UNCERTAIN = "Where most is wrong", "Where it is least certain"


def count_slides(
    done: list[Row], run: str, settings: RunSettings, executor: Executor
) -> Counted:
    """Count every region of every slide; a slide that fails becomes a row with why."""
    size = 2 * ome_zarr.REGION
    parts = [
        (row, region)
        for row in done
        for region in plan_regions(row["height"], row["width"], size)
    ]
    classes = len(settings.classes)
    zero = np.zeros((classes, classes), np.int64)
    counts = {row["slide"]: zero.copy() for row in done}
    readings = {row["slide"]: _reading(row) for row in done}
    left = Counter(row["slide"] for row, _ in parts)
    errors: dict[str, str] = {}
    notes: dict[str, str] = {}
    levels: Any = 0
    of_slides: dict[str, Any] = {}  # the levels of those under way
    best: dict[str, dict[str, list[FieldOfView]]] = {}
    with Progress("evaluate", len(done)) as progress:
        count = functools.partial(_count_region, run=run, settings=settings)
        for (row, region), result in map_rows(count, parts, executor=executor):
            slide = row["slide"]
            if isinstance(result, Exception):  # its processes died
                result = NotCounted(f"{result}")
            if isinstance(result, NotCounted):
                errors.setdefault(slide, result.message)
            else:
                counts[slide] += result.counts
                notes[slide] = result.note
                if result.levels is not None:
                    of_slides[slide] = of_slides.get(slide, 0) + result.levels
                for heading, squares in result.fields.items():
                    of_slide = best.setdefault(heading, {}).setdefault(slide, [])
                    of_slide[:] = _largest([*of_slide, *squares], _FIELDS_OF_ONE)
            progress.region(region.height * region.width)
            left[slide] -= 1
            if not left[slide]:
                error = errors.get(slide)
                progress.slide(slide, f"failed: {error}" if error else "done")
                own = of_slides.pop(slide, 0)
                levels += 0 if error else own
    return Counted(
        [
            SlideReport(slide, "failed", errors[slide], None, None)
            if slide in errors
            else SlideReport(
                slide,
                "done",
                notes.get(slide, ""),
                counts[slide],
                None,
                readings[slide],
            )
            for slide in counts
        ],
        levels if np.ndim(levels) else None,
        {
            heading: _largest(
                (one for slide in of.keys() - errors.keys() for one in of[slide]),
                _FIELDS,
            )
            for heading, of in sorted(best.items(), reverse=True)
        },
    )


def _reading(row: Row) -> str:
    """Return, in words, how a slide of a run was read."""
    said = row.get("note") or ""
    if row.get("mpp_x"):
        mpp = f"{row['mpp_x']:.4g} um per pixel ({row['mpp_from']})"
        said = f"{mpp}; {said}" if said else mpp
    return said


def _largest(fields: Iterable[FieldOfView], count: int) -> list[FieldOfView]:
    """Return those of the largest amounts; equal ones by slide, row and column."""
    return heapq.nsmallest(
        count, fields, key=lambda one: (-one.amount, one.slide, one.y, one.x)
    )


def _count_region(
    part: tuple[Row, Rectangle], run: str, settings: RunSettings
) -> CountedRegion | NotCounted:
    """Count the pixels of one region of a slide's row."""
    row, region = part
    slide, classes = row["slide"], settings.classes
    try:
        predicted = ome_zarr.open_level(mask_uri(run, slide))[region.slices()]
        truth = read_truth(row, region, classes)
        known = read_known(row, region, classes)
        if known is None:
            known = np.ones(truth.shape, bool)
        true, found = truth[known], predicted[known]
        counts, levels = confusion(true, found, len(classes)), None
        if settings.options.prediction.probabilities:
            stored = ome_zarr.open_level(probabilities_uri(run, slide))
            shares = stored[(slice(None), *region.slices())][:, known]
            levels = count_levels(true, found, shares)
        wrong = known & (truth != predicted)
        fields = {_WRONG: _fields_in(wrong, slide, region)}
        if "uncertainty" in settings.layers:
            layer = ome_zarr.open_level(layer_uri(run, slide, "uncertainty"))
            unsure = np.where(known, layer[region.slices()], np.uint8(0))
            fields[_UNCERTAIN] = _fields_in(unsure, slide, region)
        return CountedRegion(counts, levels, truth_note(row, classes), fields)
    except (MedrayError, OSError, ValueError, MemoryError) as error:
        return NotCounted(f"{error}" or "out of memory")


def _fields_in(
    values: npt.NDArray[Any], slide: str, region: Rectangle
) -> list[FieldOfView]:
    """Return the squares of a region that have the most."""
    squares = (
        FieldOfView(
            int(values[part.slices()].sum()),
            slide,
            region.y + part.y,
            region.x + part.x,
        )
        for part in plan_regions(region.height, region.width, FIELD_PX)
    )
    return _largest((one for one in squares if one.amount), _FIELDS_OF_ONE)
