"""Shapes of SVG as rings of straight lines."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt
import svgelements

from medray.annotations.polygons import FillRule, Ring
from medray.annotations.svg_limits import tag_of
from medray.errors import SlideError

_IMPORTANT = re.compile(r"\s*!\s*important", re.IGNORECASE)
# What is drawn elsewhere, by reference, or is no area.
_NOT_DRAWN = {
    "clipPath",
    "filter",
    "foreignObject",
    "image",
    "marker",
    "mask",
    "pattern",
    "script",
    "text",
}


def prepare_tree(uri: str, root: Any) -> None:
    """Bring the tree into the part of SVG that svgelements draws right.

    Raises:
        SlideError: A part of the drawing has a viewport of its own.
    """
    for element in list(root.iter()):
        # svgelements takes the mark for a part of the value: display none would show.
        if style := element.get("style"):
            element.set("style", _IMPORTANT.sub("", style))
        if tag_of(element) == "style" and element.text:
            element.text = _IMPORTANT.sub("", element.text)
        for child in list(element):
            tag = tag_of(child)
            if tag in _NOT_DRAWN:
                element.remove(child)
            elif tag == "title" and child.text:
                element.set("title", child.text)
            elif tag in ("svg", "symbol") and child.get("viewBox"):
                raise SlideError(
                    f"{uri}: a <{tag}> in the drawing has a viewBox of its own, which "
                    f"is not supported; ungroup it"
                )
            elif tag in ("a", "switch"):
                child.tag = _with_tag(child, "g")
            elif tag == "symbol":  # drawn where it is used, not where it stands
                child.tag = _with_tag(child, "g")
                place = list(element).index(child)
                definitions = ElementTree.Element(_with_tag(child, "defs"))
                definitions.append(child)
                element[place] = definitions


def _with_tag(element: Any, tag: str) -> str:
    namespace, brace, _ = str(element.tag).rpartition("}")
    return f"{namespace}{brace}{tag}"


def shapes_below(
    group: Any, ancestors: tuple[Any, ...]
) -> Iterator[tuple[Any, tuple[Any, ...]]]:
    """Yield the shapes below a group, each with its ancestors."""
    for element in group:
        if isinstance(element, svgelements.Group | svgelements.Use):
            yield from shapes_below(element, (*ancestors, element))
        elif isinstance(element, svgelements.Shape):
            yield element, ancestors


def rings_of(shape: Any, tolerance: float) -> Iterator[Ring]:
    """Flatten each subpath to points (n, 2) of x, y."""
    # Reifying again: a rotated rectangle or circle keeps its transform until it is a
    # path.
    path = svgelements.Path(shape).reify()
    path.approximate_arcs_with_cubics()
    for subpath in path.as_subpaths():
        points = [np.zeros((0, 2))]
        for segment in subpath:
            if segment.end is None:
                continue
            control = _control_points(segment)
            points.append(_flatten(control, tolerance) if control else _xy(segment.end))
        yield np.concatenate(points)


def _xy(*points: Any) -> Ring:
    return np.array([(point.x, point.y) for point in points], np.float64)


def _control_points(segment: Any) -> Sequence[Any]:
    if isinstance(segment, svgelements.CubicBezier):
        return segment.start, segment.control1, segment.control2, segment.end
    if isinstance(segment, svgelements.QuadraticBezier):
        return segment.start, segment.control, segment.end
    return ()


def _flatten(control: Sequence[Any], tolerance: float) -> npt.NDArray[np.float64]:
    """Sample a Bézier curve so densely that its chords are near enough.

    The distance of n chords is at most max |B''| / (8 n^2).

    Returns:
        (n, 2) points x, y after the start.
    """
    points = _xy(*control)
    degree = len(points) - 1
    bend = np.hypot(*np.diff(points, n=2, axis=0).T).max()
    count = math.ceil(math.sqrt(degree * (degree - 1) * bend / (8 * tolerance)))
    t = np.linspace(0, 1, min(max(count, 1), 10_000) + 1)[1:, np.newaxis]
    weights = [
        math.comb(degree, k) * t**k * (1 - t) ** (degree - k) for k in range(degree + 1)
    ]
    return np.hstack(weights) @ points


def fill_rule_of(shape: Any) -> FillRule:
    """Return the fill rule of a shape."""
    return "evenodd" if shape.values.get("fill-rule") == "evenodd" else "nonzero"
