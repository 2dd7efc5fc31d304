"""Reading slides: one small interface over many formats; no Ray and no torch."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, Literal

from medray.errors import SlideError
from medray.slides import dicom, dicom_header
from medray.slides.base import NeedsOpenSlideError, Slide
from medray.slides.discovery import SlideFile
from medray.slides.image import PICTURE_SUFFIXES, open_image
from medray.slides.listing import SLIDE_SUFFIXES
from medray.slides.members import SEVERAL_FILES, slide_members
from medray.slides.ome_zarr import ZarrSlide
from medray.slides.openslide import OpenSlideSlide
from medray.slides.staged import StagedSlide
from medray.slides.tiff import TiffSlide
from medray.slides.tiff_pages import check_choice
from medray.storage import files


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
            checks refuse is damaged. OpenSlide reads files only: of an object store it
            gets a copy (medray.slides.cache).

    Raises:
        SlideError: It is absent, damaged, of no known format, or has no such scene or
            plane.

    Examples:
        >>> with medray.open_slide("slides/slide_000.tif") as slide:
        ...     slide.mpp, [(level.height, level.width) for level in slide.levels]
        (0.5, [(768, 640)])
    """
    uri = os.fspath(uri)
    slide = _open(uri, scene, plane, reader)
    if not isinstance(slide, TiffSlide):  # the other readers know one image per file
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
    if lower.endswith(PICTURE_SUFFIXES):
        return open_image(uri)
    if reader == "openslide":
        return _openslide(uri)
    if lower.endswith(SEVERAL_FILES) or _is_dicom(uri):
        if reader == "tifffile":
            raise SlideError(f"{uri}: is no TIFF, only OpenSlide reads it")
        return _openslide(uri)
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
        SlideError: It does not, or is not installed.
    """
    try:
        slide = _openslide(uri)
    except SlideError as error:
        raise SlideError(f"{needed}; {error}") from error
    if needed.vendor not in ("", slide.format):
        slide.close()
        raise SlideError(
            f"{needed}; OpenSlide takes it for {slide.format}, expected "
            f"{needed.vendor}: the file is damaged, or convert it to a pyramidal TIFF"
        )
    return slide


def _openslide(uri: str) -> OpenSlideSlide:
    """Open a slide by OpenSlide, when all its files are there.

    Raises:
        SlideError: One is missing, or OpenSlide is not installed or cannot open it.
    """
    try:
        members = slide_members(uri)
    except FileNotFoundError as error:
        raise SlideError(f"{uri}: cannot be opened ({error})") from error
    if files.is_local(uri):
        return OpenSlideSlide(uri, members[0].uri)
    return StagedSlide(uri, members)


def _is_dicom(uri: str) -> bool:
    """Return whether this is DICOM; an absent file is not.

    Raises:
        SlideError: It is, and no slide.
    """
    if dicom_header.may_be_dicom(uri) or (files.is_local(uri) and os.path.isdir(uri)):
        return dicom.find_series(uri) is not None
    # Asking a store takes a request, so only of what is no file by its name.
    if (
        uri.lower().endswith(SLIDE_SUFFIXES)
        or dicom.fingerprint_of_file(uri) is not None
    ):
        return False
    return dicom.find_series(uri) is not None


def open_row(row: Mapping[str, Any]) -> Slide:
    """Open a slide as its row says: its `uri`, and `scene` and `plane` if it has them.

    Raises:
        SlideError: As `open_slide`.
    """
    return open_slide(row["uri"], scene=row.get("scene"), plane=row.get("plane"))


def opened(file: SlideFile, fingerprint: str) -> Slide:
    """Return an open slide: one of the last four, or opened now.

    Args:
        file: The slide, with what the user says of it.
        fingerprint: Its sizes and times, which distinguish a replaced file.

    Raises:
        SlideError: As `open_slide`.
    """
    return _opened(file.uri, fingerprint, file.scene, file.plane)


@functools.lru_cache(maxsize=4)
def _opened(uri: str, fingerprint: str, scene: int | None, plane: int | None) -> Slide:
    return open_slide(uri, scene=scene, plane=plane)


def _is_tiff(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
    except OSError:  # nor would another reader get to read it
        return True
