"""GeoJSON as QuPath writes and reads it: level-0 pixels, origin top-left."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import shapely

from medray.annotations.area import Area, Ring, areal, fill
from medray.classes import Classes
from medray.errors import SlideError


def parse_geojson(uri: str, data: bytes) -> list[Area]:
    """Read the polygons of a feature, a list of features or a FeatureCollection.

    Points and lines are passed over. The class is `classification.name`.

    Raises:
        SlideError: It is no GeoJSON, or a coordinate is not a finite number.
    """
    document = json.loads(data)
    areas = []
    for feature in _features(uri, document):
        properties = feature.get("properties") or {}
        stated = properties.get("classification")
        name = stated.get("name") if isinstance(stated, dict) else stated
        geometry = feature.get("geometry") or {}
        parts = [_polygon(rings) for rings in _polygons(geometry)]
        polygon = parts[0] if len(parts) == 1 else areal(shapely.union_all(parts))
        if not polygon.is_empty:
            areas.append(Area(polygon, str(name) if name else None))
    return areas


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


def _polygons(geometry: Any) -> Iterator[Any]:
    kind = geometry.get("type")
    if kind == "Polygon":
        yield geometry["coordinates"]
    elif kind == "MultiPolygon":
        yield from geometry["coordinates"]
    elif kind == "GeometryCollection":
        for part in geometry["geometries"]:
            yield from _polygons(part)


def _polygon(rings: Any) -> Any:
    if not rings:
        return shapely.Polygon()
    outer, *holes = (fill([_ring(ring)]) for ring in rings)
    return areal(outer.difference(shapely.union_all(holes))) if holes else outer


def _ring(points: Any) -> Ring:
    # A third coordinate is the height, and says nothing here.
    ring = [(float(x), float(y)) for x, y, *_ in points]
    return np.array(ring, np.float64).reshape(-1, 2)


def geojson_features(areas: Sequence[Area], classes: Classes) -> dict[str, Any]:
    """Give areas as a FeatureCollection of annotations that QuPath imports.

    Ids are made of the areas themselves, so the same areas give the same file.
    """
    features = []
    for index, area in enumerate(areas):
        value = classes.value(area.class_name)
        geometry = json.loads(shapely.to_geojson(area.polygon))
        name = json.dumps([index, value, geometry["coordinates"]])
        features.append(
            {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_OID, name)),
                "geometry": geometry,
                "properties": {
                    "objectType": "annotation",
                    "classification": {
                        "name": classes.names[value],
                        "color": list(bytes.fromhex(classes.colors[value][1:])),
                    },
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def extent_features(
    extent: Sequence[Any], names: Sequence[str], class_name: str
) -> list[dict[str, Any]]:
    """Give where a slide is annotated as locked annotations that QuPath imports.

    Args:
        extent: Polygons in level-0 pixels.
        names: What each is called.
        class_name: QuPath ignores a class whose name ends with `*` in measurements.
    """
    return [
        {
            "type": "Feature",
            "id": str(uuid.uuid5(uuid.NAMESPACE_OID, f"{name} {polygon.wkt}")),
            "geometry": json.loads(shapely.to_geojson(polygon)),
            "properties": {
                "objectType": "annotation",
                "name": name,
                "classification": {"name": class_name, "color": [0, 114, 178]},
                "isLocked": True,
            },
        }
        for polygon, name in zip(extent, names, strict=True)
    ]
