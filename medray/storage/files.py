"""Where bytes live: local paths and object stores (s3://, gs://, az://, memory://).

Every write is whole: a reader sees the old content or the new, never a part. Object
stores need no rename for that. Credentials come from where the provider's own tools
look for them (environment, web identity, instance role; ~/.aws with boto3 installed)
and are never written anywhere.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import Any

import obstore
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError

from medray.errors import FormatError, StoreError

PARTIAL = ".partial-"
"""How the names of files begin that are being written."""

# Half a minute of answers that say "later", or a minute without one.
_RETRY: Any = {"max_retries": 9, "retry_timeout": timedelta(seconds=90)}
_CLIENT: Any = {"timeout": timedelta(seconds=60), "connect_timeout": "10s"}
# Ranges of a file that lie closer together are fetched at once.
_GAP = 16 << 10
_BLOCK = 64 << 10
_PART, _PARTS = 16 << 20, 8
# What a file system of another machine answers that is out of reach.
_GONE = (errno.ENOTCONN, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN)
_AGAIN = "then run the same command again"


def is_local(uri: str) -> bool:
    """Tell a path of this machine from an address."""
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


def object_store(uri: str) -> tuple[Any, str]:
    """Return the obstore of an address's bucket, and the path in it.

    Raises:
        StoreError: There is no such kind of address, or a part of it cannot be.
    """
    scheme, _, rest = uri.partition("://")
    bucket, _, path = rest.partition("/")
    if scheme == "memory":
        bucket, path = "", rest
    path = path.strip("/")
    if any(part in (".", "..") for part in path.split("/")):
        raise StoreError(f"{uri}: an address has no parts . or ..")
    try:
        return _bucket(scheme, bucket), path
    except (BaseError, ValueError) as error:
        raise StoreError(
            f"{uri}: expected s3://, gs:// or az:// with a bucket ({_first(error)})"
        ) from error


@functools.lru_cache(maxsize=16)
def _bucket(scheme: str, bucket: str) -> Any:
    if scheme == "memory":
        return obstore.store.MemoryStore()
    options: dict[str, Any] = {}
    endpoint = os.environ.get("AWS_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT", ""))
    client = _CLIENT | {"allow_http": True} if endpoint[:5] == "http:" else _CLIENT
    if scheme == "s3" and "AWS_ACCESS_KEY_ID" not in os.environ and _has_profile():
        from obstore.auth.boto3 import Boto3CredentialProvider

        options["credential_provider"] = Boto3CredentialProvider()
    return obstore.store.from_url(
        f"{scheme}://{bucket}", retry_config=_RETRY, client_options=client, **options
    )


def _has_profile() -> bool:
    """Tell whether credentials lie in ~/.aws, which only boto3 can read."""
    folder = os.path.expanduser("~/.aws")
    return "AWS_PROFILE" in os.environ or any(
        os.path.exists(f"{folder}/{name}") for name in ("credentials", "config")
    )


@contextlib.contextmanager
def answered(uri: str, done: str = "read") -> Iterator[None]:
    """Turn what storage may answer into errors that say what to do.

    Args:
        uri: What is read or written; named in errors.
        done: What it cannot be, should that be so.

    Raises:
        FileNotFoundError: What was to be read is not there.
        StoreError: Anything else, when all retries are spent.
    """
    try:
        yield
    except (OSError, BaseError, ModuleNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and done == "read":
            raise FileNotFoundError(
                errno.ENOENT, "there is no such file", uri
            ) from error
        raise StoreError(
            f"{uri}: cannot be {done} ({_first(error)}); {_advice(error)}, {_AGAIN}"
        ) from error


def _first(error: BaseException) -> str:
    """Return what matters of an error: obstore's say much, over many lines."""
    text = str(error).split("\n\nDebug source")[0]
    return " ".join(text.split())[:300]


def _advice(error: BaseException) -> str:
    code = getattr(error, "errno", None)
    said = str(error)
    if isinstance(error, ModuleNotFoundError):
        return "pip install 'medray[s3]' to use ~/.aws"
    denied = isinstance(error, PermissionError | PermissionDeniedError)
    if denied or code == errno.EROFS or "Expired" in said:
        if code:
            return "give this user permission or choose another place"
        return "check the credentials in the environment and what they permit"
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "free space or choose another place"
    if code == errno.ENOTDIR:
        return "choose another place"
    return "see that it can be reached"


def is_of_one_file(error: StoreError) -> bool:
    """Tell an error that is about one file from one that is about its whole store."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return cause.errno not in _GONE
    return isinstance(cause, PermissionDeniedError)


def exists(uri: str) -> bool:
    """Tell whether a file or folder is there."""
    if is_local(uri):
        return os.path.exists(uri)
    store, path = object_store(uri)
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
        meta = obstore.head(*object_store(uri))
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
        store, path = object_store(folder)
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
        return int(obstore.head(*object_store(uri))["size"])


def read_bytes(uri: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: The file is there but cannot be read.
    """
    with answered(uri):
        if is_local(uri):
            return Path(uri).read_bytes()
        return bytes(obstore.get(*object_store(uri)).bytes())


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
        store, path = object_store(uri)
        fetched = obstore.get_ranges(
            store, path, starts=starts, lengths=lengths, coalesce=_GAP
        )
        return [bytes(part) for part in fetched]


def _part(file: Any, start: int, length: int) -> bytes:
    file.seek(start)
    return bytes(file.read(length))


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
    """Open a file to read it from place to place, in binary.

    Raises:
        FileNotFoundError: There is no such file.
        StoreError: It cannot be read.
    """
    with answered(uri):
        return open(uri, "rb") if is_local(uri) else _RemoteFile(uri)


def write_bytes(uri: str, data: bytes, *, new: bool = False) -> None:
    """Write a whole file atomically; parent folders are made.

    A local file is written beside its place, synced and renamed; an object store
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
        store, path = object_store(uri)
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
        store, path = object_store(uri)
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
        store, path = object_store(uri)
        prefix = f"{path}/" if path else None
        found = obstore.list_with_delimiter(store, prefix=prefix)
        paths = [meta["path"] for meta in found["objects"]]
        paths += found["common_prefixes"]
        return sorted({p.rstrip("/").rsplit("/", 1)[-1] for p in paths if p != path})


def is_folder(uri: str) -> bool:
    """Tell whether this is a folder, or what stands for one in an object store."""
    return os.path.isdir(uri) if is_local(uri) else bool(list_folder(uri))


def list_files(uri: str) -> dict[str, int]:
    """Return the files below a folder with their bytes, by their path in it.

    Raises:
        StoreError: It cannot be read.
    """
    with answered(uri):
        if is_local(uri):
            return dict(sorted(_local_files(uri)))
        start = len(object_store(uri)[1])
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
    store, path = object_store(uri)
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


def write_table(uri: str, table: pa.Table) -> None:
    """Write a parquet file atomically."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    write_bytes(uri, buffer.getvalue())


def write_csv(uri: str, table: pa.Table) -> None:
    """Write a CSV file atomically."""
    buffer = io.BytesIO()
    pyarrow.csv.write_csv(table, buffer)
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
