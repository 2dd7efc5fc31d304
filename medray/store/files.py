"""Where bytes live: local paths and fsspec addresses (s3://, gs://, memory://).

Every write is atomic: a reader sees the old content or the new, never a part.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from medray.errors import FormatError, StoreError


def is_local(uri: str) -> bool:
    """Tell a path of this machine from an fsspec address."""
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
    """Tell whether a file or folder is there."""
    if is_local(uri):
        return os.path.exists(uri)
    fs, path = fsspec.url_to_fs(uri)
    return bool(fs.exists(path))


def read_bytes(uri: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: The file is there but cannot be read.
    """
    try:
        if is_local(uri):
            return Path(uri).read_bytes()
        with fsspec.open(uri, "rb") as file:
            return bytes(file.read())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"{uri}: cannot be read ({error})") from error


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file atomically; parent folders are made.

    A local file is written beside its place, synced and renamed; an object store
    shows an object only when it is complete.

    Raises:
        StoreError: The place cannot be written (full, read-only, no permission).
    """
    try:
        if not is_local(uri):
            fs, path = fsspec.url_to_fs(uri)
            fs.pipe_file(path, data)
            return
        folder = os.path.dirname(uri)
        os.makedirs(folder, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=folder, prefix=".partial-")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(partial, 0o644)
            os.replace(partial, uri)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise StoreError(
            f"{uri}: cannot be written ({error}); free space or choose another place, "
            f"then run the same command again"
        ) from error


def remove(uri: str) -> None:
    """Remove a file or a folder with all that is in it; absent is fine."""
    if is_local(uri):
        if os.path.isdir(uri) and not os.path.islink(uri):
            shutil.rmtree(uri, ignore_errors=True)
        elif os.path.lexists(uri):
            os.unlink(uri)
        return
    fs, path = fsspec.url_to_fs(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def list_folder(uri: str) -> list[str]:
    """Give the names in a folder, sorted; an absent folder is empty."""
    if is_local(uri):
        return sorted(os.listdir(uri)) if os.path.isdir(uri) else []
    fs, path = fsspec.url_to_fs(uri)
    fs.invalidate_cache(path)
    if not fs.exists(path):
        return []
    names = (str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(path, False))
    return sorted(names)


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
