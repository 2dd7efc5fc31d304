"""Random access to files, also those of an object store."""

from __future__ import annotations

import functools
import io
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from medray.storage.files import is_local, read_ranges, size
from medray.storage.object_store import answered

_BLOCK = 64 << 10
_PART, _PARTS = 16 << 20, 8


def download(uri: str, path: str) -> Iterator[int]:
    """Copy a file of an object store to a new local file, durably.

    It is fetched in parts, some at once, so that a connection that breaks costs one
    of them. A part fails that does not come for a minute or two.

    Yields:
        Bytes of each part that was written.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: It cannot be read, or not be written here.
    """
    length = size(uri)
    with answered(path, "written"):
        file = open(path, "xb")  # noqa: SIM115

    def fetch(start: int) -> bytes:
        return read_ranges(uri, [start], [min(_PART, length - start)])[0]

    with file, ThreadPoolExecutor(_PARTS) as fetching:
        for starts in itertools.batched(range(0, length, _PART), _PARTS):
            for part in fetching.map(fetch, starts):
                with answered(path, "written"):
                    file.write(part)
                yield len(part)
        with answered(path, "written"):
            file.flush()
            os.fsync(file.fileno())


class _RemoteFile(io.RawIOBase):
    """An object as a file: small reads go through blocks, large ones are exact."""

    def __init__(self, uri: str) -> None:
        self._uri, self._size, self._at = uri, size(uri), 0
        self._block = functools.lru_cache(maxsize=16)(self._fetch_block)

    def _fetch_block(self, index: int) -> bytes:
        return self._fetch(index * _BLOCK, _BLOCK)

    def _fetch(self, start: int, length: int) -> bytes:
        length = min(length, self._size - start)
        return read_ranges(self._uri, [start], [length])[0] if length > 0 else b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
        self._at = max(0, origin[whence] + offset)
        return self._at

    def read(self, length: int = -1) -> bytes:
        start, end = self._at, self._size
        if 0 <= length < end - start:
            end = start + length
        if end - start >= _BLOCK:
            data = self._fetch(start, end - start)
        else:
            first = start // _BLOCK
            blocks = range(first, -(-end // _BLOCK)) if end > start else ()
            whole = b"".join(map(self._block, blocks))
            data = whole[start - first * _BLOCK : end - first * _BLOCK]
        self._at += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


def open_file(uri: str) -> Any:
    """Open a file for random access, in binary.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: It cannot be read.
    """
    with answered(uri):
        return open(uri, "rb") if is_local(uri) else _RemoteFile(uri)
