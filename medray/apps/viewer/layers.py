"""Tiles of a slide's mask, probabilities, uncertainty, truth and differences."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from scipy import ndimage

from medray.apps.viewer.tiles import SlideSource
from medray.classes import Classes
from medray.evaluation import nearest_labels, read_known, read_truth
from medray.geometry import Rectangle
from medray.storage import ome_zarr
from medray.types import UInt8

KINDS = ("nothing", "correct", "wrongly marked", "missed", "another class")
"""The meaning of each value of `differences`."""
STRIDES = 5
"""A mask whose coarse levels are yet to be built is shown down to 1 / 2^5."""

_LINE = 2  # half the width of an outline, pixels


def mask_tile(source: SlideSource, region: Rectangle, step: int) -> UInt8:
    """Read the mask: (height, width) uint8 label values.

    Raises:
        MedrayError: The mask is damaged or cannot be read.
    """
    return _layer_tile(source, source.mask, region, step)


def probability_tile(source: SlideSource, region: Rectangle, step: int) -> UInt8:
    """Read the class probabilities: (class, height, width) uint8, 255 is certain.

    Raises:
        MedrayError: They are damaged or cannot be read.
    """
    return _layer_tile(source, source.probabilities, region, step)


def uncertainty_tile(source: SlideSource, region: Rectangle, step: int) -> UInt8:
    """Read the uncertainty: (height, width) uint8, 255 is the most.

    Raises:
        MedrayError: It is damaged or cannot be read.
    """
    return _layer_tile(source, source.uncertainty, region, step)


def _layer_tile(source: SlideSource, uri: str, region: Rectangle, step: int) -> UInt8:
    ratio = step / source.mask_step
    if math.log2(ratio) > source.coarsest + STRIDES:
        shape = (region.height, region.width)  # it would take too much to read
        return np.zeros(shape, np.uint8)
    opened = functools.partial(_level, version=source.version)
    return nearest_labels(
        uri, region, ratio, source.mask_shape, source.coarsest, opened=opened
    )


@functools.lru_cache(maxsize=64)
def _level(uri: str, level: int, version: str) -> ome_zarr.Pixels:
    """Keep levels open: to read their metadata takes longer than to read a tile."""
    return ome_zarr.open_level(uri, level)


def truth_tile(
    source: SlideSource, region: Rectangle, step: int, classes: Classes
) -> UInt8:
    """Draw or read the truth: (height, width) uint8 label values.

    Raises:
        MedrayError: The truth is damaged, or of another slide.
    """
    return read_truth(truth_row(source, step), region, classes)


def truth_row(source: SlideSource, step: float) -> dict[str, Any]:
    """Return what `read_truth` wants to know of a slide."""
    row: dict[str, Any] = {
        "truth": source.truth,
        "kind": source.kind,
        "uri": source.uri,
    }
    row["downsample"] = step
    return row | {"level0_height": source.height, "level0_width": source.width}


def difference_tile(
    source: SlideSource, region: Rectangle, step: int, classes: Classes
) -> UInt8:
    """Compare mask and truth: (height, width) uint8, see `KINDS`.

    Where nothing is annotated there is no difference.

    Raises:
        MedrayError: One of them is damaged, or of another slide.
    """
    row = truth_row(source, step)
    mask, truth = mask_tile(source, region, step), read_truth(row, region, classes)
    kinds, known = differences(mask, truth), read_known(row, region, classes)
    return kinds if known is None else kinds * known


def truth_outlines(
    source: SlideSource, region: Rectangle, step: int, classes: Classes
) -> UInt8:
    """Draw the outlines of the truth: (height, width) uint8, 0 off the lines.

    Raises:
        MedrayError: The truth is damaged, or of another slide.
    """
    # What lies around the tile decides about lines at its border.
    top, left = max(0, region.y - _LINE), max(0, region.x - _LINE)
    bottom = min(region.bottom + _LINE, -(-source.height // step))
    right = min(region.right + _LINE, -(-source.width // step))
    around = Rectangle(top, left, bottom - top, right - left)
    lines = outlines(truth_tile(source, around, step, classes))
    return lines[region.slices(origin=around)]


def outlines(labels: UInt8) -> UInt8:
    """Keep the labels (h, w) only where another one is at most two pixels away."""
    size = 2 * _LINE + 1
    low = ndimage.minimum_filter(labels, size, mode="nearest")
    high = ndimage.maximum_filter(labels, size, mode="nearest")
    return np.where(low != high, labels, 0).astype(np.uint8)


def differences(mask: UInt8, truth: UInt8) -> UInt8:
    """Return where a mask is right and wrong: (h, w) uint8, see `KINDS`."""
    kinds = np.zeros(mask.shape, np.uint8)
    kinds[(mask == truth) & (truth > 0)] = 1
    kinds[(mask > 0) & (truth == 0)] = 2
    kinds[(mask == 0) & (truth > 0)] = 3
    kinds[(mask > 0) & (truth > 0) & (mask != truth)] = 4
    return kinds
