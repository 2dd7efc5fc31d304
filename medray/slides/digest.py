"""What a file is (its digest), and a quick sign that it changed (its stamp)."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import fsspec

from medray.errors import SlideError

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
        SlideError: It cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        fs, path = fsspec.url_to_fs(uri)
        if str(path).endswith(".zarr"):
            _add_folder(digest, fs, path)
        else:
            with fs.open(path, "rb") as file:
                size = file.seek(0, os.SEEK_END)
                for start, length in _parts(size):
                    file.seek(start)
                    digest.update(file.read(length))
            digest.update(str(size).encode())
    except (OSError, ValueError, ImportError) as error:
        raise SlideError(f"{uri}: cannot be read ({error})") from error
    return f"blake2b:{digest.hexdigest()}"


def _parts(size: int) -> list[tuple[int, int]]:
    if size <= _WHOLE:
        return [(0, size)]
    step = (size - _MIB) // 63
    return [(i * step, _MIB) for i in range(63)] + [(size - _MIB, _MIB)]


def _add_folder(digest: Any, fs: Any, path: str) -> None:
    with fs.open(f"{path}/zarr.json", "rb") as file:
        digest.update(file.read())
    for name, info in sorted(fs.find(path, detail=True).items()):
        digest.update(f"{name[len(path) :]} {info['size']}\n".encode())


def slide_stamp(uri: str) -> str:
    """Give size and time of a file: equal stamps mean that it was not touched.

    Raises:
        SlideError: It cannot be found.
    """
    try:
        fs, path = fsspec.url_to_fs(uri)
        if str(path).endswith(".zarr"):
            path = f"{path}/zarr.json"
        info = fs.info(path)
    except (OSError, ValueError, ImportError) as error:
        raise SlideError(f"{uri}: cannot be found ({error})") from error
    keys = ("mtime", "ETag", "LastModified", "last_modified", "updated", "created")
    when = next((info[key] for key in keys if info.get(key)), "")
    return f"{info.get('size')} {when}"
