"""Reading the readable parts of a slide that is damaged in places."""

from __future__ import annotations

import numpy as np

from medray.errors import SlideError
from medray.slides.base import Slide
from medray.types import UInt8

# Side of the blocks that are readable or not, in pixels of the level; the usual tile.
_BLOCK = 256
MOST_UNREADABLE = 0.1
"""Share of a slide's pixels from which it is refused as damaged.

Scanners that lose tiles lose single ones, as Aperio's encoder did. A slide
that lacks more than a tenth was exported in part, or cut off while it was copied, and
what is counted on the rest of it is no longer of this slide.
"""


def check_readable(slide: Slide) -> None:
    """Raise an error if much of level 0 cannot be read, according to the header.

    Raises:
        SlideError: More than `MOST_UNREADABLE` of it is absent.
    """
    if slide.absent > MOST_UNREADABLE:
        raise SlideError(
            f"{slide.uri}: {slide.absent:.0%} of level 0 is not in the file, at most "
            f"{MOST_UNREADABLE:.0%} may be ({slide.note}); copy, export or scan the "
            f"slide again"
        )


def read_readable(
    slide: Slide, y: int, x: int, height: int, width: int, level: int = 0
) -> tuple[UInt8, list[tuple[int, int, int, int]], str]:
    """Read a rectangle like `Slide.read`; what is damaged comes back white.

    Where the whole cannot be read it is read again block by block. Blocks lie on a grid
    of the level, so what is white does not depend on the rectangle that was asked for.

    Returns:
        (height, width, 3) uint8 RGB; the unreadable rectangles (y, x, height, width)
        relative to the first pixel; and what was wrong with the first ("" if nothing).
    """
    try:
        return slide.read(y, x, height, width, level), [], ""
    except SlideError as error:
        why = f"{error}"
    pixels = np.full((height, width, 3), 255, np.uint8)
    damaged = []
    inside = slide.levels[level]
    for top in range(y - y % _BLOCK, y + height, _BLOCK):
        for left in range(x - x % _BLOCK, x + width, _BLOCK):
            size = min(_BLOCK, inside.height - top), min(_BLOCK, inside.width - left)
            rows = slice(max(y, top), min(y + height, top + size[0]))
            columns = slice(max(x, left), min(x + width, left + size[1]))
            target = (_moved(rows, -y), _moved(columns, -x))
            try:
                block = slide.read(top, left, *size, level)
            except SlideError:
                first = (target[0].start, target[1].start)
                span = (rows.stop - rows.start, columns.stop - columns.start)
                damaged.append((*first, *span))
            else:
                pixels[target] = block[_moved(rows, -top), _moved(columns, -left)]
    return pixels, damaged, why


def _moved(span: slice, by: int) -> slice:
    return slice(span.start + by, span.stop + by)
