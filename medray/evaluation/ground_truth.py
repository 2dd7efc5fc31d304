"""The truth of a slide: where it lies, and its labels in any rectangle."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.annotations import (
    Annotation,
    rasterise,
    read_marks,
)
from medray.classes import AnyClass, Classes
from medray.errors import SlideError
from medray.geometry import Rectangle
from medray.slides import slide_fingerprint
from medray.storage import ome_zarr
from medray.types import UInt8

log = logging.getLogger(__name__)


def read_truth(
    row: Mapping[str, Any], region: Rectangle, classes: Classes, factor: int = 1
) -> UInt8:
    """Return the true labels of a region.

    Args:
        row: The slide's row in the run, with its `uri`, and `truth` and `kind`.
        region: Pixels of the mask's level 0, divided by `factor`.
        classes: Names by label value.
        factor: Power of two by which the mask's level 0 is reduced.

    Raises:
        SlideError: The truth is damaged, or of another slide.
    """
    downsample = row["downsample"] * factor
    size = (row["level0_height"], row["level0_width"])
    if row["kind"] == "annotation":
        return rasterise(
            _marks_of(row, size, classes).areas,
            classes,
            y=region.y,
            x=region.x,
            height=region.height,
            width=region.width,
            downsample=downsample,
        )
    full = ome_zarr.open_level(row["truth"])
    if full.shape != size:
        raise SlideError(
            f"{row['truth']}: labels of {full.shape} pixels do not fit the slide of "
            f"{size}"
        )
    return nearest_labels(row["truth"], region, downsample, full.shape)


def read_known(
    row: Mapping[str, Any], region: Rectangle, classes: Classes, factor: int = 1
) -> npt.NDArray[np.bool_] | None:
    """Return where in a region there is a truth; None: everywhere.

    Args and errors are those of `read_truth`.
    """
    if row["kind"] != "annotation":
        return None
    size = (row["level0_height"], row["level0_width"])
    extent = _marks_of(row, size, classes).extent
    if not extent:
        return None
    drawn = rasterise(
        extent,
        AnyClass(),
        y=region.y,
        x=region.x,
        height=region.height,
        width=region.width,
        downsample=row["downsample"] * factor,
    )
    known: npt.NDArray[np.bool_] = drawn > 0
    return known


def truth_note(row: Mapping[str, Any], classes: Classes) -> str:
    """Return what the user should know of a slide's truth; empty if there is nothing.

    Args and errors are those of `read_truth`.
    """
    if row["kind"] != "annotation":
        return ""
    size = (row["level0_height"], row["level0_width"])
    return "; ".join(_marks_of(row, size, classes).notes)


def nearest_labels(
    uri: str,
    region: Rectangle,
    step: float,
    shape: tuple[int, ...],
    coarsest: int = 99,
    opened: Callable[[str, int], ome_zarr.Pixels] = ome_zarr.open_level,
) -> UInt8:
    """Return the nearest pixel of the next finer level, where no level fits.

    Args:
        uri: OME-Zarr of labels, or of any layers of one pixel each.
        region: In pixels that span `step` pixels of level 0, a side.
        step: As said; less than 1 enlarges.
        shape: (height, width) of level 0.
        coarsest: The coarsest level that is filled.
        opened: Opens a level.

    Returns:
        (..., height, width) uint8; beyond the image its last row and column.

    Raises:
        FormatError: What is stored is damaged.
    """
    last = min(coarsest, len(ome_zarr.level_shapes(shape[0], shape[1])) - 1)
    level = int(np.clip(np.floor(np.log2(step) + 0.01), 0, last))
    labels = opened(uri, level)
    rows, columns = (
        np.minimum((np.arange(first, end) + 0.5) * step / 2**level, length - 1)
        for first, end, length in zip(
            (region.y, region.x),
            (region.bottom, region.right),
            labels.shape[-2:],
            strict=True,
        )
    )
    y, x = rows.astype(int), columns.astype(int)
    part = np.asarray(labels[..., y[0] : y[-1] + 1, x[0] : x[-1] + 1])
    found: UInt8 = part[..., (y - y[0])[:, None], x - x[0]]
    return found


def _marks_of(
    row: Mapping[str, Any], size: tuple[int, int], classes: Classes
) -> Annotation:
    """Read a slide's annotation."""
    uri, (height, width) = row["truth"], size
    slide = row.get("uri", "")
    return _marks(uri, slide_fingerprint(uri), slide, height, width, classes)


@functools.lru_cache(maxsize=4)
def _marks(
    uri: str, fingerprint: str, slide: str, height: int, width: int, classes: Classes
) -> Annotation:
    """Keep what was read last; a replaced annotation has another fingerprint."""
    return read_marks(uri, height=height, width=width, classes=classes, slide=slide)
