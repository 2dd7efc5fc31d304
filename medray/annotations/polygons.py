"""Annotated areas: polygons with a class, made of the rings that files hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import MultiPolygon, Polygon, box

from medray.classes import Classes
from medray.errors import SlideError

Ring = npt.NDArray[np.float64]  # (n, 2) of x, y in level-0 pixels
# A hand crosses its own line some dozen times; noise made into outlines far more often.
_MOST_CROSSINGS, _MOST_WORK = 100_000, 10**9
_PAIRS_AT_ONCE = 4_000_000
FillRule = Literal["nonzero", "evenodd"]
Note = Callable[[str], None]  # takes what the user should know of a file

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
    """Find a known class, as it is written or else ignoring case."""
    name = name.strip()
    if name in classes.names:
        return name
    known = {known.casefold(): known for known in classes.names}
    return known.get(name.casefold())


def fill(rings: Iterable[Ring], rule: FillRule = "nonzero") -> Any:
    """Return the area that rings enclose; they may cross themselves and each other.

    The plane is cut into faces along all rings; a face belongs to the area by the
    rings' winding number around it (SVG 2, section 13.4.2, fill-rule). So both lobes
    of a bow tie are kept.

    Returns:
        A valid shapely geometry of polygons; empty if the rings enclose nothing.

    Raises:
        SlideError: A coordinate is not a finite number, or the rings cross themselves
            and each other too often to have been drawn by hand.
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
    """Raise an error for a tangle: its faces, and their time, grow with the square."""
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
    """Yield the area of each group of outlines that touch, and their indexes."""
    polygons = np.array([outline.polygon for outline in outlines], object)
    if not len(polygons):
        return
    tree = shapely.STRtree(polygons)
    pairs = tree.query(polygons, predicate="intersects")
    # Imported here: they take a fifth of a second.
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

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
            and is_thin(sizes[parent] - sizes[i], polygons[parent])
        )
        depth = depths[parent] + 1 - same if parent >= 0 else 0
        depths[i] = depth + (depth + 1) % 2 if outlines[i].hole else depth
        doubled += same
    return depths, doubled


def is_thin(area: float, outer: Any) -> bool:
    """Return whether an area along a polygon's outline is only a thin frame."""
    return bool(area < _THIN * outer.length * np.sqrt(outer.area))
