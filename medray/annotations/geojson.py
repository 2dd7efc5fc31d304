"""GeoJSON as QuPath writes and reads it: level-0 pixels, origin top-left.

The origin is that of what QuPath shows: where a slide's canvas is larger than its
scanned part (`medray.slides.bounds`), the corner of that part. What medray writes of
such a slide says so in each feature's `metadata`, which QuPath keeps, so that it is no
guess when it comes back, corrected or not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import shapely
from shapely import affinity

from medray.annotations.polygons import Area, Note, Ring, areal, fill
from medray.errors import SlideError
from medray.geometry import Rectangle

_QUPATH_0_2 = {
    "PathAnnotationObject",
    "PathDetectionObject",
    "PathCellObject",
    "PathTileObject",
    "TMACoreObject",
    "PathRootObject",
}
_COLOURS = {"color", "colorRGB"}
ORIGIN = "medray:origin"
"""Key of a feature's metadata: its coordinates count from the corner of the scanned
part; the value is where on the canvas that is ("x y", level-0 pixels)."""


def parse_geojson(
    uri: str,
    data: bytes,
    note: Note,
    flat: Counter[str],
    bounds: Rectangle | None = None,
) -> list[Area]:
    """Read the polygons of a feature, a list of features or a FeatureCollection.

    The children of a feature, as QuPath's hierarchy has them, follow it. The class is
    `classification`, see `_class_of`.

    Args:
        uri: Named in errors.
        data: The file.
        note: Called with what the user should know.
        flat: Counts the shapes that enclose nothing, such as points and lines.
        bounds: The scanned part of the slide, if it is not all of it. QuPath's
            coordinates, and those of features that state an origin, count from its
            corner.

    Raises:
        SlideError: It is no GeoJSON, a geometry or class is of an unknown form, or a
            coordinate is not a finite number.
    """
    document = json.loads(data)
    areas = []
    planes = set()
    from_qupath = stated_origin = False
    for feature in _all_features(_features(uri, document)):
        properties = feature.get("properties") or {}
        from_qupath |= "objectType" in properties or feature.get("id") in _QUPATH_0_2
        metadata = properties.get("metadata")
        stated_origin |= isinstance(metadata, dict) and ORIGIN in metadata
        class_name = _class_of(properties.get("classification"))
        geometry = feature.get("geometry") or {}
        if stated := geometry.get("plane"):
            planes.add((stated.get("z", 0), stated.get("t", 0)))
        rings_of = [rings for rings in _polygons(geometry, flat) if rings]
        parts = [_polygon(rings) for rings in rings_of]
        polygon = parts[0] if len(parts) == 1 else areal(shapely.union_all(parts))
        if not polygon.is_empty:
            areas.append(Area(polygon, class_name))
        elif parts:
            flat[geometry["type"]] += 1
    if len(planes) > 1:
        note(f"has outlines on {len(planes)} planes (z, t); drawn onto one")
    if bounds is not None and areas:
        where = f"scanned part (openslide.bounds, x {bounds.x}, y {bounds.y})"
        if stated_origin:
            note(
                f"its origin is the corner of the {where}, as it states; moved by that"
            )
        elif not _counts_from(bounds, areas, from_qupath, where, note):
            return areas
        return moved_areas(areas, bounds.x, bounds.y)
    return areas


def _counts_from(
    bounds: Rectangle, areas: list[Area], from_qupath: bool, where: str, note: Note
) -> bool:
    """Return whether areas that state no origin count from that of the scanned part.

    QuPath counts from it, unless it was started to show the whole canvas (`--no-crop`),
    or the file only looks like one of QuPath's. What lies beyond the part that is shown
    cannot be seen, so a file whose areas mostly do was not drawn there. One area that
    reaches over the border decides nothing: it may be a brush that slipped.
    """
    polygons = np.array([area.polygon for area in areas], object)
    _, _, right, bottom = shapely.total_bounds(polygons)
    beyond = bool(right > bounds.width + 1 or bottom > bounds.height + 1)
    if not from_qupath:
        if beyond:
            note(
                f"reaches beyond the {where}, so its origin is the corner of the slide"
            )
        else:
            note(
                f"its origin is in doubt: not written by QuPath, so taken as the "
                f"corner of the slide, not of the {where}"
            )
        return False
    if beyond:
        shown = _area_in(polygons, 0, 0, bounds)
        if shown < shapely.area(polygons).sum() / 2 and shown < _area_in(
            polygons, bounds.x, bounds.y, bounds
        ):
            note(
                f"lies mostly beyond the {where} if counted from there, so its origin "
                f"is the corner of the slide"
            )
            return False
    note(f"its origin is the corner of the {where}, as in QuPath; moved by that")
    return True


def _area_in(polygons: Any, x: int, y: int, size: Rectangle) -> float:
    """Return how much of polygons lies in a rectangle of a size with a corner."""
    inside = shapely.box(x, y, x + size.width, y + size.height)
    return float(shapely.area(shapely.intersection(polygons, inside)).sum())


def moved_areas(areas: Sequence[Area], x: float, y: float) -> list[Area]:
    """Return areas moved by x and y pixels."""
    return [
        Area(affinity.translate(area.polygon, x, y), area.class_name) for area in areas
    ]


def _all_features(features: Sequence[Any]) -> Iterator[Any]:
    """Yield features and, after each, its children, in the order of the document."""
    waiting = list(reversed(features))
    while waiting:
        feature = waiting.pop()
        yield feature
        for holder in (feature.get("properties") or {}, feature):
            children = holder.get("childObjects") or []
            if not all(isinstance(child, dict) for child in children):
                raise SlideError(
                    "expected features as childObjects, found something else; export "
                    "it again as GeoJSON"
                )
            waiting += reversed(children)


def _class_of(stated: Any) -> str | None:
    """Return the class that a classification states, as QuPath shows it.

    It is a name, or an object with a `name`, or with `names` where QuPath derived a
    class from others: `{"names": ["Stroma", "CD3"]}` is the class `Stroma: CD3`.

    Raises:
        SlideError: It is of another form.
    """
    names = [stated]
    if isinstance(stated, dict):
        names = stated["names"] if "names" in stated else [stated.get("name")]
        if not {"name", "names"} & stated.keys() and stated.keys() - _COLOURS:
            names = [0]
    if names in ([], [None], [""]):
        return None
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name for name in names
    ):
        raise SlideError(
            f"expected a classification with a name or a list of names, found "
            f"{json.dumps(stated)[:80]}; name the class of that annotation"
        )
    return ": ".join(names)


def _features(uri: str, document: Any) -> list[Any]:
    if isinstance(document, dict) and document.get("type") == "FeatureCollection":
        document = document["features"]
    elif isinstance(document, dict) and document.get("type") == "Feature":
        document = [document]
    if not isinstance(document, list) or not all(isinstance(f, dict) for f in document):
        kind = document.get("type") if isinstance(document, dict) else document
        raise SlideError(
            f"{uri}: expected a GeoJSON FeatureCollection, Feature or list of "
            f"features, found {str(kind)[:80]!r}; export it again as GeoJSON"
        )
    return document


def _polygons(geometry: Any, flat: Counter[str]) -> Iterator[Any]:
    """Yield the rings of each polygon, and count what has no area in `flat`.

    Raises:
        SlideError: A geometry is none of GeoJSON (RFC 7946), such as a circle.
    """
    kind = geometry.get("type")
    if kind == "Polygon":
        yield geometry["coordinates"]
    elif kind == "MultiPolygon":
        yield from geometry["coordinates"]
    elif kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _polygons(part, flat)
    elif kind in ("Point", "MultiPoint", "LineString", "MultiLineString"):
        flat[kind] += 1
    elif geometry:
        raise SlideError(
            f"expected a geometry of GeoJSON such as Polygon, found "
            f"{str(kind)[:40]!r}; save that shape as a polygon"
        )


def _polygon(rings: Any) -> Any:
    outer, *holes = (fill([_ring(ring)]) for ring in rings)
    return areal(outer.difference(shapely.union_all(holes))) if holes else outer


def _ring(points: Any) -> Ring:
    # A third coordinate is the height, and says nothing here.
    ring = [(float(x), float(y)) for x, y, *_ in points]
    return np.array(ring, np.float64).reshape(-1, 2)
