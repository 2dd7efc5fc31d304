"""Checks for drawings that are too large, or whose numbers would be misread.

svgelements passes over what it cannot parse: of a damaged outline it keeps a part, and
without its damaged transform it draws a shape in another place. Labels made of that
would be wrong without a sign of it.
"""

from __future__ import annotations

import re
from typing import Any

from medray.errors import SlideError

_MAX_DEPTH = 100
_MAX_ELEMENTS = 1_000_000
_SHAPES = {"circle", "ellipse", "path", "polygon", "polyline", "rect", "use"}
_LENGTHS = ("x", "y", "width", "height", "cx", "cy", "r", "rx", "ry")
# The grammars below are of text without separators in which # stands for a number.
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_SEPARATORS = re.compile(r"[\s,]+")
_LENGTH = re.compile(r"(?:#(?:px|pt|pc|mm|cm|in|%)?|auto)?")
_POINTS = re.compile(r"(?:##)*+")
# SVG 2, section 9.3.9. The flags of an arc may be written without a space between, so
# its numbers cannot be counted.
_PATH = re.compile(
    r"(?:none|(?:[MmLlTt](?:##)++|[HhVv]#++|[Cc](?:######)++|[SsQq](?:####)++"
    r"|[Aa]#++|[Zz])*+)"
)
_ANGLE = r"#(?:deg|rad|grad|turn)?"
_TRANSFORM = re.compile(
    rf"(?:none|(?:matrix\(######\)|translate\(#(?:px)?(?:#(?:px)?)?\)|scale\(##?\)"
    rf"|rotate\({_ANGLE}(?:##)?\)|skew[XY]\({_ANGLE}\))*+)"
)
_CSS_TRANSFORM = re.compile(r"(?:^|[;{\s])transform\s*:(?!\s*none)")


def tag_of(element: Any) -> str:
    """Return an element's tag without its namespace."""
    return str(element.tag).rpartition("}")[2]


def href_of(element: Any) -> str:
    """Return what an element refers to, as SVG 2 or 1.1 states it."""
    old_style = element.get("{http://www.w3.org/1999/xlink}href", "")
    return str(element.get("href") or old_style)


def check_size(uri: str, root: Any) -> None:
    """Raise an error for drawings that grow without bounds as uses are followed.

    Raises:
        SlideError: Too deep, a `use` of itself, or too many elements.
    """
    level, depth = [root], 0
    while level:
        depth += 1
        if depth > _MAX_DEPTH:
            raise SlideError(
                f"{uri}: groups are nested more than {_MAX_DEPTH} deep; ungroup them"
            )
        level = [child for element in level for child in element]
    named = {e.get("id"): e for e in root.iter() if e.get("id")}
    counts: dict[Any, int | None] = {}

    def count(element: Any) -> int:
        if element in counts:
            known = counts[element]
            if known is None:
                raise SlideError(f"{uri}: a <use> draws itself; remove it")
            return known
        counts[element] = None
        total = 1 + sum(map(count, element))
        if tag_of(element) == "use":
            target = named.get(href_of(element).removeprefix("#"))
            total += 0 if target is None else count(target)
        counts[element] = total
        return total

    if count(root) > _MAX_ELEMENTS:
        raise SlideError(
            f"{uri}: draws more than {_MAX_ELEMENTS} elements; split it up"
        )


def check_values(uri: str, root: Any) -> None:
    """Raise an error for coordinates, lengths and transforms that are not valid SVG.

    Raises:
        SlideError: One is damaged, or a transform is written as CSS.
    """
    for element in root.iter():
        tag = tag_of(element)
        grammars = {"transform": _TRANSFORM}
        if tag in _SHAPES:
            grammars |= {"points": _POINTS, "d": _PATH}
            grammars |= dict.fromkeys(_LENGTHS, _LENGTH)
        for name, grammar in grammars.items():
            text = element.get(name)
            if text is None:
                continue
            # Numbers may touch, as in 10-5, so these are found before separators go.
            form = _SEPARATORS.sub("", _NUMBER.sub("#", text))
            if not grammar.fullmatch(form):
                found = text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}"
                raise SlideError(
                    f"{uri}: expected {name} of a <{tag}> as SVG has it, found "
                    f"{found!r}, damaged or in a unit unknown here; mend or remove it"
                )
        style = element.text if tag == "style" else element.get("style")
        if style and _CSS_TRANSFORM.search(style):
            raise SlideError(
                f"{uri}: a <{tag}> moves shapes by a CSS transform, which is not "
                f"supported; save the drawing with transform attributes (plain SVG)"
            )
        if element.get("transform") and element.get("transform-origin"):
            raise SlideError(
                f"{uri}: a <{tag}> has a transform-origin, which is not supported; "
                f"apply the transform in the editor, then save again"
            )
