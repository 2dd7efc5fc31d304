"""What a file is (its digest), and a quick sign that it changed (its stamp)."""

from __future__ import annotations

import hashlib
from typing import Any

from medray.errors import MedrayError, SlideError
from medray.store import files

_MIB = 1 << 20
_WHOLE = 64 * _MIB


def slide_digest(uri: str) -> str:
    """Name a file by its content.

    Up to 64 MiB all of it counts; of a larger one its size, its first and last MiB and
    62 MiB spread evenly between them: enough to tell scans apart at a constant cost.
    An OME-Zarr is named by its zarr.json and the names and sizes of its files.

    Returns:
        `blake2b:` and 32 hex digits.

    Raises:
        SlideError: It is not there.
        StoreError: It cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        if uri.endswith(".zarr"):
            digest.update(files.read_bytes(files.join(uri, "zarr.json")))
            for name, size in files.list_files(uri).items():
                digest.update(f"/{name} {size}\n".encode())
        else:
            size = files.size(uri)
            starts, lengths = zip(*_parts(size), strict=True)
            for data in files.read_ranges(uri, starts, lengths):
                digest.update(data)
            digest.update(str(size).encode())
    except FileNotFoundError as error:
        raise SlideError(f"{uri}: cannot be read ({error})") from error
    return f"blake2b:{digest.hexdigest()}"


def _parts(size: int) -> list[tuple[int, int]]:
    if size <= _WHOLE:
        return [(0, size)]
    step = (size - _MIB) // 63
    return [(i * step, _MIB) for i in range(63)] + [(size - _MIB, _MIB)]


def slide_stamp(uri: str) -> str:
    """Give size and time of a file: equal stamps mean that it was not touched.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: It cannot be looked at.
    """
    return files.stamp(files.join(uri, "zarr.json") if uri.endswith(".zarr") else uri)


def stamp_of(uri: str, annotation: str = "") -> str:
    """Give the stamp of a slide and of its annotation, if it has one.

    Returns:
        Empty when one cannot be looked at: opening it will tell what is wrong.
    """
    try:
        stamp = slide_stamp(uri)
        return f"{stamp} {slide_stamp(annotation)}" if annotation else stamp
    except (MedrayError, OSError):
        return ""


def check_unchanged(row: dict[str, Any]) -> None:
    """Check that a slide is still the file that was planned.

    Args:
        row: Of the slide: `uri`, `annotation` and `stamp`, from `stamp_of`.

    Raises:
        SlideError: It was replaced or written to.
    """
    now = stamp_of(row["uri"], row["annotation"])
    if row["stamp"] and now != row["stamp"]:
        raise SlideError(
            f"{row['uri']}: it, or its annotation, changed while it was read (size and "
            f"time were {row['stamp']}, are {now or 'not to be had'}); run again when "
            f"it is complete"
        )
