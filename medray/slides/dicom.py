"""DICOM whole slides: which files of a folder are the instances of which slide.

A scanner writes a slide as a series of instances (VL Whole Slide Microscopy Image,
PS3.3 A.32.8), one or more a level, and the label and the overview of the glass beside
them. All instances of a series that lie in one folder are one slide. Its address is

    FOLDER                      where the folder holds one series with a VOLUME image
    FOLDER/SeriesInstanceUID    where it holds several

File names do not matter. OpenSlide reads the pixels; of the instances only headers are
read here, up to the size of the level.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from medray.errors import SlideError, StoreError
from medray.storage import files

SUFFIXES = (".dcm", ".dicom")

_DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
_SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
# PS3.5, 9.1. As part of an address it must lead nowhere else.
_UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)+")
_MAGIC_AT, _MAGIC = 128, b"DICM"
_READERS = 16
# What `Instance` holds, in the order of a file.
_WANTED = (
    "ImageType",
    "SOPClassUID",
    "SOPInstanceUID",
    "Manufacturer",
    "ManufacturerModelName",
    "SeriesInstanceUID",
    "ConcatenationUID",
    "InConcatenationNumber",
    "InConcatenationTotalNumber",
    "DimensionOrganizationType",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "TotalPixelMatrixColumns",
    "TotalPixelMatrixRows",
)
# The last of them; behind it are colour profiles of megabytes.
_LAST_TAG = 0x00480007
# Of a header, and of one value of it; a scanner writes some kB up to there.
_MOST_BYTES, _MOST_VALUE = 1 << 20, 4096


@dataclass(frozen=True)
class Instance:
    """What is read of a file's header.

    Attributes:
        uri: Of the file.
        fingerprint: Size and time of the file that was read.
        kind: Name of its SOP class.
        series: SeriesInstanceUID.
        uid: SOPInstanceUID.
        flavor: ImageType's third value, such as VOLUME, LABEL; "" if it is no slide's.
        resampled: ImageType's fourth value is RESAMPLED: not of full resolution.
        whole: ConcatenationUID; "" if it is no part of a concatenation.
        part: InConcatenationNumber, from 1.
        parts: InConcatenationTotalNumber; 0 when the file does not say.
        frames: NumberOfFrames that this file holds.
        tiles: That cover the level once.
        sparse: It says of each tile where it lies; some may not be stored.
        scanner: Maker and model.
        damaged: It is DICOM and damaged; nothing else is known.
        unread: Why it cannot be read, so that nobody knows whether it is DICOM.
    """

    uri: str
    fingerprint: str
    kind: str
    series: str
    uid: str
    flavor: str
    resampled: bool
    whole: str = ""
    part: int = 0
    parts: int = 0
    frames: int = 0
    tiles: int = 0
    sparse: bool = False
    scanner: str = ""
    damaged: bool = False
    unread: str = ""


def may_be_dicom(name: str) -> bool:
    """Tell whether a file of this name may be an instance.

    Archives name them by their UID, or by a number without a suffix.
    """
    name = name.rpartition("/")[2]
    if name.lower().endswith(SUFFIXES):
        return True
    suffix = name.rpartition(".")[2] if "." in name else ""
    return not suffix or suffix.isdigit()


def read_header(uri: str, fingerprint: str = "") -> Instance | None:
    """Return what a file says of itself; None if it is not DICOM.

    Args:
        uri: Path or address.
        fingerprint: Its size and time, if known.

    Raises:
        FileNotFoundError: There is no such file.
        SlideError: It is DICOM but its header is damaged, or pydicom is not installed.
        StoreError: It cannot be read.
    """
    return _read_header(uri, fingerprint or files.fingerprint(uri))


@functools.lru_cache(maxsize=65536)
def _read_header(uri: str, fingerprint: str) -> Instance | None:
    with files.answered(uri), files.open_file(uri) as file:
        file.seek(_MAGIC_AT)
        if file.read(4) != _MAGIC:
            return None
        file.seek(0)
        try:
            import pydicom.config
            from pydicom.filereader import read_partial
            from pydicom.tag import Tag
        except ImportError as error:
            raise SlideError(
                f"{uri}: is DICOM, and pydicom is not installed; pip install "
                f"'medray[openslide]'"
            ) from error
        # Values that break a rule of form are no reason to warn for each instance.
        pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
        try:
            data = read_partial(
                _Header(file, uri),  # type: ignore[arg-type]  # what it uses of a file
                lambda tag, *_: tag > _LAST_TAG,
                defer_size=_MOST_VALUE,
                specific_tags=[Tag(name) for name in _WANTED],
            )
            return _instance(uri, fingerprint, data)
        except (SlideError, StoreError, OSError):
            raise
        except Exception as error:  # pydicom raises what a broken file leads it to
            raise SlideError(
                f"{uri}: expected DICOM, its header cannot be read "
                f"({type(error).__name__}: {error}); copy it again"
            ) from error


class _Header:
    """The start of a file, for pydicom: no more of it is read than a header has."""

    def __init__(self, file: Any, uri: str) -> None:
        self._file, self._uri, self._left = file, uri, _MOST_BYTES
        self.seek, self.tell = file.seek, file.tell

    def read(self, length: int = -1) -> bytes:
        if length < 0:  # what pydicom does to inflate it, which nothing would bound
            raise SlideError(
                f"{self._uri}: is DICOM compressed as a whole (Deflated Explicit VR "
                f"Little Endian), expected a transfer syntax of slides, which compress "
                f"tiles; it is damaged or no slide, convert it or take it away"
            )
        self._left -= length
        if self._left < 0:
            raise SlideError(
                f"{self._uri}: expected DICOM with a header of at most {_MOST_BYTES} "
                f"bytes up to the size of the image, found a longer one; it is damaged "
                f"or no slide, copy it again or take it away"
            )
        return bytes(self._file.read(length))


def _instance(uri: str, fingerprint: str, data: Any) -> Instance:
    for name in _WANTED:
        raw = data.get_item(name, keep_deferred=True) if name in data else None
        if raw is not None and raw.value is None and raw.length > _MOST_VALUE:
            raise SlideError(
                f"{uri}: expected DICOM with a {name} of at most {_MOST_VALUE} bytes, "
                f"found {raw.length}; the file is damaged, copy it again"
            )
    kind = data.get("SOPClassUID") or data.file_meta.get("MediaStorageSOPClassUID")
    series = str(data.get("SeriesInstanceUID") or "")
    if not _UID.fullmatch(series) and kind != _DIRECTORY_CLASS:
        raise SlideError(
            f"{uri}: expected DICOM with a SeriesInstanceUID, found {series[:80]!r}; "
            f"the file is damaged or cut off, copy it again"
        )
    flavor = [str(value) for value in data.get("ImageType") or ()]
    tile, whole = (
        [int(data.get(f"{of}{side}") or 0) for side in ("Rows", "Columns")]
        for of in ("", "TotalPixelMatrix")
    )
    return Instance(
        uri=uri,
        fingerprint=fingerprint,
        kind=str(getattr(kind, "name", kind)),
        series=series,
        uid=str(data.get("SOPInstanceUID") or ""),
        flavor=flavor[2] if kind == _SLIDE_CLASS and len(flavor) > 2 else "",
        resampled=len(flavor) > 3 and flavor[3] == "RESAMPLED",
        whole=str(data.get("ConcatenationUID") or ""),
        part=int(data.get("InConcatenationNumber") or 0),
        parts=int(data.get("InConcatenationTotalNumber") or 0),
        frames=int(data.get("NumberOfFrames") or 0),
        tiles=math.prod(
            -(-a // b) if b else 0 for a, b in zip(whole, tile, strict=True)
        ),
        scanner=" ".join(
            str(data.get(name) or "")
            for name in ("Manufacturer", "ManufacturerModelName")
        ),
        sparse=data.get("DimensionOrganizationType") == "TILED_SPARSE",
    )


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
        if not files.is_of_one_file(error):
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
                f"{uri}: expected DICOM, found no DICM at byte {_MAGIC_AT}; the file "
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
    if _UID.fullmatch(name):
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
    """Refuse a series of which something that must be there is missing.

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
