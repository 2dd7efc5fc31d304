"""Annotated areas of a slide: which of them count, and in what order they are drawn."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import Polygon, box

from medray.annotations.polygons import Area, Note, areal, is_thin
from medray.classes import Classes
from medray.errors import SlideError

_WHOLE = 0.98  # share of the slide from which an outline covers all of it
_HIDDEN = 0.95  # share of an area from which another one hides it


def covers_slide(polygon: Any, height: int, width: int) -> bool:
    """Return whether a polygon covers all of a slide, but for a narrow margin."""
    if polygon.area < _WHOLE * height * width:
        return False
    on_slide = polygon.intersection(box(0, 0, width, height))
    return bool(on_slide.area >= _WHOLE * height * width)


def leave_out_unclassed(
    areas: Sequence[Area], classes: Classes, height: int, width: int, note: Note
) -> list[Area]:
    """Return the areas but those that cannot be meant, since their class is missing.

    Next to others an area without a class is left out if it covers the whole slide, or
    if the others have a class of the foreground.

    Args:
        areas: Those of one file, with known classes or none.
        classes: If there is only one of the foreground it is that of areas without.
        height: Height of the slide, level-0 pixels.
        width: Width of the slide, level-0 pixels.
        note: Called with what was left out, and whether the class was inferred.
    """
    kept = [
        area
        for area in areas
        if area.class_name is not None or not covers_slide(area.polygon, height, width)
    ]
    if not kept:
        kept = list(areas)
    elif len(kept) < len(areas):
        note(
            f"{len(areas) - len(kept)} outlines without a class cover the whole slide; "
            f"left out"
        )
    named = {area.class_name for area in kept} - {None}
    without = sum(area.class_name is None for area in kept)
    if not without or len(classes) != 2:
        return kept
    if any(name in classes.names[1:] for name in named):
        note(
            f"{without} of {len(kept)} outlines have no class, others have; left out: "
            f"name their class to use them"
        )
        return [area for area in kept if area.class_name is not None]
    note(f"{without} outlines without a class were taken as {classes.names[1]!r}")
    return kept


def draw_nested_last(areas: Sequence[Area], classes: Classes, note: Note) -> list[Area]:
    """Return areas in an order of drawing in which none is hidden by a larger one.

    Files keep the order in which outlines were drawn, servers none at all. An area that
    a later, larger one of another class hides is drawn after it; otherwise the order
    stays.
    """
    polygons = np.array([area.polygon for area in areas], object)
    values = np.array([classes.value(area.class_name) for area in areas])
    sizes = shapely.area(polygons)
    inner, outer = shapely.STRtree(polygons).query(polygons)
    larger = (sizes[outer] > sizes[inner]) & (values[outer] != values[inner])
    pairs = np.stack([inner[larger], outer[larger]], 1)
    shapely.prepare(polygons)
    late = pairs[pairs[:, 0] < pairs[:, 1]]
    late = np.unique(late[_hides(polygons, late), 0])
    if not len(late):
        return list(areas)
    pairs = pairs[_hides(polygons, pairs)]
    after: dict[int, list[int]] = {}
    for inside, around in pairs.tolist():
        after.setdefault(around, []).append(inside)
    waiting = np.bincount(pairs[:, 0], minlength=len(areas))
    ready = np.flatnonzero(waiting == 0).tolist()  # sorted, so a heap
    order: list[int] = []
    while ready:
        order.append(heapq.heappop(ready))
        for i in after.get(order[-1], ()):
            waiting[i] -= 1
            if waiting[i] == 0:
                heapq.heappush(ready, i)
    note(
        f"{len(late)} of {len(areas)} outlines come before a larger one of another "
        f"class that covers them; drawn on top of it"
    )
    return [areas[i] for i in order]


def _hides(
    polygons: npt.NDArray[Any], pairs: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return in which pairs the second polygon, a prepared one, hides the first."""
    inner, outer = polygons[pairs[:, 0]], polygons[pairs[:, 1]]
    found: npt.NDArray[np.bool_] = shapely.contains(outer, inner)
    partly = ~found & shapely.intersects(outer, inner)
    shared = shapely.area(shapely.intersection(inner[partly], outer[partly]))
    found[partly] = shared >= _HIDDEN * shapely.area(inner[partly])
    return found


def note_extremes(
    areas: Sequence[Area], classes: Classes, height: int, width: int, note: Note
) -> None:
    """Report areas that cover the whole slide, or that are only a thin frame."""
    marked = [area for area in areas if classes.value(area.class_name)]
    polygons = [area.polygon for area in marked]
    size = height * width
    if sum(polygon.area for polygon in polygons) >= _WHOLE * size:
        covered = shapely.union_all(polygons).area / size
        if covered >= _WHOLE:
            note(f"its areas cover {covered:.0%} of the slide; is that meant?")
    parts = shapely.get_parts(np.array(polygons, object))
    frames = sum(
        is_thin(part.area, Polygon(part.exterior))
        for part in parts[shapely.get_num_interior_rings(parts) > 0]
    )
    if frames:
        note(
            f"{frames} areas are but a thin frame around a hole; was an outline's "
            f"stroke turned into a path?"
        )


def clip_to_slide(
    uri: str, areas: Sequence[Area], height: int, width: int, note: Note
) -> list[Area]:
    """Cut areas off at the slide's border.

    Raises:
        SlideError: None of them lies on the slide.
    """
    border = box(0, 0, width, height)
    kept = []
    for area in areas:
        polygon = area.polygon
        if not border.contains(polygon):
            polygon = areal(polygon.intersection(border))
        if not polygon.is_empty:
            kept.append(Area(polygon, area.class_name))
    if areas and not kept:
        bounds = shapely.total_bounds([area.polygon for area in areas])
        found = ", ".join(f"{value:.9g}" for value in bounds)
        raise SlideError(
            f"{uri}: all areas lie outside the slide of {width} x {height} pixels "
            f"(x0, y0, x1, y1 = {found}); is it the annotation of another slide?"
        )
    if len(kept) < len(areas):
        note(
            f"{len(areas) - len(kept)} of {len(areas)} areas lie outside the slide of "
            f"{width} x {height} pixels, left out; is it this slide's annotation?"
        )
    return kept
