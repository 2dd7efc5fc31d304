"""The XML of ASAP and of Aperio ImageScope; both in level-0 pixels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from defusedxml import ElementTree
from shapely import affinity
from shapely.geometry import Point

from medray.annotations.area import Area, Outline, Ring, areal, fill
from medray.classes import Classes
from medray.errors import SlideError

_SUPPORTED = ("ASAP_Annotations", "Annotations")


def parse_xml(uri: str, data: bytes, classes: Classes) -> list[Area]:
    """Read ASAP or ImageScope annotations, told apart by the root element.

    Raises:
        SlideError: It is neither, or its structure is broken.
    """
    root = ElementTree.fromstring(data, forbid_dtd=True)
    if root.tag == "ASAP_Annotations":
        return [
            Area(o.polygon, o.class_name) for o in _asap(root) if not o.polygon.is_empty
        ]
    if root.tag == "Annotations":
        return list(_imagescope(root, classes))
    raise SlideError(
        f"{uri}: expected the root element {' or '.join(_SUPPORTED)}, found {root.tag}"
    )


def _asap(root: Any) -> Iterator[Outline]:
    """Read ASAP's annotations; the class is the group that an annotation is part of."""
    for annotation in root.iter("Annotation"):
        group = annotation.get("PartOfGroup", "None").strip()
        points = sorted(
            (float(c.get("Order", i)), _float(c, "X"), _float(c, "Y"))
            for i, c in enumerate(annotation.iter("Coordinate"))
        )
        ring = np.array([(x, y) for _, x, y in points]).reshape(-1, 2)
        name = None if group in ("None", "") else group
        yield Outline(fill([ring]), name)


def _imagescope(root: Any, classes: Classes) -> Iterator[Area]:
    """Read ImageScope's layers; regions with NegativeROA are cut out of their layer."""
    for layer in root.iter("Annotation"):
        solids: dict[str | None, Any] = {}
        negative = []
        for region in layer.iter("Region"):
            polygon = _region(region)
            if polygon.is_empty:
                continue
            if region.get("NegativeROA", "0") == "1":
                negative.append(polygon)
                continue
            name = _layer_class(layer, region, classes)
            before = solids.get(name)
            solids[name] = polygon if before is None else before.union(polygon)
        for name, polygon in solids.items():
            for hole in negative:
                polygon = polygon.difference(hole)
            polygon = areal(polygon)
            if not polygon.is_empty:
                yield Area(polygon, name)


def _region(region: Any) -> Any:
    points = [(_float(v, "X"), _float(v, "Y")) for v in region.iter("Vertex")]
    ring: Ring = np.array(points).reshape(-1, 2)
    kind = region.get("Type", "0")
    if kind in ("1", "2") and len(ring) >= 2:
        (x0, y0), (x1, y1) = ring.min(axis=0), ring.max(axis=0)
        if kind == "2":
            circle = Point((x0 + x1) / 2, (y0 + y1) / 2).buffer(1, quad_segs=64)
            return affinity.scale(circle, (x1 - x0) / 2, (y1 - y0) / 2)
        if len(ring) == 2:
            ring = np.array([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    return fill([ring])


def _float(element: Any, name: str) -> float:
    value = element.get(name)
    number = float(value) if value is not None else float("nan")
    if not np.isfinite(number):
        raise ValueError(f"{element.tag} has {name}={value}")
    return number


def _layer_class(layer: Any, region: Any, classes: Classes) -> str | None:
    """Give the class that a layer's name, its attributes or a region's text state."""
    stated = [layer.get("Name", ""), region.get("Text", "")]
    for attribute in layer.iter("Attribute"):
        stated += [attribute.get("Name", ""), attribute.get("Value", "")]
    known = {name.casefold(): name for name in classes.names}
    for name in stated:
        if name.strip().casefold() in known:
            return known[name.strip().casefold()]
    return layer.get("Name", "").strip() or None
