"""SVG: drawn as outlines, meant as areas."""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import numpy as np
import svgelements

from medray.annotations.areas import covers_slide
from medray.annotations.polygons import (
    Area,
    Note,
    Outline,
    Ring,
    combine,
    fill,
    match_class,
)
from medray.annotations.svg_limits import check_size, check_values, tag_of
from medray.annotations.svg_shapes import (
    fill_rule_of,
    prepare_tree,
    rings_of,
    shapes_below,
)
from medray.classes import Classes
from medray.errors import SlideError

# Largest distance of a flattened curve from the true one, slide pixels.
_FLATNESS = 0.1
_OPEN = 0.1  # gap between the ends of an outline, as a share of its length
_HOLE = "hole"


def parse_svg(
    uri: str,
    root: Any,
    size: tuple[int, int],
    classes: Classes,
    note: Note,
    flat: Counter[str],
) -> list[Area]:
    """Read the areas of a drawing that covers the whole slide.

    The drawing's space (viewBox, else width and height) is scaled to the slide.
    A visible outline is filled, whatever its `fill` says; one that is stroked only and
    open by more than a tenth of its length is a line. The class of an outline is its
    `data-class`, else a known class in `inkscape:label`, `id`, `class` or `title` of
    the element or of the nearest group around it. A rectangle of the size of the page
    that names no class itself is the editor's background.

    Args:
        uri: Named in errors.
        root: The <svg> element, safely parsed; it is changed.
        size: Height and width of the slide in level-0 pixels.
        classes: Names by label value.
        note: Called with what was left out.
        flat: Counts the lines, which enclose nothing.

    Raises:
        SlideError: The drawing has another shape than the slide, an unknown class, or
            nothing that can be seen.
    """
    height, width = size
    left, top, space_width, space_height = _space(uri, root, height, width)
    scale_x, scale_y = width / space_width, height / space_height
    if abs(scale_x / scale_y - 1) > 0.01:
        raise SlideError(
            f"{uri}: SVG of another size than its slide: the drawing is "
            f"{space_width:g} x {space_height:g}, the slide {width} x {height} pixels; "
            f"it belongs to another slide or was cropped"
        )
    check_size(uri, root)
    whole_page = _whole_page_clips(
        root, (left, top, left + space_width, top + space_height)
    )
    prepare_tree(uri, root)
    check_values(uri, root)
    # svgelements applies the viewport itself, in CSS pixels, but coordinates are wanted
    # as they are drawn. A viewport of the drawing's own size leaves them alone, and
    # percentages still mean something.
    for name in ("x", "y", "transform", "preserveAspectRatio"):
        root.attrib.pop(name, None)
    root.set("viewBox", f"0 0 {space_width!r} {space_height!r}")
    root.set("width", repr(space_width))
    root.set("height", repr(space_height))
    text = io.BytesIO(ElementTree.tostring(root))
    drawing = svgelements.SVG.parse(text, reify=True)
    scale = np.array([scale_x, scale_y])
    tolerance = _FLATNESS / max(scale_x, scale_y)
    outlines, backgrounds = [], []
    hidden = 0
    for shape, ancestors in shapes_below(drawing, (drawing,)):
        filled = _is_painted(shape, "fill")
        if _is_hidden(shape) or not (filled or _is_painted(shape, "stroke")):
            hidden += 1
            continue
        _check_clips(uri, [shape, *ancestors], whole_page)
        rings = [(ring - (left, top)) * scale for ring in rings_of(shape, tolerance)]
        if not filled:
            closed = [ring for ring in rings if not _is_line(ring)]
            flat["open line"] += len(rings) - len(closed)
            rings = closed
        polygon = fill(rings, fill_rule_of(shape))
        # An unknown class is an error, whatever carries it.
        class_name, hole = _class_of([shape, *reversed(ancestors)], classes)
        if polygon.is_empty:
            flat["line"] += any(len(np.unique(ring, axis=0)) > 1 for ring in rings)
            continue
        outline = Outline(polygon, class_name, hole)
        unnamed = not hole and _class_of([shape], classes)[0] is None
        if unnamed and covers_slide(polygon, height, width):
            backgrounds.append(outline)
        else:
            outlines.append(outline)
    if hidden and not (outlines or backgrounds):
        raise SlideError(
            f"{uri}: nothing in the drawing can be seen, its {hidden} outlines are "
            f"hidden or have neither fill nor stroke; show them, then save again"
        )
    if not any(not outline.hole for outline in outlines):
        outlines += backgrounds
    elif backgrounds:
        note(
            f"{len(backgrounds)} outlines of the size of the page, without a class of "
            f"their own, were taken for its background; left out"
        )
    if hidden:
        note(f"{hidden} outlines of the drawing cannot be seen; left out")
    return combine(outlines, note)


def _is_hidden(shape: Any) -> bool:
    """Return whether `visibility` or `opacity` hides a shape; `display` is applied."""
    visibility = str(shape.values.get("visibility", "")).strip().casefold()
    return visibility in ("hidden", "collapse") or _is_zero(shape.values.get("opacity"))


def _is_painted(shape: Any, part: str) -> bool:
    """Return whether the `fill` or the `stroke` of a shape can be seen."""
    paint = str(shape.values.get(part) or "none").strip().casefold()
    sizes = [shape.values.get(f"{part}-opacity")]
    if part == "stroke":
        sizes.append(shape.values.get("stroke-width"))
    if paint in ("none", "transparent") or any(map(_is_zero, sizes)):
        return False
    color = svgelements.Color(paint)
    # What is no colour refers to one, such as a gradient.
    return color.value is None or color.alpha != 0


def _is_zero(text: Any) -> bool:
    number = re.match(r"\s*[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", str(text))
    return number is not None and float(number[0]) <= 0


def _is_line(ring: Ring) -> bool:
    """Return whether it is a line, not an outline by hand that is not quite closed."""
    if len(ring) < 2:
        return True
    steps = np.hypot(*np.diff(ring, axis=0).T)
    return bool(np.hypot(*(ring[-1] - ring[0])) > _OPEN * steps.sum())


def _whole_page_clips(root: Any, page: tuple[float, ...]) -> set[str]:
    """Return the ids of the clip paths that are one rectangle around the whole page."""
    found = set()
    for clip in root.iter():
        if tag_of(clip) != "clipPath" or clip.get("transform"):
            continue
        (rect, *others) = list(clip) or [clip]
        units = clip.get("clipPathUnits", "userSpaceOnUse")
        if others or tag_of(rect) != "rect" or units != "userSpaceOnUse":
            continue
        if rect.get("transform") or rect.get("rx") or rect.get("ry"):
            continue
        try:
            sides = [float(rect.get(key, 0)) for key in ("x", "y", "width", "height")]
        except ValueError:
            continue
        x, y, width, height = sides
        around = x <= page[0] and y <= page[1]
        if around and x + width >= page[2] and y + height >= page[3]:
            found.add(str(clip.get("id")))
    return found


def _check_clips(uri: str, elements: Sequence[Any], whole_page: set[str]) -> None:
    """Raise an error for a shape of which a clip path or a mask may hide a part.

    Raises:
        SlideError: One does, unless it is a rectangle around the whole page.
    """
    moved = any(element.values.get("transform") for element in elements)
    for name in ("clip-path", "mask"):
        for element in elements:
            stated = str(element.values.get(name) or "none").strip()
            target = re.fullmatch(r"url\(\s*['\"]?#(.*?)['\"]?\s*\)", stated)
            harmless = not moved and target is not None and target[1] in whole_page
            if stated != "none" and not (name == "clip-path" and harmless):
                raise SlideError(
                    f"{uri}: a part of the drawing is cut off by {name} {stated!r}, "
                    f"which is not supported; release the clip or mask in the editor "
                    f"and cut the outline itself, then save again"
                )


def _space(
    uri: str, root: Any, height: int, width: int
) -> tuple[float, float, float, float]:
    """Return x, y, width and height of the drawing's own coordinates."""
    x, y = 0.0, 0.0
    if view_box := root.get("viewBox"):
        found = f"viewBox {view_box!r}"
        try:
            x, y, *size = map(float, re.split(r"[\s,]+", view_box.strip()))
        except ValueError:
            size = []
    else:
        found = f"width {root.get('width')!r} and height {root.get('height')!r}"
        size = [
            length
            for name in ("width", "height")
            if (length := _length(root.get(name))) is not None
        ]
        if not size:
            size = [width, height]
    if len(size) != 2 or min(size) <= 0 or not all(map(math.isfinite, (x, y, *size))):
        raise SlideError(
            f"{uri}: expected an SVG with a viewBox of four numbers or a width and a "
            f"height above zero, found {found}; set the viewBox to the slide's pixels"
        )
    return x, y, float(size[0]), float(size[1])


def _length(text: str | None) -> float | None:
    """Return a length in CSS pixels; a percentage says nothing about the drawing."""
    if text is None or text.strip().endswith("%") or text.strip() == "auto":
        return None
    value = svgelements.Length(text).value(ppi=96)
    return float(value) if isinstance(value, int | float) else None


def _class_of(elements: Sequence[Any], classes: Classes) -> tuple[str | None, bool]:
    """Return the class that the innermost element names, and whether one is a hole.

    Raises:
        SlideError: `data-class` is unknown.
    """
    class_name, hole = None, False
    for element in elements:
        attributes = {
            key.rpartition("}")[2].rpartition(":")[2]: value
            for key, value in element.values.get("attributes", {}).items()
        }
        words = attributes.get("class", "").split()
        marks = [*words, attributes.get("id", ""), attributes.get("data-role", "")]
        hole = hole or any(mark.casefold() == _HOLE for mark in marks)
        if class_name is not None:
            continue
        stated = attributes.get("data-class")
        if stated is not None:
            class_name = match_class(stated, classes)
            if class_name is None:
                classes.value(stated)
            continue
        names = [attributes.get(key, "") for key in ("label", "id", "class", "title")]
        matches = (match_class(name, classes) for name in (*names, *words))
        class_name = next(filter(None, matches), None)
    return class_name, hole
