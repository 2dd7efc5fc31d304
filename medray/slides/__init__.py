"""Reading slides: one small interface over many formats; no Ray and no torch."""

from __future__ import annotations

import functools
import os
from typing import Literal

from medray.errors import SlideError
from medray.slides.image import ArraySlide, open_image
from medray.slides.omezarr import ZarrSlide
from medray.slides.openslide import OpenSlideSlide
from medray.slides.slide import Level, NeedsOpenSlideError, Slide
from medray.slides.thumbnail import read_thumbnail
from medray.slides.tiff import TiffSlide

__all__ = [
    "ArraySlide",
    "Level",
    "Slide",
    "open_slide",
    "opened",
    "read_thumbnail",
]


def open_slide(
    uri: str | os.PathLike[str],
    *,
    reader: Literal["auto", "tifffile", "openslide"] = "auto",
) -> Slide:
    """Open a slide; nothing but headers is read.

    Args:
        uri: Path or address (s3://, gs://, az://).
        reader: `auto` takes tifffile, and OpenSlide for what is no TIFF or must be put
            together (NeedsOpenSlideError): any other TIFF that tifffile or medray's
            checks refuse is damaged.

    Raises:
        SlideError: It is absent, damaged, or of no known format.
    """
    uri = os.fspath(uri)
    lower = uri.lower()
    if lower.rstrip("/").endswith(".zarr"):
        return ZarrSlide(uri.rstrip("/"))
    if lower.endswith((".png", ".jpg", ".jpeg", ".bmp")):
        return open_image(uri)
    if reader == "openslide":
        return OpenSlideSlide(uri)
    try:
        return TiffSlide(uri)
    except NeedsOpenSlideError as error:
        if reader == "tifffile":
            raise
        return _by_openslide(uri, error)
    except SlideError as error:
        if reader == "tifffile" or not os.path.isfile(uri) or _is_tiff(uri):
            raise
        try:
            return OpenSlideSlide(uri)
        except SlideError:
            # What tifffile said is the more helpful; OpenSlide only says no.
            raise error from None


def _by_openslide(uri: str, needed: NeedsOpenSlideError) -> Slide:
    """Open a TIFF by OpenSlide, if it takes it for the vendor that it is of.

    Raises:
        SlideError: It does not, or is not installed, or the file is not on a disk.
    """
    if not os.path.isfile(uri):
        raise SlideError(f"{needed}; only OpenSlide reads it, copy it to a disk")
    try:
        slide = OpenSlideSlide(uri)
    except SlideError as error:
        raise SlideError(f"{needed}; {error}") from error
    if needed.vendor not in ("", slide.format):
        slide.close()
        raise SlideError(
            f"{needed}; OpenSlide takes it for {slide.format}, expected "
            f"{needed.vendor}: the file is damaged, or convert it to a pyramidal TIFF"
        )
    return slide


@functools.lru_cache(maxsize=4)
def opened(uri: str, stamp: str) -> Slide:
    """Keep the slides at hand open; the stamp tells a replaced file apart."""
    return open_slide(uri)


def _is_tiff(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
