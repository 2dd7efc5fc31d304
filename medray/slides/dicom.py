"""DICOM whole slides: which files of a folder are the instances of which slide.

A scanner writes a slide as a series of instances (VL Whole Slide Microscopy Image,
PS3.3 A.32.8), one or more per level, and the label and the overview of the glass next
to them. All instances of a series that lie in one folder are one slide. Its address is

    FOLDER                      where the folder holds one series with a VOLUME image
    FOLDER/SeriesInstanceUID    where it holds several

File names do not matter. OpenSlide reads the pixels; of the instances only headers are
read here, up to the size of the level.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from medray.errors import SlideError, StoreError
from medray.slides.dicom_header import (
    MAGIC_AT,
    SUFFIXES,
    UID,
    Instance,
    may_be_dicom,
    read_header,
)
from medray.storage import files, object_store

_READERS = 16


def read_folder(folder: str) -> list[Instance]:
    """Return the DICOM files that lie directly in a folder, damaged ones marked.

    Files that cannot be read are marked as well: they may be DICOM.

    Raises:
        SlideError: pydicom is not installed.
        StoreError: The folder cannot be read, or its store does not answer.
    """
    found = [
        (files.join(folder, name), fingerprint)
        for name, fingerprint in files.list_fingerprints(folder).items()
        if not name.startswith(".") and may_be_dicom(name)
    ]
    with ThreadPoolExecutor(_READERS) as readers:
        headers = readers.map(_header_or_mark, found)
        return [header for header in headers if header is not None]


def _header_or_mark(found: tuple[str, str]) -> Instance | None:
    try:
        return read_header(*found)
    except FileNotFoundError:  # removed since it was listed
        return None
    except SlideError as error:
        if isinstance(error.__cause__, ImportError):
            raise
        return Instance(*found, "a damaged file", "", "", "", False, damaged=True)
    except StoreError as error:
        if not object_store.is_of_one_file(error):
            raise
        kind = "a file that cannot be read"
        return Instance(*found, kind, "", "", "", False, unread=f"{error}")


def volume_series(instances: Iterable[Instance]) -> list[str]:
    """Return the SeriesInstanceUIDs that are slides: that have a VOLUME image."""
    found = {one.series for one in instances if one.flavor == "VOLUME" and one.series}
    return sorted(found)


def series_address(folder: str, series: str, all_series: list[str]) -> str:
    """Return the address of a slide: see this module's head."""
    return folder if all_series == [series] else files.join(folder, series)


def find_series(uri: str) -> list[Instance] | None:
    """Return the instances of a slide by its address, or by the file of an instance.

    Returns:
        In the order of their UIDs; None if it is no DICOM.

    Raises:
        SlideError: It is DICOM but not a slide, or not one only.
        StoreError: It cannot be read.
    """
    above, name = os.path.dirname(uri) or ".", os.path.basename(uri)
    fingerprint = fingerprint_of_file(uri)
    if fingerprint is not None:
        header = read_header(uri, fingerprint) if may_be_dicom(name) else None
        if header is None:
            if not name.lower().endswith(SUFFIXES):
                return None
            raise SlideError(
                f"{uri}: expected DICOM, found no DICM at byte {MAGIC_AT}; the file "
                f"is damaged, copy it again"
            )
        if not header.flavor:
            raise SlideError(
                f"{uri}: holds {header.kind}, expected VL Whole Slide Microscopy Image "
                f"Storage; it is no slide"
            )
        return _of_series(read_folder(above), header.series)
    if found := read_folder(uri):
        slides = volume_series(found)
        if len(slides) == 1:
            return _of_series(found, slides[0])
        what = ", ".join(slides or sorted({one.kind for one in found}))
        raise SlideError(
            f"{uri}: holds {len(slides)} series with a VOLUME image of a slide, found "
            f"{what}; expected one: name the slide {uri}/SeriesInstanceUID"
        )
    if UID.fullmatch(name):
        return _of_series(read_folder(above), name) or None
    return None


def _of_series(instances: Iterable[Instance], series: str) -> list[Instance]:
    found = [one for one in instances if one.series == series and one.flavor]
    return sorted(found, key=lambda one: one.uid)


def fingerprint_of_file(uri: str) -> str | None:
    """Return size and time of a file; None if there is none, or it is a folder."""
    if files.is_local(uri) and files.is_folder(uri):
        return None
    try:
        return files.fingerprint(uri)
    except FileNotFoundError:
        return None


def check_series(uri: str, instances: list[Instance]) -> None:
    """Raise an error for a series of which something required is missing.

    Raises:
        SlideError: Its full resolution, or a part of a concatenation.
    """
    volume = [one for one in instances if one.flavor == "VOLUME"]
    if not volume:
        found = ", ".join(sorted({one.flavor for one in instances})) or "nothing"
        raise SlideError(
            f"{uri}: the series has no VOLUME image (it holds {found}), expected the "
            f"scan; copy the whole series"
        )
    if all(one.resampled for one in volume):
        raise SlideError(
            f"{uri}: all {len(volume)} images of the series are RESAMPLED, expected "
            f"one in full resolution; its instance is missing, copy the whole series"
        )
    for whole in sorted({one.whole for one in volume} - {""}):
        parts = {one.part: one for one in volume if one.whole == whole}
        # Who does not say how many there are may say so in none of its parts.
        count = max(*(one.parts for one in parts.values()), *parts)
        missing = [str(part) for part in range(1, count + 1) if part not in parts]
        if missing:
            beside = min(parts.values(), key=lambda one: one.uri).uri
            raise SlideError(
                f"{uri}: part {', '.join(missing)} of {count} of the concatenation "
                f"that {beside.rpartition('/')[2]} is of is missing; copy the whole "
                f"series"
            )
    for one in volume:
        images = [one]
        if one.whole:
            images = [other for other in volume if other.whole == one.whole]
        frames = sum(image.frames for image in images)
        # A tile too few moves all that come after it. Planes come one after the other.
        if not one.sparse and (not frames or not one.tiles or frames % one.tiles):
            raise SlideError(
                f"{uri}: {one.uri.rpartition('/')[2]} holds {frames} tiles, expected "
                f"{one.tiles}, or a multiple, of a TILED_FULL image; it is damaged, "
                f"copy it again"
            )
