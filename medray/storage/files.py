"""Where bytes live: local paths and object stores (s3://, gs://, az://, memory://).

Every write is whole: a reader sees the old content or the new, never a part. Object
stores need no rename for that.

One file, because each operation is one function with a local and a remote branch.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from obstore.exceptions import AlreadyExistsError

from medray.errors import FormatError, StoreError
from medray.storage.object_store import answered, locate

PARTIAL = ".partial-"
"""How the names of files begin that are being written."""

# Ranges of a file that lie closer together are fetched at once.
_GAP = 16 << 10


def is_local(uri: str) -> bool:
    """Return whether this is a path of this machine, not an address."""
    return "://" not in uri


def absolute(uri: str | os.PathLike[str]) -> str:
    """Make a local path absolute; an address is returned as it is.

    Ray workers and submitted jobs run in folders of their own, so no relative path
    may leave the driver.
    """
    text = os.fspath(uri).rstrip("/") or "/"
    return os.path.abspath(os.path.expanduser(text)) if is_local(text) else text


def join(uri: str, *parts: str) -> str:
    """Append path parts to a local path or an address."""
    return "/".join((uri.rstrip("/"), *parts))


def exists(uri: str) -> bool:
    """Return whether a file or folder is there."""
    if is_local(uri):
        return os.path.exists(uri)
    store, path = locate(uri)
    with answered(uri):
        try:
            obstore.head(store, path)
        except FileNotFoundError:
            first = obstore.list(store, prefix=f"{path}/", chunk_size=1)
            return any(True for _ in first)
    return True


def fingerprint(uri: str) -> str:
    """Return size and time of a file: equal fingerprints mean that it was not touched.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: It cannot be looked at.
    """
    with answered(uri):
        if is_local(uri):
            status = os.stat(uri)
            return f"{status.st_size} {status.st_mtime}"
        meta = obstore.head(*locate(uri))
        return f"{meta['size']} {meta['e_tag'] or meta['last_modified']}"


def list_fingerprints(folder: str) -> dict[str, str]:
    """Return the fingerprint of each file directly in a folder, by name, sorted.

    The fingerprints are those of `fingerprint`; an object store answers one request for
    all.

    Raises:
        StoreError: It cannot be read.
    """
    with answered(folder):
        if is_local(folder):
            return dict(sorted(_local_fingerprints(folder)))
        store, path = locate(folder)
        found = obstore.list_with_delimiter(store, prefix=f"{path}/" if path else None)
        return {
            meta["path"].rsplit("/", 1)[-1]: (
                f"{meta['size']} {meta['e_tag'] or meta['last_modified']}"
            )
            for meta in sorted(found["objects"], key=lambda meta: meta["path"])
            if meta["path"] != path
        }


def _local_fingerprints(folder: str) -> Iterator[tuple[str, str]]:
    if not os.path.isdir(folder):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if entry.is_file():
                    status = entry.stat()
                    yield entry.name, f"{status.st_size} {status.st_mtime}"
            except FileNotFoundError:  # a file that another process was writing
                continue


def size(uri: str) -> int:
    """Return the bytes of a file.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: It cannot be looked at.
    """
    with answered(uri):
        if is_local(uri):
            return os.stat(uri).st_size
        return int(obstore.head(*locate(uri))["size"])


def read_bytes(uri: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: The file is there but cannot be read.
    """
    with answered(uri):
        if is_local(uri):
            return Path(uri).read_bytes()
        return bytes(obstore.get(*locate(uri)).bytes())


def read_ranges(uri: str, starts: Sequence[int], lengths: Sequence[int]) -> list[bytes]:
    """Read parts of a file: of an object at once, a little between them included.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: The file is there but cannot be read.
    """
    with answered(uri):
        if is_local(uri):
            with open(uri, "rb") as file:
                return [
                    _part(file, *part) for part in zip(starts, lengths, strict=True)
                ]
        store, path = locate(uri)
        fetched = obstore.get_ranges(
            store, path, starts=starts, lengths=lengths, coalesce=_GAP
        )
        return [bytes(part) for part in fetched]


def _part(file: Any, start: int, length: int) -> bytes:
    file.seek(start)
    return bytes(file.read(length))


def write_bytes(uri: str, data: bytes, *, new: bool = False) -> None:
    """Write a whole file atomically; parent folders are made.

    A local file is written next to its place, synced and renamed; an object store
    shows an object only when it is complete.

    Args:
        uri: Where to.
        data: All of it.
        new: Only if there is none yet.

    Raises:
        FileExistsError: There is one, and it was to be new.
        StoreError: The place cannot be written (full, read-only, no permission).
    """
    try:
        with answered(uri, "written"):
            _write(uri, data, new)
    except StoreError as error:
        if new and isinstance(error.__cause__, FileExistsError | AlreadyExistsError):
            raise FileExistsError(uri) from error
        raise


def _write(uri: str, data: bytes, new: bool) -> None:
    if not is_local(uri):
        store, path = locate(uri)
        obstore.put(store, path, data, mode="create" if new else "overwrite")
        return
    folder = os.path.dirname(uri)
    os.makedirs(folder, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder, prefix=PARTIAL)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        if new:
            os.link(partial, uri)
        else:
            os.replace(partial, uri)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)


def sync(uri: str) -> None:
    """Make a local file that was written by others durable."""
    if is_local(uri):
        handle = os.open(uri, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(uri: str) -> None:
    """Remove a file or a folder with all that is in it; absent is fine.

    Raises:
        StoreError: It cannot be removed.
    """
    with answered(uri, "removed"):
        if is_local(uri):
            if os.path.isdir(uri) and not os.path.islink(uri):
                shutil.rmtree(uri)
            elif os.path.lexists(uri):
                os.unlink(uri)
            return
        store, path = locate(uri)
        paths = [found for found, _ in _objects(uri)] + [path]
        for first in range(0, len(paths), 1000):
            try:
                obstore.delete(store, paths[first : first + 1000])
            except FileNotFoundError:  # as some stores answer for what is not there
                continue


def list_folder(uri: str) -> list[str]:
    """Return the names in a folder, sorted; an absent folder is empty.

    Raises:
        StoreError: It cannot be read.
    """
    with answered(uri):
        if is_local(uri):
            return sorted(os.listdir(uri)) if os.path.isdir(uri) else []
        store, path = locate(uri)
        prefix = f"{path}/" if path else None
        found = obstore.list_with_delimiter(store, prefix=prefix)
        paths = [meta["path"] for meta in found["objects"]]
        paths += found["common_prefixes"]
        return sorted({p.rstrip("/").rsplit("/", 1)[-1] for p in paths if p != path})


def is_folder(uri: str) -> bool:
    """Return whether this is a folder, or a prefix with objects in an object store."""
    return os.path.isdir(uri) if is_local(uri) else bool(list_folder(uri))


def list_files(uri: str) -> dict[str, int]:
    """Return the files below a folder with their bytes, by their path in it.

    Raises:
        StoreError: It cannot be read.
    """
    with answered(uri):
        if is_local(uri):
            return dict(sorted(_local_files(uri)))
        start = len(locate(uri)[1])
        found = {path[start:].lstrip("/"): length for path, length in _objects(uri)}
        # Consoles and pyarrow store empty objects that stand for folders.
        folders = {str(up) for name in found for up in PurePosixPath(name).parents}
        folders.add("")
        return {k: n for k, n in sorted(found.items()) if n or k not in folders}


def _local_files(folder: str) -> Iterator[tuple[str, int]]:
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            try:
                length = os.lstat(path).st_size
            except FileNotFoundError:  # a file that another process was writing
                continue
            yield os.path.relpath(path, folder), length


def _objects(uri: str) -> Iterator[tuple[str, int]]:
    store, path = locate(uri)
    for batch in obstore.list(store, prefix=f"{path}/" if path else None):
        for meta in batch:
            yield meta["path"], meta["size"]


def write_json(uri: str, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    write_bytes(uri, text.encode() + b"\n")


def read_json(uri: str) -> Any:
    """Read a JSON file.

    Raises:
        FormatError: The file is not JSON.
    """
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise FormatError(f"{uri}: expected JSON, found {error}") from error


def write_csv(uri: str, table: pa.Table) -> None:
    """Write a CSV file atomically."""
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table, buffer)
    write_bytes(uri, buffer.getvalue())


def write_table(uri: str, table: pa.Table) -> None:
    """Write a parquet file atomically."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_bytes(uri, buffer.getvalue())


def read_table(uri: str) -> pa.Table:
    """Read a parquet file.

    Raises:
        FileNotFoundError: There is no such file.
        FormatError: The file is not parquet.
    """
    try:
        return pq.read_table(pa.BufferReader(read_bytes(uri)))
    except pa.ArrowInvalid as error:
        raise FormatError(f"{uri}: expected parquet, found {error}") from error
