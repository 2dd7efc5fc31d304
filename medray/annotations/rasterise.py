"""Areas to label arrays, region by region."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from rasterio import features
from rasterio.transform import Affine

from medray.annotations.area import Area
from medray.classes import Classes

# Areas are drawn on blocks of one fixed grid, so that rounding, and with it the fate of
# a pixel whose centre lies on an outline, does not depend on the rectangle asked for.
_BLOCK = 2048


def rasterise(
    areas: Sequence[Area],
    classes: Classes,
    *,
    y: int,
    x: int,
    height: int,
    width: int,
    downsample: float = 1.0,
) -> npt.NDArray[np.uint8]:
    """Draw areas into a rectangle; a pixel belongs to the area that holds its centre.

    Args:
        areas: Later ones are drawn over earlier ones.
        classes: Gives the label value of each area's class.
        y: First row, in pixels of the level.
        x: First column.
        height: Rows.
        width: Columns.
        downsample: Level-0 pixels a pixel of the level, a side.

    Returns:
        (height, width) uint8 label values.

    Raises:
        SlideError: An area's class is unknown.
    """
    labels = np.zeros((height, width), np.uint8)
    drawn = [
        (area.polygon, classes.value(area.class_name), area.polygon.bounds)
        for area in areas
    ]
    for top in range(y // _BLOCK * _BLOCK, y + height, _BLOCK):
        for left in range(x // _BLOCK * _BLOCK, x + width, _BLOCK):
            bottom, right = top + _BLOCK, left + _BLOCK
            shapes = [
                (polygon, value)
                for polygon, value, (x0, y0, x1, y1) in drawn
                if x0 < right * downsample
                and x1 > left * downsample
                and y0 < bottom * downsample
                and y1 > top * downsample
            ]
            if not shapes:
                continue
            block = features.rasterize(
                shapes,
                out_shape=(_BLOCK, _BLOCK),
                transform=Affine(
                    downsample, 0, left * downsample, 0, downsample, top * downsample
                ),
                dtype="uint8",
            )
            y0, y1 = max(y, top), min(y + height, bottom)
            x0, x1 = max(x, left), min(x + width, right)
            part = block[y0 - top : y1 - top, x0 - left : x1 - left]
            labels[y0 - y : y1 - y, x0 - x : x1 - x] = part
    return labels
