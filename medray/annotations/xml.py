"""The XML of ASAP and of Aperio ImageScope; both in level-0 pixels."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import shapely
from shapely import affinity
from shapely.geometry import Point, box

from medray.annotations.polygons import Area, Ring, areal, fill, match_class
from medray.classes import Classes
from medray.errors import SlideError

_FLAT = {"3": "arrow", "4": "ruler"}


def parse_asap(root: Any, flat: Counter[str]) -> list[Area]:
    """Read ASAP's annotations; the class is the group that an annotation is part of.

    Splines are taken by their points, rectangles by their corners or two opposite
    ones. What encloses nothing is counted in `flat`: dots, point sets, measurements.

    Raises:
        SlideError: A coordinate is missing or not a finite number.
    """
    areas = []
    for annotation in root.iter("Annotation"):
        kind = annotation.get("Type", "Polygon").strip()
        if kind in ("Dot", "PointSet", "Measurement", "None"):
            flat[kind] += 1
            continue
        if kind not in ("Polygon", "Spline", "Rectangle"):
            raise SlideError(
                f"expected an annotation of Type Polygon, Spline or Rectangle, found "
                f"{kind[:40]!r}; draw it again as a polygon"
            )
        points = [
            (_number(c, "Order", i), _number(c, "X"), _number(c, "Y"))
            for i, c in enumerate(annotation.iter("Coordinate"))
        ]
        points.sort(key=lambda point: point[0])
        ring: Ring = np.array([(x, y) for _, x, y in points]).reshape(-1, 2)
        if kind == "Rectangle" and len(ring) == 2:
            ring = _corners(ring)
        polygon = fill([ring])
        group = annotation.get("PartOfGroup", "").strip()
        if not polygon.is_empty:
            areas.append(Area(polygon, None if group in ("", "None") else group))
        elif len(ring):
            flat[kind] += 1
    return areas


def parse_imagescope(root: Any, classes: Classes, flat: Counter[str]) -> list[Area]:
    """Read ImageScope's layers; regions with NegativeROA are cut out of their layer.

    What encloses nothing is counted in `flat`: arrows, rulers and the like.

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
            kind = region.get("Type", "0").strip()
            if kind not in ("0", "1", "2"):
                flat[_FLAT.get(kind, f"type {kind[:20]}")] += 1
                continue
            polygon = _region(region, kind)
            if polygon.is_empty:
                flat["region"] += region.find(".//Vertex") is not None
                continue
            if region.get("NegativeROA", "0").strip().casefold() in ("1", "true"):
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


def _region(region: Any, kind: str) -> Any:
    """Return what a region encloses.

    Boxes and ellipses may state two corners only, ellipses also the four corners or
    the four middles of the sides of the box around them. Some programs write more
    points of an ellipse; these are its outline.

    Raises:
        SlideError: Three or four points say nothing clear of an ellipse, such as the
            corners of a turned box.
    """
    points = [(_number(v, "X"), _number(v, "Y")) for v in region.iter("Vertex")]
    ring: Ring = np.array(points, np.float64).reshape(-1, 2)
    distinct = np.unique(ring, axis=0)
    if kind == "2" and 2 <= len(distinct) <= 4:
        (x0, y0), (x1, y1) = ring.min(axis=0), ring.max(axis=0)
        middle = [(x0 + x1) / 2, (y0 + y1) / 2]
        on_x = np.isclose(distinct[:, :1], [x0, x1, middle[0]], rtol=0, atol=1)
        on_y = np.isclose(distinct[:, 1:], [y0, y1, middle[1]], rtol=0, atol=1)
        corners = (on_x[:, :2].any(axis=1) & on_y[:, :2].any(axis=1)).all()
        middles = (on_x[:, 2] ^ on_y[:, 2]).all()
        if not (corners or middles):
            raise SlideError(
                f"expected an ellipse by the corners of the box around it, found the "
                f"points {distinct.tolist()}; draw it again as a polygon"
            )
        circle = Point((x0 + x1) / 2, (y0 + y1) / 2).buffer(1, quad_segs=128)
        ellipse = affinity.scale(circle, (x1 - x0) / 2, (y1 - y0) / 2)
        return ellipse if ellipse.is_valid else shapely.Polygon()
    if kind == "1" and len(ring) == 2:
        ring = _corners(ring)
    return fill([ring])


def _corners(ring: Ring) -> Ring:
    """Return the corners of the box around two points."""
    (x0, y0), (x1, y1) = ring.min(axis=0), ring.max(axis=0)
    return np.array(box(x0, y0, x1, y1).exterior.coords)


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
