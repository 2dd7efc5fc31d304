"""The part of a slide that the scanner filled, from which other programs count."""

from __future__ import annotations

import functools
import os

from medray.errors import SlideError
from medray.grid import Rectangle

_MAY_HAVE_BOUNDS = (".mrxs", ".vms", ".scn", ".bif", ".svslide")


def scanned_bounds(uri: str, *, height: int, width: int) -> Rectangle | None:
    """Return the scanned part of a slide whose canvas is larger than that.

    MRXS slides are mostly such. OpenSlide gives the whole canvas and states the bounds
    (`openslide.bounds-x` and others); QuPath shows no more than what lies within them.

    Args:
        uri: The slide.
        height: Level-0 pixels of the slide as it is read.
        width: Likewise.

    Returns:
        Level-0 pixels; None if nothing is stated, all is within the bounds, or the
        slide is not read as OpenSlide's canvas.

    Raises:
        SlideError: It is gone, or OpenSlide cannot open it, so nobody can tell.
    """
    if not uri.lower().endswith(_MAY_HAVE_BOUNDS):
        return None
    size, bounds = _stated(uri)
    if size != (height, width) or bounds == Rectangle(0, 0, height, width):
        return None
    return bounds


@functools.lru_cache(maxsize=64)
def _stated(uri: str) -> tuple[tuple[int, int], Rectangle | None]:
    """Return height and width of OpenSlide's canvas, and the bounds."""
    try:
        import openslide
    except ImportError:
        return (0, 0), None  # then it is not read by OpenSlide either
    if not os.path.isfile(uri):
        raise SlideError(
            f"{uri}: is not there, and its bounds are needed to place the annotation; "
            f"put the slide back"
        )
    try:
        with openslide.OpenSlide(uri) as slide:
            names = ("y", "x", "height", "width")
            stated = [
                slide.properties.get(f"openslide.bounds-{name}") for name in names
            ]
            width, height = slide.dimensions
        numbers = [int(value) for value in stated if value is not None]
    except (openslide.OpenSlideError, OSError, ValueError) as error:
        raise SlideError(f"{uri}: its bounds cannot be read ({error})") from error
    return (height, width), Rectangle(*numbers) if len(numbers) == 4 else None
