"""How much of a slide areas cover, class by class, at a cost that is known before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from medray.annotations.polygons import Area
from medray.annotations.rasterize import rasterise
from medray.classes import Classes

# Cutting areas off others takes time with the points of those above, once for each
# area below them: in files as people draw them a few times all points at most, where
# hundreds lie on top of each other hundreds of times.
_TIMES, _POINTS = 10, 200_000
_AT_ONCE = 256  # areas whose neighbours are looked up together; bounds the memory
_PIXELS = 1 << 24


def class_areas(areas: Sequence[Area], classes: Classes) -> list[tuple[int, float]]:
    """Return how many areas each class has, and its level-0 pixels as they are drawn.

    What a later area of another class hides does not count, and what areas of one class
    share counts once. Edges are exact, so `rasterise` may differ by pixels along them.

    Where so many areas lie on top of each other that this would take more than some
    seconds, they are drawn and counted, on 16 million pixels at most. Then a pixel
    counts for the area that holds its centre: if all areas lie within 4096 x 4096
    pixels, that is just what `rasterise` gives; if they spread over d times as much a
    side, an area differs by less than d pixels times the length of its outline, mostly
    by far less, and one smaller than d x d pixels may be missed.

    Args:
        areas: In the order of drawing.
        classes: Their classes are among these.

    Returns:
        Areas and pixels of each class, by label value; pixels of the background 0, for
        it is what no area covers, too.
    """
    polygons = np.array([area.polygon for area in areas], object)
    values = np.array([classes.value(area.class_name) for area in areas], np.int64)
    above = _areas_above(polygons, values)
    if above is None:
        pixels = _drawn(areas, classes)
    else:
        shown = polygons.copy()
        for under, over in above.items():
            # One that hides part of these, and is of this class, has that part itself.
            cover = shapely.disjoint_subset_union_all(polygons[over])
            shown[under] = shapely.difference(polygons[under], cover)
        pixels = [
            float(shapely.disjoint_subset_union_all(shown[values == value]).area)
            for value in range(1, len(classes))
        ]
    counts = np.bincount(values, minlength=len(classes)).tolist()
    return list(zip(counts, [0.0, *pixels], strict=True))


def _areas_above(
    polygons: npt.NDArray[Any], values: npt.NDArray[np.int64]
) -> dict[int, list[int]] | None:
    """Return later areas of another class that meet each; None: too many to cut off."""
    points = shapely.get_num_coordinates(polygons)
    left = max(_POINTS, _TIMES * int(points.sum()))
    tree = shapely.STRtree(polygons)
    found: dict[int, list[int]] = {}
    for first in range(0, len(polygons), _AT_ONCE):
        below, above = tree.query(polygons[first : first + _AT_ONCE])
        below += first
        hides = (above > below) & (values[above] != values[below])
        below, above = below[hides], above[hides]
        left -= int(points[above].sum() + points[below].sum())
        if left < 0:
            return None
        meet = shapely.intersects(polygons[below], polygons[above])
        for under, over in zip(below[meet].tolist(), above[meet].tolist(), strict=True):
            found.setdefault(under, []).append(over)
    return found


def _drawn(areas: Sequence[Area], classes: Classes) -> list[float]:
    """Draw areas and count the foreground's pixels by class, in those of level 0."""
    x0, y0, x1, y1 = shapely.total_bounds([area.polygon for area in areas])
    step = max(1.0, math.sqrt((x1 - x0) * (y1 - y0) / _PIXELS))
    y, x = math.floor(y0 / step), math.floor(x0 / step)
    size = {"height": math.ceil(y1 / step) - y, "width": math.ceil(x1 / step) - x}
    labels = rasterise(areas, classes, y=y, x=x, downsample=step, **size)
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    return [float(count) for count in counts[1:] * step**2]
