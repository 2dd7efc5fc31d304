"""Headers of DICOM instances of whole slides."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass
from typing import Any

from medray.errors import SlideError, StoreError
from medray.storage import files, object_store, remote_files

SUFFIXES = (".dcm", ".dicom")

# PS3.5, 9.1. As part of an address it must lead nowhere else.
UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)+")
MAGIC_AT, MAGIC = 128, b"DICM"

_DIRECTORY_CLASS = "1.2.840.10008.1.3.10"
_SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"

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
        unread: Why it cannot be read, so that it is not known whether it is DICOM.
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
    """Return whether a file of this name may be an instance.

    Archives name them by their UID, or by a number without a suffix.
    """
    name = name.rpartition("/")[2]
    if name.lower().endswith(SUFFIXES):
        return True
    suffix = name.rpartition(".")[2] if "." in name else ""
    return not suffix or suffix.isdigit()


def read_header(uri: str, fingerprint: str = "") -> Instance | None:
    """Return what the header of a file says; None if it is not DICOM.

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
    with object_store.answered(uri), remote_files.open_file(uri) as file:
        file.seek(MAGIC_AT)
        if file.read(4) != MAGIC:
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
    if not UID.fullmatch(series) and kind != _DIRECTORY_CLASS:
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
