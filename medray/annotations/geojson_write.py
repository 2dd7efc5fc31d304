"""GeoJSON features as QuPath reads them."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Any

import shapely
from shapely import affinity

from medray.annotations.geojson import ORIGIN, moved_areas
from medray.annotations.polygons import Area
from medray.classes import Classes, rgb_of
from medray.geometry import Rectangle


def geojson_features(
    areas: Sequence[Area], classes: Classes, bounds: Rectangle | None = None
) -> dict[str, Any]:
    """Return areas as a FeatureCollection of annotations that QuPath imports.

    Ids are made of the areas themselves, so the same areas give the same file.

    Args:
        areas: In level-0 pixels of the slide as medray reads it.
        classes: Names and colours.
        bounds: The scanned part of the slide, if it is not all of it: the coordinates
            that are written count from its corner, as QuPath's do.
    """
    if bounds is not None:
        areas = moved_areas(areas, -bounds.x, -bounds.y)
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
                        "color": list(rgb_of(classes.colors[value])),
                    },
                    **_origin(bounds),
                },
            }
        )
    return {"type": "FeatureCollection", "features": features}


def _origin(bounds: Rectangle | None) -> dict[str, Any]:
    # A text, for QuPath keeps no other kind of value.
    return {"metadata": {ORIGIN: f"{bounds.x} {bounds.y}"}} if bounds else {}


def extent_features(
    extent: Sequence[Any],
    names: Sequence[str],
    class_name: str,
    bounds: Rectangle | None = None,
) -> list[dict[str, Any]]:
    """Return where a slide is annotated as locked annotations that QuPath imports.

    Args:
        extent: Polygons in level-0 pixels of the slide as medray reads it.
        names: What each is called.
        class_name: QuPath ignores a class whose name ends with `*` in measurements.
        bounds: As for `geojson_features`.
    """
    if bounds is not None:
        extent = [affinity.translate(one, -bounds.x, -bounds.y) for one in extent]
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
                **_origin(bounds),
            },
        }
        for polygon, name in zip(extent, names, strict=True)
    ]
