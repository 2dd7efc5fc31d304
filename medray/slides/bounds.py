"""The part of a slide that was scanned: the origin of other programs' coordinates."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from medray.errors import SlideError
from medray.geometry import Rectangle
from medray.slides.fingerprint import slide_fingerprint
from medray.slides.opening import open_slide
from medray.slides.openslide import OpenSlideSlide

_MAY_HAVE_BOUNDS = (".mrxs", ".vms", ".vmu", ".scn", ".bif", ".svslide")


def scanned_bounds(uri: str, *, height: int, width: int) -> Rectangle | None:
    """Return the scanned part of a slide whose canvas is larger than it.

    MRXS slides are mostly such. OpenSlide reads the whole canvas and states the bounds
    (`openslide.bounds-x` and others); QuPath shows no more than what lies within them.

    Args:
        uri: The slide.
        height: Height of the slide as it is read, level-0 pixels.
        width: Width of the slide as it is read, level-0 pixels.

    Returns:
        Level-0 pixels; None if nothing is stated, all is within the bounds, or the
        slide is not read as OpenSlide's canvas.

    Raises:
        SlideError: It is gone, or cannot be opened, so its bounds are not known.
        StoreError: Its store does not answer.
    """
    if not uri.lower().endswith(_MAY_HAVE_BOUNDS):
        return None
    try:
        size, bounds = _stated(uri, slide_fingerprint(uri))
    except FileNotFoundError as error:
        raise SlideError(
            f"{uri}: is not there, and its bounds are needed to place the annotation; "
            f"put the slide back"
        ) from error
    except SlideError as error:
        raise SlideError(f"{uri}: its bounds cannot be read ({error})") from error
    if size != (height, width) or bounds == Rectangle(0, 0, height, width):
        return None
    return bounds


@functools.lru_cache(maxsize=64)
def _stated(uri: str, fingerprint: str) -> tuple[tuple[int, int], Rectangle | None]:
    """Return height and width of OpenSlide's canvas, and the bounds.

    The fingerprint is part of the key: a slide that was replaced is opened again.
    """
    with open_slide(uri) as slide:
        if not isinstance(slide, OpenSlideSlide):
            return (0, 0), None
        size = slide.levels[0].height, slide.levels[0].width
        return size, _bounds(uri, slide.properties)


def _bounds(uri: str, properties: Mapping[str, str]) -> Rectangle | None:
    stated = [
        properties.get(f"openslide.bounds-{name}")
        for name in ("y", "x", "height", "width")
    ]
    try:
        numbers = [int(value) for value in stated if value is not None]
    except ValueError as error:
        raise SlideError(f"{uri}: its bounds cannot be read ({error})") from error
    return Rectangle(*numbers) if len(numbers) == 4 else None
