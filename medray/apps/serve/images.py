"""Image formats and sizes that a service accepts, and masks as images."""

from __future__ import annotations

import io

from PIL import Image

from medray.errors import SlideError
from medray.types import UInt8

SUFFIXES = {
    "PNG": ".png",
    "JPEG": ".jpg",
    "BMP": ".bmp",
    "TIFF": ".tif",
    "WebP": ".webp",
    "GIF": ".gif",
}
"""File suffix of each format, by which the reader is chosen."""

_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"GIF8": "GIF",
}
START = 12
"""Number of first bytes that identify a format."""


class TooLargeError(SlideError):
    """An image has more pixels than the limit."""


def image_format(start: bytes) -> str | None:
    """Return the format (PNG, JPEG, BMP, TIFF, WebP, GIF) by the first bytes."""
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "WebP"
    return next(
        (name for magic, name in _MAGIC.items() if start.startswith(magic)), None
    )


def as_png(labels: UInt8, height: int, width: int) -> bytes:
    """Return labels as a grey PNG of the image's size; a pixel's value is its label."""
    picture = Image.fromarray(labels)
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.NEAREST)
    target = io.BytesIO()
    picture.save(target, "PNG", compress_level=1)
    return target.getvalue()


def check_header(path: str, most: int) -> None:
    """Check the size of all but TIFF; readers decode these when they open them.

    Raises:
        TooLargeError: It has more pixels than the limit.
    """
    if path.endswith(SUFFIXES["TIFF"]):
        return
    try:
        with Image.open(path) as picture:
            width, height = picture.size
    except Exception:  # errors of many kinds; the reader reports what is wrong
        return
    check_pixels(height, width, most)


def check_pixels(height: int, width: int, most: int) -> None:
    """Refuse an image with more than `most` pixels.

    Raises:
        TooLargeError: It has more.
    """
    if height * width > most:
        raise TooLargeError(
            f"{height} x {width} are {height * width / 1e6:.1f} megapixels, at most "
            f"{most / 1e6:g} are taken; cut or shrink it, or give it to `medray infer`"
        )
