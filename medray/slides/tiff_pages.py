"""Pages of a TIFF file: their planes, levels by size, and resolution by TIFF's tags."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from medray.errors import SlideError
from medray.slides.base import Mpp, mpp_of

# What ImageJ writes for its units (TIFF's ResolutionUnit is then none).
_IMAGEJ_MICRONS = {
    "micron": 1.0,
    "microns": 1.0,
    "um": 1.0,
    "µm": 1.0,
    "\\u00B5m": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "inch": 25400.0,
}
_AXES = {"I": "pages", "Q": "pages"}  # tifffile's letters for images of one size

_RGB_NAMES = (("red", "green", "blue"), ("r", "g", "b"))
# 1200 dots per inch and fewer are a screen's, a printer's or an office scanner's.
_COARSEST_TAGGED = 25400 / 1200 * 0.99
# 1 dot per inch and the like mean nothing to anyone and need no note.
_COARSEST_NOTED = 25400 / 71


@dataclass(frozen=True)
class ChosenImage:
    """The image of a TIFF file that is the slide.

    Attributes:
        format: Such as `svs`, `ome-tiff`, `tiff`.
        levels: Of each level, largest first, its page; three pages where red, green and
            blue are grey planes of their own. tifffile's TiffPage or TiffFrame.
        mpp: Microns per pixel; None when the file does not say.
        magnification: Of the objective; None when the file does not say.
        note: What the user should know ("" if nothing).
    """

    format: str
    levels: tuple[tuple[Any, ...], ...]
    mpp: Mpp | None
    magnification: float | None = None
    note: str = ""


def check_choice(uri: str, what: str, asked: int | None, count: int) -> None:
    """Raise an error for a scene or plane that a file does not have.

    Args:
        uri: Of the file, for the message.
        what: `scene` or `plane`.
        asked: Its number, from 0; None: not asked for.
        count: How many there are.

    Raises:
        SlideError: There are not so many.
    """
    if asked is not None and not 0 <= asked < count:
        there = f"{what}s 0 to {count - 1}" if count > 1 else f"one {what} only"
        raise SlideError(
            f"{uri}: has {there}, found --{what} {asked}; give another or leave it away"
        )


def pages_of_planes(
    uri: str, series: Any, plane: int | None
) -> tuple[tuple[tuple[Any, ...], ...], str]:
    """Return the pages of each level, and a note if others are left out.

    Raises:
        SlideError: Its planes are channels, whose colours are not known; or there is no
            such plane.
    """
    sizes = {
        axis: size
        for axis, size in zip(series.axes, series.shape, strict=True)
        if axis not in "YXS" and size > 1
    }
    said = " x ".join(f"{_AXES.get(axis, axis)}={n}" for axis, n in sizes.items())
    count, order = math.prod(sizes.values()), [plane or 0]
    if sizes == {"C": 3} and "S" not in series.axes:
        count = 1
        names = [str(value).lower() for value in series.coords.get("C", ())]
        if sorted(names) not in [sorted(colors) for colors in _RGB_NAMES]:
            raise SlideError(_channels(uri, said))
        order = [next(i for i, n in enumerate(names) if n[0] == c) for c in "rgb"]
    elif not (set(sizes) <= {"Z", "T"} or ("C" not in sizes and "S" in series.axes)):
        raise SlideError(_channels(uri, said))
    check_choice(uri, "plane", plane, count)
    levels = tuple(tuple(level.pages[i] for i in order) for level in series.levels)
    if any(page is None for page in levels[0]):
        raise SlideError(f"{uri}: the image of the plane to read is missing")
    if any(page is None for level in levels for page in level):
        raise SlideError(f"{uri}: a level of the pyramid is missing")
    if count == 1:
        return levels, ""
    if plane is not None:
        return levels, f"several planes ({said}): --plane {plane} is read"
    read = f"several planes ({said}): the first is read"
    return levels, f"{read}; --plane 0 to {count - 1} chooses"


def _channels(uri: str, said: str) -> str:
    return (
        f"{uri}: holds several channels or planes of grey ({said}), expected RGB; save "
        f"it as RGB, or name its channels Red, Green and Blue if they are"
    )


def largest_first(pages: list[Any]) -> tuple[tuple[Any, ...], ...]:
    """Return one page of each size, the first that has it."""
    sizes: dict[tuple[int, int], Any] = {}
    for page in pages:
        sizes.setdefault(size_of(page.keyframe), page)
    by_size = sorted(sizes.values(), key=lambda page: -area_of(page.keyframe))
    return tuple((page,) for page in by_size)


def fits(first: Any, page: Any) -> bool:
    """Return whether a page has the proportions of a level of `first`."""
    (height, width), (h, w) = size_of(first), size_of(page)
    if not (0 < h <= height and 0 < w <= width):
        return False
    return abs(width * h / height - w) <= max(2.0, 0.02 * w)


def size_of(page: Any) -> tuple[int, int]:
    """Return (height, width) in pixels."""
    return page.imagelength, page.imagewidth


def area_of(page: Any) -> int:
    """Return the pixels of a page."""
    return int(page.imagelength) * int(page.imagewidth)


def tag_of(element: Any) -> str:
    """Return the name of an XML element without its namespace."""
    return str(element.tag).rpartition("}")[2]


def join_notes(*notes: str) -> str:
    """Join those notes that are not empty."""
    return "; ".join(note for note in notes if note)


def positive_number(value: Any) -> float | None:
    """Return a positive number, also one with a decimal comma; else None."""
    try:
        number = float(value.replace(",", ".") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def resolution_mpp(page: Any) -> tuple[Mpp | None, str]:
    """Read X- and YResolution and ResolutionUnit (TIFF 6.0, section 8).

    Returns:
        Microns per pixel, and a note if the tags mean something else.
    """
    unit = page.tags.get("ResolutionUnit")
    microns = {2: 25400.0, 3: 1e4}.get(int(unit.value) if unit else 2)
    source, found = "XResolution", page.description or ""
    if microns is None and found.startswith("ImageJ"):
        named = re.search(r"^unit=(.*?)\s*$", found, re.MULTILINE)
        microns = _IMAGEJ_MICRONS.get(named[1]) if named else None
        source = "ImageJ unit"
    if microns is None:
        return None, ""
    per_pixel: list[float | None] = []
    for name in ("XResolution", "YResolution"):
        tag = page.tags.get(name)
        value = (0, 1) if tag is None else tag.value
        numerator, denominator = value if len(value) == 2 else (0, 1)
        known = numerator and denominator
        per_pixel.append(microns * denominator / numerator if known else None)
    x, y = per_pixel
    finest = min((value for value in per_pixel if value), default=0.0)
    # A unit of microns is no printer's, however large the pixels.
    if microns >= 1e3 and max(x or 0.0, y or 0.0) >= _COARSEST_TAGGED:
        coarsest = max(x or 0.0, y or 0.0)
        note = f"its {25400 / coarsest:g} dpi are a screen's or printer's, not its mpp"
        return None, note if finest < _COARSEST_NOTED else ""
    return mpp_of(x, y, source), ""
