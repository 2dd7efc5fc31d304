"""Annotated areas: polygons with a class, made of the rings that files hold."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from shapely.geometry import MultiPolygon, Polygon, box

from medray.classes import Classes
from medray.errors import SlideError

Ring = npt.NDArray[np.float64]  # (n, 2) of x, y in level-0 pixels
# A hand crosses its own line some dozen times; noise made into outlines far more often.
_MOST_CROSSINGS, _MOST_WORK = 100_000, 10**9
_PAIRS_AT_ONCE = 4_000_000
FillRule = Literal["nonzero", "evenodd"]
Note = Callable[[str], None]  # takes what the user should know of a file
_WHOLE = 0.98  # share of the slide from which an outline covers all of it
_HIDDEN = 0.95  # share of an area from which another one hides it
_THIN = 0.01  # width of a frame, as a share of the side of a square as large as it


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


def match_class(name: str, classes: Classes) -> str | None:
    """Find a known class, as it is written or else whatever its case."""
    name = name.strip()
    if name in classes.names:
        return name
    known = {known.casefold(): known for known in classes.names}
    return known.get(name.casefold())


def fill(rings: Iterable[Ring], rule: FillRule = "nonzero") -> Any:
    """Give the area that rings enclose; they may cross themselves and each other.

    The plane is cut into faces along all rings; a face belongs to the area by the
    rings' winding number around it (SVG 2, section 13.4.2, fill-rule). So both lobes
    of a bow tie are kept.

    Returns:
        A valid shapely geometry of polygons; empty if the rings enclose nothing.

    Raises:
        SlideError: A coordinate is not a finite number, or the rings cross themselves
            and each other so often that nobody can have drawn them.
    """
    kept = [ring for ring in map(_closed, rings) if len(ring) >= 4]
    if not kept:
        return Polygon()
    if len(kept) == 1:
        polygon = Polygon(kept[0])
        if polygon.is_valid:
            return polygon
    _bound_crossings(kept)
    lines = shapely.union_all([shapely.LineString(ring) for ring in kept])
    faces = shapely.get_parts(shapely.polygonize(shapely.get_parts(lines)))
    # GEOS overflows on its way where coordinates are of 1e-309; its points are right.
    with np.errstate(over="ignore"):
        points = shapely.point_on_surface(faces)
    extents = [box(*ring.min(axis=0), *ring.max(axis=0)) for ring in kept]
    winding = np.zeros(len(faces), np.int64)
    for face, ring in shapely.STRtree(extents).query(points).T:
        winding[face] += _winding(kept[ring], points[face].x, points[face].y)
    inside = winding % 2 if rule == "evenodd" else winding
    return areal(shapely.union_all(faces[inside != 0]))


def _bound_crossings(rings: Sequence[Ring]) -> None:
    """Refuse a tangle: its faces, and the time they take, grow with the square."""
    ends = np.concatenate([np.stack([ring[:-1], ring[1:]], 1) for ring in rings])
    segments = shapely.linestrings(ends)
    tree = shapely.STRtree(segments)
    most = min(_MOST_CROSSINGS, _MOST_WORK // len(segments))
    step = max(1, _PAIRS_AT_ONCE // len(segments))
    crossings = 0
    for first in range(0, len(segments), step):
        part = segments[first : first + step]
        # Each meets itself and both its neighbours, and each pair is found twice.
        met = tree.query(part, predicate="intersects").shape[1]
        crossings += (met - 3 * len(part)) // 2
        if crossings > most:
            raise SlideError(
                f"an outline of {len(segments)} points crosses itself more than {most} "
                f"times; mend or remove it"
            )


def _closed(ring: Ring) -> Ring:
    ring = np.asarray(ring, np.float64).reshape(-1, 2)
    if not np.isfinite(ring).all():
        raise SlideError(
            "a coordinate is not a finite number; mend or remove that outline"
        )
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
    # Twice, for a collection may hold multipolygons.
    parts = shapely.get_parts(shapely.get_parts(geometry))
    polygons = [part for part in parts if part.geom_type == "Polygon"]
    return shapely.union_all(polygons) if polygons else Polygon()


def combine(outlines: Sequence[Outline], note: Note) -> list[Area]:
    """Turn outlines into areas, class by class.

    Overlapping outlines of a class are united; one that lies wholly inside another is
    a hole in it, one inside the hole is filled again; one marked as a hole always is,
    and in every class if it states none. An outline that follows another so closely
    that only a thin frame lies between them is the same outline drawn twice.

    Returns:
        One area for outlines that hang together, in the order of their first outline.
    """
    names = dict.fromkeys(o.class_name for o in outlines if not o.hole)
    found: list[tuple[int, Area]] = []
    twice = 0
    for name in names:
        chosen = [
            i
            for i, o in enumerate(outlines)
            if o.polygon.area > 0
            and (o.class_name == name or (o.hole and o.class_name is None))
        ]
        of_class = [outlines[i] for i in chosen]
        depths, doubled = _depths(of_class)
        twice += doubled
        for members, polygon in _regions(of_class, depths):
            first = min(chosen[i] for i in members)
            found.append((first, Area(polygon, name)))
    found.sort(key=lambda item: item[0])
    if twice:
        note(
            f"{twice} of {len(outlines)} outlines closely follow another one around "
            f"them; taken as the same outline drawn twice, not as holes"
        )
    return [area for _, area in found]


def _regions(
    outlines: Sequence[Outline], depths: npt.NDArray[np.int64]
) -> Iterator[tuple[Sequence[int], Any]]:
    """Give the area of each group of outlines that touch, and their indexes."""
    polygons = np.array([outline.polygon for outline in outlines], object)
    if not len(polygons):
        return
    tree = shapely.STRtree(polygons)
    pairs = tree.query(polygons, predicate="intersects")
    touching = coo_array((np.ones(pairs.shape[1], bool), pairs), (len(polygons),) * 2)
    _, groups = connected_components(touching, directed=False)
    order = np.argsort(groups, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(groups[order])) + 1):
        region: Any = Polygon()
        for depth in np.unique(depths[members]):
            layer = shapely.union_all(polygons[members[depths[members] == depth]])
            region = region.difference(layer) if depth % 2 else region.union(layer)
        region = areal(region)
        if not region.is_empty:
            yield members.tolist(), region


def _depths(outlines: Sequence[Outline]) -> tuple[npt.NDArray[np.int64], int]:
    """Return how deep each outline is nested: even ones are filled, odd ones holes.

    One drawn twice is as deep as the one around it; their number is returned, too.
    """
    polygons = np.array([outline.polygon for outline in outlines], object)
    sizes = shapely.area(polygons)
    inner, outer = shapely.STRtree(polygons).query(polygons, predicate="within")
    nested = sizes[outer] > sizes[inner]
    inner, outer = inner[nested], outer[nested]
    parents = np.full(len(polygons), -1)
    # The smallest outline around each is its parent: it is assigned last.
    descending = np.argsort(-sizes[outer], kind="stable")
    parents[inner[descending]] = outer[descending]
    depths = np.full(len(polygons), -1)
    doubled = 0
    for i in np.argsort(-sizes, kind="stable"):
        parent = parents[i]
        same = (
            parent >= 0
            and outlines[parent].hole == outlines[i].hole
            and _is_thin(sizes[parent] - sizes[i], polygons[parent])
        )
        depth = depths[parent] + 1 - same if parent >= 0 else 0
        depths[i] = depth + (depth + 1) % 2 if outlines[i].hole else depth
        doubled += same
    return depths, doubled


def _is_thin(area: float, outer: Any) -> bool:
    """Tell whether what lies along a polygon's outline is no more than a thin frame."""
    return bool(area < _THIN * outer.length * np.sqrt(outer.area))


def covers_slide(polygon: Any, height: int, width: int) -> bool:
    """Tell whether a polygon covers all of a slide, but for a narrow margin."""
    if polygon.area < _WHOLE * height * width:
        return False
    on_slide = polygon.intersection(box(0, 0, width, height))
    return bool(on_slide.area >= _WHOLE * height * width)


def leave_out_unclassed(
    areas: Sequence[Area], classes: Classes, height: int, width: int, note: Note
) -> list[Area]:
    """Return the areas without those that cannot be meant, as their class is missing.

    Beside others an area without a class is left out if it covers the whole slide, or
    if the others have a class of the foreground.

    Args:
        areas: Those of one file, with known classes or none.
        classes: If there is only one of the foreground it is that of areas without.
        height: Level-0 pixels of the slide.
        width: Likewise.
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
    """Tell which pairs' second polygon, a prepared one, hides the first."""
    inner, outer = polygons[pairs[:, 0]], polygons[pairs[:, 1]]
    found: npt.NDArray[np.bool_] = shapely.contains(outer, inner)
    partly = ~found & shapely.intersects(outer, inner)
    shared = shapely.area(shapely.intersection(inner[partly], outer[partly]))
    found[partly] = shared >= _HIDDEN * shapely.area(inner[partly])
    return found


def note_extremes(
    areas: Sequence[Area], classes: Classes, height: int, width: int, note: Note
) -> None:
    """Note areas that cover the whole slide, or that are but a thin frame."""
    marked = [area for area in areas if classes.value(area.class_name)]
    polygons = [area.polygon for area in marked]
    size = height * width
    if sum(polygon.area for polygon in polygons) >= _WHOLE * size:
        covered = shapely.union_all(polygons).area / size
        if covered >= _WHOLE:
            note(f"its areas cover {covered:.0%} of the slide; is that meant?")
    parts = shapely.get_parts(np.array(polygons, object))
    frames = sum(
        _is_thin(part.area, Polygon(part.exterior))
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
