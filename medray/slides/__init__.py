"""Reading slides: one small interface over many formats; no Ray and no torch."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, Literal

from medray.errors import SlideError
from medray.slides.image import ArraySlide, open_image
from medray.slides.omezarr import ZarrSlide
from medray.slides.openslide import OpenSlideSlide
from medray.slides.slide import Level, NeedsOpenSlideError, Slide
from medray.slides.thumbnail import read_thumbnail
from medray.slides.tiff import TiffSlide
from medray.slides.vendors import check_choice

__all__ = [
    "ArraySlide",
    "Level",
    "Slide",
    "open_row",
    "open_slide",
    "opened",
    "read_thumbnail",
]


def open_slide(
    uri: str | os.PathLike[str],
    *,
    scene: int | None = None,
    plane: int | None = None,
    reader: Literal["auto", "tifffile", "openslide"] = "auto",
) -> Slide:
    """Open a slide; nothing but headers is read.

    Args:
        uri: Path or address (s3://, gs://, az://).
        scene: Which of several slides in the file, from 0 in the file's order; None: by
            the format's rules.
        plane: Which of several focal planes, from 0; None: the one in focus, or the
            first.
        reader: `auto` takes tifffile, and OpenSlide for what is no TIFF or must be put
            together (NeedsOpenSlideError): any other TIFF that tifffile or medray's
            checks refuse is damaged.

    Raises:
        SlideError: It is absent, damaged, of no known format, or has no such scene or
            plane.
    """
    uri = os.fspath(uri)
    slide = _open(uri, scene, plane, reader)
    if not isinstance(slide, TiffSlide):  # the other readers know one image a file
        try:
            check_choice(uri, "scene", scene, 1)
            check_choice(uri, "plane", plane, 1)
        except SlideError:
            slide.close()
            raise
    return slide


def _open(uri: str, scene: int | None, plane: int | None, reader: str) -> Slide:
    lower = uri.lower()
    if lower.rstrip("/").endswith(".zarr"):
        return ZarrSlide(uri.rstrip("/"))
    if lower.endswith((".png", ".jpg", ".jpeg", ".bmp")):
        return open_image(uri)
    if reader == "openslide":
        return OpenSlideSlide(uri)
    try:
        return TiffSlide(uri, scene, plane)
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


def open_row(row: Mapping[str, Any]) -> Slide:
    """Open a slide as its row says: its `uri`, and `scene` and `plane` if it has them.

    Raises:
        SlideError: As `open_slide`.
    """
    return open_slide(row["uri"], scene=row.get("scene"), plane=row.get("plane"))


def opened(row: Mapping[str, Any]) -> Slide:
    """Open a slide as its row says, or give it where it is among the last four.

    Its `stamp` tells a replaced file apart.

    Raises:
        SlideError: As `open_slide`.
    """
    return _opened(row["uri"], row["stamp"], row.get("scene"), row.get("plane"))


@functools.lru_cache(maxsize=4)
def _opened(uri: str, stamp: str, scene: int | None, plane: int | None) -> Slide:
    return open_slide(uri, scene=scene, plane=plane)


def _is_tiff(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
