"""Pictures for the reports: of slides, and of fields of view at full resolution.

What is drawn is read here; how it is drawn is in medray.evaluation.overlay.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from medray.classes import Classes
from medray.errors import MedrayError
from medray.evaluation.count import FIELD_PX, FieldOfView
from medray.evaluation.ground_truth import read_known, read_truth
from medray.evaluation.overlay import draw_change, draw_overlay
from medray.execution import map_rows
from medray.geometry import Rectangle
from medray.inference import mask_uri
from medray.slides import open_row, read_thumbnail, read_working, working_of
from medray.storage import ome_zarr
from medray.types import Executor, Row, UInt8

log = logging.getLogger(__name__)

_OVERLAY_PX = 600


def draw_slides(
    rows: Sequence[Row], run: str, classes: Classes, executor: Executor
) -> dict[str, bytes]:
    """Draw slides with truth and prediction, by slide.

    One that cannot be drawn is left out, with a warning.
    """
    jobs = {row["slide"]: (row, run, classes) for row in rows}
    return _draw(_slide, jobs, executor)


def draw_fields(
    fields: Sequence[FieldOfView],
    rows: Sequence[Row],
    run: str,
    classes: Classes,
    executor: Executor,
) -> list[tuple[str, bytes]]:
    """Draw fields of view with truth and prediction, with their captions.

    Slides that are no larger than a field are shown whole already.
    """
    row_of = {
        row["slide"]: row for row in rows if max(row["height"], row["width"]) > FIELD_PX
    }
    jobs = {
        field: (row_of[field.slide], field, run, classes)
        for field in fields
        if field.slide in row_of
    }
    return [
        (f"{field.slide}, pixels from {field.x} across and {field.y} down", picture)
        for field, picture in _draw(_field, jobs, executor).items()
    ]


def draw_runs(
    row: Row, runs: tuple[str, str], truth: str | None, classes: Classes
) -> bytes:
    """Draw a slide with the masks of two runs; with a truth, how both agree with it."""
    rgb, (before, after), level = _read_coarse(row, runs)
    if truth is None:
        return draw_overlay(rgb, before, after, classes, ("A", "B", "what differs"))
    whole = Rectangle(0, 0, *before.shape)
    true, (before, after) = _with_truth(row, whole, classes, 2**level, before, after)
    return draw_change(rgb, true, before, after)


def _draw(
    function: Callable[..., bytes],
    jobs: Mapping[Any, tuple[Any, ...]],
    executor: Executor,
) -> dict[Any, bytes]:
    """Draw pictures; one that fails is left out, with a warning."""
    pictures = {}
    call = functools.partial(_call, function)
    for (name, _), result in map_rows(call, jobs.items(), executor=executor):
        if isinstance(result, Exception):
            log.warning("no picture of %s: %s", name, result)
        else:
            pictures[name] = result
    return {name: pictures[name] for name in jobs if name in pictures}


def _call(function: Callable[..., bytes], job: tuple[Any, tuple[Any, ...]]) -> bytes:
    try:
        return function(*job[1])
    except Exception as error:  # whatever it is, it costs this picture
        raise MedrayError(f"{error}") from error


def _slide(row: Row, run: str, classes: Classes) -> bytes:
    """Draw a slide with truth and prediction at a coarse level."""
    rgb, (predicted,), level = _read_coarse(row, (run,))
    whole = Rectangle(0, 0, *predicted.shape)
    truth, (predicted,) = _with_truth(row, whole, classes, 2**level, predicted)
    return draw_overlay(rgb, truth, predicted, classes)


def _field(row: Row, field: FieldOfView, run: str, classes: Classes) -> bytes:
    """Draw a field of view with truth and prediction, at the mask's resolution."""
    height = min(FIELD_PX, row["height"] - field.y)
    width = min(FIELD_PX, row["width"] - field.x)
    part = Rectangle(field.y, field.x, height, width)
    predicted = ome_zarr.open_level(mask_uri(run, row["slide"]))[part.slices()]
    truth, (predicted,) = _with_truth(row, part, classes, 1, predicted)
    with open_row(row) as slide:
        rgb, _, _ = read_working(slide, working_of(row), part.y, part.x, height, width)
    return draw_overlay(rgb, truth, predicted, classes)


def _read_coarse(row: Row, runs: Sequence[str]) -> tuple[UInt8, list[UInt8], int]:
    """Read a slide and its masks at the first level that fits a picture.

    Returns:
        (h, w, 3) uint8 RGB; (h, w) label values of each run; and the masks' level.
    """
    shapes = ome_zarr.level_shapes(row["height"], row["width"])
    level = next(k for k, shape in enumerate(shapes) if max(shape) <= 2 * _OVERLAY_PX)
    masks = [
        np.asarray(ome_zarr.open_level(mask_uri(run, row["slide"]), level)[:])
        for run in runs
    ]
    height, width = masks[0].shape
    with open_row(row) as slide:
        thumbnail, _, _ = read_thumbnail(slide, 2 * _OVERLAY_PX)
    picture = Image.fromarray(thumbnail).resize((width, height), Image.Resampling.BOX)
    return np.asarray(picture), masks, level


def _with_truth(
    row: Row, part: Rectangle, classes: Classes, downsample: int, *masks: UInt8
) -> tuple[UInt8, list[UInt8]]:
    """Read the truth of a part, and put it into masks where nothing is annotated."""
    truth = read_truth(row, part, classes, downsample)
    known = read_known(row, part, classes, downsample)
    if known is None:
        return truth, [*masks]
    return truth, [np.where(known, mask, truth) for mask in masks]
