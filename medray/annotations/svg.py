"""SVG: drawn as outlines, meant as areas."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import svgelements
from defusedxml import ElementTree

from medray.annotations.area import Area, FillRule, Outline, Ring, combine, fill
from medray.classes import Classes
from medray.errors import SlideError

# Largest distance of a flattened curve from the true one, slide pixels.
_FLATNESS = 0.25
_MAX_DEPTH = 100
_HOLE = "hole"
_CURVES = (svgelements.CubicBezier, svgelements.QuadraticBezier)


def parse_svg(
    uri: str, data: bytes, *, height: int, width: int, classes: Classes
) -> list[Area]:
    """Read the areas of a drawing that covers the whole slide.

    The drawing's space (viewBox, else width and height) is scaled to the slide.
    Everything closed or closable is filled, whatever its `fill` says. The class of an
    outline is its `data-class`, else a known class in `inkscape:label`, `id`, `class`
    or `title` of the element or of the nearest group around it.

    Raises:
        SlideError: The drawing has another shape than the slide, or an unknown class.
    """
    root = ElementTree.fromstring(data, forbid_dtd=False, forbid_entities=True)
    if root.tag.rpartition("}")[2] != "svg":
        raise SlideError(f"{uri}: expected <svg>, found <{root.tag}>")
    left, top, space_width, space_height = _space(uri, root, height, width)
    scale_x, scale_y = width / space_width, height / space_height
    if abs(scale_x / scale_y - 1) > 0.01:
        raise SlideError(
            f"{uri}: the drawing is {space_width:g} x {space_height:g}, the slide "
            f"{width} x {height} pixels; it belongs to another slide or was cropped"
        )
    # svgelements would apply the viewport itself, in CSS pixels; coordinates are
    # wanted as they are drawn.
    for name in ("viewBox", "width", "height", "x", "y"):
        root.attrib.pop(name, None)
    _check_depth(uri, root)
    text = io.BytesIO(ElementTree.tostring(root))
    drawing = svgelements.SVG.parse(text, reify=True)
    scale = np.array([scale_x, scale_y])
    tolerance = _FLATNESS / max(scale_x, scale_y)
    outlines = []
    for shape, ancestors in _shapes(drawing, ()):
        rings = [(ring - (left, top)) * scale for ring in _rings(shape, tolerance)]
        polygon = fill(rings, _fill_rule(shape))
        class_name, hole = _class_of([shape, *reversed(ancestors)], classes)
        if not polygon.is_empty:
            outlines.append(Outline(polygon, class_name, hole))
    return combine(outlines)


def _space(
    uri: str, root: Any, height: int, width: int
) -> tuple[float, float, float, float]:
    """Give x, y, width and height of the drawing's own coordinates."""
    if box := root.get("viewBox"):
        values = [float(v) for v in re.split(r"[\s,]+", box.strip())]
        if len(values) == 4 and min(values[2:]) > 0 and all(map(math.isfinite, values)):
            return values[0], values[1], values[2], values[3]
        raise SlideError(f"{uri}: expected viewBox with four numbers, found {box!r}")
    size = [_length(root.get(name)) for name in ("width", "height")]
    if size[0] and size[1]:
        return 0.0, 0.0, size[0], size[1]
    return 0.0, 0.0, float(width), float(height)


def _length(text: str | None) -> float | None:
    """Read a length without unit or in px; percentages and others say nothing."""
    match = re.fullmatch(r"\s*([0-9.eE+-]+)\s*(px)?\s*", text or "")
    return float(match[1]) if match else None


def _check_depth(uri: str, root: Any) -> None:
    level, depth = [root], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise SlideError(f"{uri}: groups are nested more than {_MAX_DEPTH} deep")
        level = [child for element in level for child in element]


def _shapes(
    group: Any, ancestors: tuple[Any, ...]
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    for element in group:
        if isinstance(element, svgelements.Group):
            yield from _shapes(element, (*ancestors, element))
        elif isinstance(element, svgelements.Shape) and not isinstance(
            element, svgelements.SimpleLine
        ):
            yield element, ancestors


def _rings(shape: Any, tolerance: float) -> Iterator[Ring]:
    """Flatten each subpath to points (n, 2) of x, y."""
    path = svgelements.Path(shape)
    path.approximate_arcs_with_cubics()
    for subpath in path.as_subpaths():
        points: list[tuple[float, float]] = []
        for segment in subpath:
            if segment.end is None:
                continue
            if isinstance(segment, _CURVES):
                points += _flatten(segment, tolerance)
            else:
                points.append((segment.end.x, segment.end.y))
        yield np.array(points, np.float64).reshape(-1, 2)


def _flatten(curve: Any, tolerance: float) -> list[tuple[float, float]]:
    """Sample a Bézier curve so densely that its chords are near enough.

    The distance of n chords is at most max |B''| / (8 n^2).
    """
    points = np.array([(p.x, p.y) for p in _control_points(curve)])
    degree = len(points) - 1
    bend = np.abs(np.diff(points, n=2, axis=0)).sum(axis=1).max()
    count = math.ceil(math.sqrt(degree * (degree - 1) * bend / (8 * tolerance)))
    count = min(max(count, 1), 10_000)
    return [(p.x, p.y) for p in (curve.point(i / count) for i in range(1, count + 1))]


def _control_points(curve: Any) -> Sequence[Any]:
    if isinstance(curve, svgelements.CubicBezier):
        return curve.start, curve.control1, curve.control2, curve.end
    return curve.start, curve.control, curve.end


def _fill_rule(shape: Any) -> FillRule:
    return "evenodd" if shape.values.get("fill-rule") == "evenodd" else "nonzero"


def _class_of(elements: Sequence[Any], classes: Classes) -> tuple[str | None, bool]:
    """Give the class of the innermost element that names one, and whether it is a hole.

    Raises:
        SlideError: `data-class` is unknown.
    """
    known = {name.casefold(): name for name in classes.names}
    hole = False
    for element in elements:
        attributes = element.values.get("attributes", {})
        stated = attributes.get("data-class")
        if stated is not None:
            classes.value(known.get(stated.casefold(), stated))
            return known[stated.casefold()], hole
        names = [
            value
            for key, value in attributes.items()
            if key.rpartition("}")[2] in ("label", "id", "class", "title", "data-role")
            or key == "inkscape:label"
        ]
        words = [word for name in names for word in (name, *name.split())]
        hole = hole or any(word.casefold() == _HOLE for word in words)
        for word in words:
            if word.casefold() in known:
                return known[word.casefold()], hole
    return None, hole
