"""Areas to label arrays, region by region, by GDAL's polygon fill through rasterio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import shapely

from medray.annotations.polygons import Area
from medray.classes import Classes

# Areas are drawn on blocks of one fixed grid, so that rounding, and with it the fate of
# a pixel whose centre lies on an outline, does not depend on the rectangle asked for.
_BLOCK = 1024
# Outlines of more points than this are thinned before they are drawn on a block.
_LONG = 256


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
        downsample: Level-0 pixels per pixel of the level, per side.

    Returns:
        (height, width) uint8 label values.

    Raises:
        SlideError: An area's class is unknown.

    Examples:
        >>> from medray.annotations import rasterise, read_areas
        >>> from medray.classes import Classes
        >>> names = Classes(("background", "tumour"))
        >>> areas = read_areas(
        ...     "annotations/slide_000.svg", height=768, width=640, classes=names
        ... )
        >>> labels = rasterise(areas, names, y=0, x=0, height=768, width=640)
        >>> labels.shape, np.unique(labels).tolist()
        ((768, 640), [0, 1])
    """
    labels = np.zeros((height, width), np.uint8)
    names = [area.class_name for area in areas]
    values = {name: classes.value(name) for name in dict.fromkeys(names)}
    parts, owners = shapely.get_parts(
        np.array([area.polygon for area in areas], object), return_index=True
    )
    filled = ~shapely.is_empty(parts)
    parts, owners = parts[filled], owners[filled]
    rings, ring_parts = shapely.get_rings(parts, return_index=True)
    shells = np.searchsorted(ring_parts, np.arange(len(parts)))
    # Imported here, where it is a process that draws: it brings boto3.
    from rasterio import features
    from rasterio.transform import Affine

    lengths = shapely.get_num_coordinates(rings)
    extents = shapely.bounds(rings).reshape(-1, 4).T / downsample
    for top in range(y // _BLOCK * _BLOCK, y + height, _BLOCK):
        for left in range(x // _BLOCK * _BLOCK, x + width, _BLOCK):
            bottom, right = top + _BLOCK, left + _BLOCK
            y0, y1 = max(y, top), min(y + height, bottom)
            x0, x1 = max(x, left), min(x + width, right)
            x_min, y_min, x_max, y_max = extents
            meets = (x_min < x1) & (x_max > x0) & (y_min < y1) & (y_max > y0)
            # A hole elsewhere changes nothing here, and an area may have thousands.
            chosen = np.flatnonzero(meets & meets[shells][ring_parts])
            if not len(chosen):
                continue
            drawn, indices = np.unique(ring_parts[chosen], return_inverse=True)
            near = rings[chosen]
            # A pixel around the block keeps clear of rounding at its border.
            border = np.array([left - 1, top - 1, right + 1, bottom + 1]) * downsample
            for i in np.flatnonzero(lengths[chosen] > _LONG):
                near[i] = shapely.linearrings(
                    _thin(shapely.get_coordinates(near[i]), border)
                )
            cut = shapely.polygons(near, indices=indices)
            block = features.rasterize(
                [
                    (polygon, values[names[owners[part]]])
                    for polygon, part in zip(cut, drawn, strict=True)
                ],
                out_shape=(_BLOCK, _BLOCK),
                transform=Affine(
                    downsample, 0, left * downsample, 0, downsample, top * downsample
                ),
                dtype="uint8",
            )
            part = block[y0 - top : y1 - top, x0 - left : x1 - left]
            labels[y0 - y : y1 - y, x0 - x : x1 - x] = part
    return labels


def _thin(
    ring: npt.NDArray[np.float64], border: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Leave out points of a ring that change no pixel within a border.

    A run of points on the far side of one of the border's lines becomes one straight
    line there. Rows cross the new line as often as the run, odd or even, and all
    crossings stay on that side, so an even-odd fill by rows (GDAL's) is the same
    inside. The edges that do reach inside keep their ends, and so their rounding.
    Clipping would move those ends. Where an outline runs along a row of pixel centres,
    GDAL decides by the ring's direction, which it takes at the lowest point (the
    rightmost of several): that and its neighbours stay.

    Args:
        ring: (n, 2) x, y, closed.
        border: x and y of the first corner, then of the last, in the ring's units.

    Returns:
        (m, 2) x, y, closed, m <= n.
    """
    candidates = np.flatnonzero(ring[:-1, 1] == ring[:-1, 1].min())
    lowest = candidates[ring[candidates, 0].argmax()]
    around = np.arange(lowest - 1, lowest + 2) % (len(ring) - 1)
    stays = np.zeros(len(ring), bool)
    stays[[0, -1, *around]] = True
    for axis, limit, sign in zip((0, 1, 0, 1), border, (-1, -1, 1, 1), strict=True):
        beyond = sign * ring[:, axis] > sign * limit
        kept = stays.copy()
        kept[1:-1] |= ~(beyond[:-2] & beyond[1:-1] & beyond[2:])
        ring, stays = ring[kept], stays[kept]
    return ring
