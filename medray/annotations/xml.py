"""The XML of ASAP and of Aperio ImageScope; both in level-0 pixels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import shapely
from shapely import affinity
from shapely.geometry import Point, box

from medray.annotations.area import Area, Ring, areal, fill, match_class
from medray.classes import Classes
from medray.errors import SlideError


def parse_asap(root: Any) -> list[Area]:
    """Read ASAP's annotations; the class is the group that an annotation is part of.

    Splines are taken by their points. Dots, point sets and measurements are passed
    over.

    Raises:
        SlideError: A coordinate is missing or not a finite number.
    """
    areas = []
    for annotation in root.iter("Annotation"):
        if annotation.get("Type", "Polygon") not in ("Polygon", "Spline", "Rectangle"):
            continue
        points = [
            (_number(c, "Order", i), _number(c, "X"), _number(c, "Y"))
            for i, c in enumerate(annotation.iter("Coordinate"))
        ]
        points.sort(key=lambda point: point[0])
        polygon = fill([np.array([(x, y) for _, x, y in points])])
        group = annotation.get("PartOfGroup", "").strip()
        if not polygon.is_empty:
            areas.append(Area(polygon, None if group in ("", "None") else group))
    return areas


def parse_imagescope(root: Any, classes: Classes) -> list[Area]:
    """Read ImageScope's layers; regions with NegativeROA are cut out of their layer.

    The class is the first known one of a layer's name, its attributes' names and
    values, a region's text and its attributes'; else the layer's name, though unknown.

    Raises:
        SlideError: A coordinate is missing or not a finite number.
    """
    areas = []
    for layer in root.iter("Annotation"):
        positive: list[Area] = []
        negative = []
        for region in layer.iter("Region"):
            polygon = _region(region)
            if polygon.is_empty:
                continue
            if region.get("NegativeROA", "0").strip() == "1":
                negative.append(polygon)
            else:
                positive.append(Area(polygon, _class_of(layer, region, classes)))
        cuts = shapely.STRtree(negative)
        for area in positive:
            near = cuts.geometries[cuts.query(area.polygon)]
            polygon = areal(area.polygon.difference(shapely.union_all(near)))
            if not polygon.is_empty:
                areas.append(Area(polygon, area.class_name))
    return areas


def _region(region: Any) -> Any:
    """Give what a region encloses; boxes and ellipses may state two corners only."""
    points = [(_number(v, "X"), _number(v, "Y")) for v in region.iter("Vertex")]
    ring: Ring = np.array(points, np.float64).reshape(-1, 2)
    kind = region.get("Type", "0").strip()
    if kind in ("3", "4"):  # arrows and rulers
        return shapely.Polygon()
    if kind == "2" and len(ring) >= 2:
        (x0, y0), (x1, y1) = ring.min(axis=0), ring.max(axis=0)
        circle = Point((x0 + x1) / 2, (y0 + y1) / 2).buffer(1, quad_segs=128)
        ellipse = affinity.scale(circle, (x1 - x0) / 2, (y1 - y0) / 2)
        return ellipse if ellipse.is_valid else shapely.Polygon()
    if kind == "1" and len(ring) == 2:
        (x0, y0), (x1, y1) = ring.min(axis=0), ring.max(axis=0)
        ring = np.array(box(x0, y0, x1, y1).exterior.coords)
    return fill([ring])


def _number(element: Any, name: str, default: float | None = None) -> float:
    value = element.get(name, default)
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise SlideError(
            f"expected a number as {name} of a <{element.tag}>, found {value!r}; mend "
            f"or remove that outline"
        )
    return number


def _class_of(layer: Any, region: Any, classes: Classes) -> str | None:
    layer_name = layer.get("Name", "").strip()
    names = [layer_name, *_attributes(layer), region.get("Text", "")]
    names += _attributes(region)
    matches = (match_class(name, classes) for name in names)
    return next(filter(None, matches), layer_name or None)


def _attributes(element: Any) -> list[str]:
    return [
        attribute.get(key, "")
        for attribute in element.findall("Attributes/Attribute")
        for key in ("Name", "Value")
    ]
