"""Open OME-Zarr groups that record the digest of what is written through them."""

from __future__ import annotations

from typing import Any, Literal

import zarr
from zarr.abc.store import Store
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore, ObjectStore, WrapperStore

from medray.errors import FormatError, StoreError
from medray.storage import files, object_store
from medray.storage.digests import Digests, content_digest

Array = zarr.Array[Any]

GROUP = "zarr.json"


class _Writer(WrapperStore[Any]):
    """A store for whole shards that records their digests.

    A shard at the slide's border is only partly within its array, so zarr would read
    what is stored there and merge: one request more, and an error if that is damaged.
    Shards are always written whole, so here none is there to be read.
    """

    def __init__(self, store: Store, digests: Digests | None = None) -> None:
        super().__init__(store)
        self.digests: Digests = {} if digests is None else digests

    def _with_store(self, store: Store) -> _Writer:
        return _Writer(store, self.digests)

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Buffer | None:
        if _is_shard(key):
            return None
        return await super().get(key, *args, **kwargs)

    def get_sync(self, key: str, **kwargs: Any) -> Buffer | None:
        return None if _is_shard(key) else super().get_sync(key, **kwargs)

    async def set(self, key: str, value: Buffer) -> None:
        await super().set(key, value)
        self._note(key, value)

    def set_sync(self, key: str, value: Buffer) -> None:
        super().set_sync(key, value)
        self._note(key, value)

    async def delete(self, key: str) -> None:
        await super().delete(key)
        self.digests.pop(key, None)

    def delete_sync(self, key: str) -> None:
        super().delete_sync(key)
        self.digests.pop(key, None)

    def _note(self, key: str, value: Buffer) -> None:
        self.digests[key] = content_digest(value.to_bytes())


def _is_shard(key: str) -> bool:
    return "/c/" in key


def _store(uri: str, *, read_only: bool) -> dict[str, Any]:
    """Return the store and the path in it, as zarr's functions want them."""
    inner: Any
    if files.is_local(uri):
        inner, path = LocalStore(uri, read_only=read_only), ""
    else:
        store, path = object_store.locate(uri)
        inner = ObjectStore(store, read_only=read_only)
    return {"store": inner if read_only else _Writer(inner), "path": path}


def written_digests(group: zarr.Group, uri: str) -> Digests:
    """Return the digests of what was written through a group, by path below it."""
    store: Any = group.store
    start = len(group.path) + 1 if group.path else 0
    written = {key[start:]: digest for key, digest in store.digests.items()}
    for name in written:
        files.sync(files.join(uri, name))
    return written


def open_group(uri: str, *, mode: Literal["r", "r+"] = "r") -> zarr.Group:
    """Open an OME-Zarr group.

    Raises:
        FormatError: There is no zarr v3 group at `uri`.
        StoreError: It cannot be read.
    """
    try:
        with object_store.answered(uri):
            return zarr.open_group(
                **_store(uri, read_only=mode == "r"), mode=mode, zarr_format=3
            )
    except StoreError:
        raise
    except Exception as error:  # zarr raises what damaged metadata lead it to
        raise FormatError(f"{uri}: expected an OME-Zarr group ({error})") from error


def array_of(group: zarr.Group, level: int) -> Array:
    """Return the array of one level.

    Raises:
        FormatError: It is none.
    """
    array = group[str(level)]
    if not isinstance(array, zarr.Array):
        raise FormatError(f"{group.store_path}: level {level} is not an array")
    return array


def count_levels(group: zarr.Group) -> int:
    """Return how many levels the pyramid has."""
    ome: Any = group.attrs["ome"]
    return len(ome["multiscales"][0]["datasets"])
