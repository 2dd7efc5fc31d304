"""GeoJSON as QuPath writes and reads it: level-0 pixels, origin top-left."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import shapely

from medray.annotations.area import Area, Ring, fill
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
        parts = [_polygon(uri, rings) for rings in _polygons(geometry)]
        polygon = shapely.union_all(parts)
        if not polygon.is_empty:
            areas.append(Area(polygon, None if name is None else str(name)))
    return areas


def _features(uri: str, document: Any) -> list[Any]:
    if isinstance(document, dict) and document.get("type") == "FeatureCollection":
        document = document.get("features")
    elif isinstance(document, dict) and document.get("type") == "Feature":
        document = [document]
    if not isinstance(document, list) or not all(isinstance(f, dict) for f in document):
        raise SlideError(f"{uri}: expected GeoJSON features, found something else")
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


def _polygon(uri: str, rings: Any) -> Any:
    outer, *holes = (_ring(uri, ring) for ring in rings)
    polygon = fill([outer])
    for hole in holes:
        polygon = polygon.difference(fill([hole]))
    return polygon


def _ring(uri: str, points: Any) -> Ring:
    ring = np.array([(float(p[0]), float(p[1])) for p in points]).reshape(-1, 2)
    if not all(map(math.isfinite, ring.ravel())):
        raise SlideError(f"{uri}: a coordinate is not a finite number")
    return ring


def geojson_features(areas: Sequence[Area], classes: Classes) -> dict[str, Any]:
    """Give areas as a FeatureCollection of annotations that QuPath imports.

    Ids are made of the areas themselves, so the same areas give the same file.
    """
    features = []
    for area in areas:
        value = classes.value(area.class_name)
        geometry = json.loads(shapely.to_geojson(area.polygon))
        name = json.dumps([value, geometry["coordinates"]])
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
