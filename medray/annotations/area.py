"""Annotated areas: polygons with a class, made of the rings that files hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import MultiPolygon, Polygon, box

from medray.errors import SlideError

Ring = npt.NDArray[np.float64]  # (n, 2) of x, y in level-0 pixels
FillRule = Literal["nonzero", "evenodd"]


@dataclass(frozen=True)
class Area:
    """An annotated area.

    Attributes:
        polygon: Valid; (x, y) in level-0 pixels, pixel (0, 0) covers [0, 1) x [0, 1).
        class_name: None when the file does not say.
    """

    polygon: Polygon | MultiPolygon
    class_name: str | None


@dataclass(frozen=True)
class Outline:
    """A drawn outline before outlines are combined to areas.

    Attributes:
        polygon: What it encloses.
        class_name: None when the file does not say.
        hole: It is marked as a hole in others of its class.
    """

    polygon: Any
    class_name: str | None
    hole: bool = False


def fill(rings: Iterable[Ring], rule: FillRule = "nonzero") -> Any:
    """Give the area that rings enclose; they may cross themselves and each other.

    The plane is cut into faces along all rings; a face belongs to the area by the
    rings' winding number around it (SVG 2, section 13.4.2, fill-rule).

    Returns:
        A valid shapely geometry of polygons; empty if the rings enclose nothing.
    """
    kept = [ring for ring in map(_closed, rings) if len(ring) >= 4]
    if len(kept) == 1:
        polygon = Polygon(kept[0])
        if polygon.is_valid:
            return polygon
    if not kept:
        return Polygon()
    lines = shapely.union_all([shapely.LineString(ring) for ring in kept])
    faces = shapely.get_parts(shapely.polygonize([*shapely.get_parts(lines)]))
    inside = []
    for face in faces:
        point = shapely.point_on_surface(face)
        winding = sum(_winding(ring, point.x, point.y) for ring in kept)
        if winding % 2 if rule == "evenodd" else winding:
            inside.append(face)
    return areal(shapely.union_all(inside))


def _closed(ring: Ring) -> Ring:
    ring = np.asarray(ring, np.float64).reshape(-1, 2)
    if len(ring) and not np.array_equal(ring[0], ring[-1]):
        ring = np.vstack([ring, ring[:1]])
    return ring


def _winding(ring: Ring, x: float, y: float) -> int:
    """Count how often a closed ring goes round a point (Sunday 2001)."""
    x0, y0 = ring[:-1, 0], ring[:-1, 1]
    x1, y1 = ring[1:, 0], ring[1:, 1]
    side = (x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)
    up = (y0 <= y) & (y1 > y) & (side > 0)
    down = (y0 > y) & (y1 <= y) & (side < 0)
    return int(up.sum() - down.sum())


def areal(geometry: Any) -> Any:
    """Keep the polygons of a geometry; points and lines have no area."""
    if geometry.geom_type in ("Polygon", "MultiPolygon"):
        return geometry
    parts = [p for p in shapely.get_parts(geometry) if p.geom_type == "Polygon"]
    return shapely.union_all(parts) if parts else Polygon()


def combine(outlines: Sequence[Outline]) -> list[Area]:
    """Turn outlines into areas, class by class.

    Overlapping outlines of a class are united; one that lies wholly inside another is
    a hole in it, one inside the hole is filled again; one marked as a hole always is.
    """
    classes = dict.fromkeys(outline.class_name for outline in outlines)
    areas = []
    for name in classes:
        chosen = [o for o in outlines if o.class_name == name and o.polygon.area > 0]
        chosen.sort(key=lambda outline: -outline.polygon.area)
        polygons = [outline.polygon for outline in chosen]
        tree = shapely.STRtree(polygons)
        filled: Any = Polygon()
        pending: list[Any] = []
        for outline in chosen:
            around = tree.query(outline.polygon, predicate="within")
            bigger = [i for i in around if polygons[i].area > outline.polygon.area]
            depth = sum(-1 if chosen[i].hole else 1 for i in bigger)
            if outline.hole or depth % 2:
                filled = shapely.union_all([filled, *pending])
                filled, pending = filled.difference(outline.polygon), []
            else:
                pending.append(outline.polygon)
        filled = areal(shapely.union_all([filled, *pending]))
        if not filled.is_empty:
            areas.append(Area(filled, name))
    return areas


def clip_to_slide(
    uri: str, areas: Sequence[Area], height: int, width: int
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
        found = ", ".join(f"{value:.0f}" for value in bounds)
        raise SlideError(
            f"{uri}: all areas lie outside the slide of {width} x {height} pixels "
            f"(x0, y0, x1, y1 = {found}); is it the annotation of another slide?"
        )
    return kept
