"""One writer at a time: a folder's lock, which names its owner.

    FOLDER/lock.json    who works in it: what, where, since when

On a disk the operating system holds the lock (flock), so that the lock of a process
that died is free at once. In an object store the owner rewrites the object every few
seconds; whoever sees it unchanged for long enough takes it over, by a conditional write
that only one can win.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from medray.errors import ConfigError, MedrayError
from medray.storage import files, object_store

log = logging.getLogger(__name__)

_BEAT_S, _LEASE_S = 5.0, 30.0


@contextlib.contextmanager
def locked(folder: str, what: str) -> Iterator[Callable[[], None]]:
    """Hold the lock of a folder, as long as the context lasts.

    Args:
        folder: Of a run, a dataset or a model; made if needed.
        what: What is done in it; shown to whoever comes second.

    Yields:
        A function that raises MedrayError when the lock was lost: when this process
        stood still for so long that it was taken for dead.

    Raises:
        ConfigError: Another process works there.
        StoreError: The folder cannot be written.
    """
    uri = files.join(folder, "lock.json")
    owner = {
        "what": what,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    held = _held_on_disk if files.is_local(uri) else _held_in_store
    with held(uri, owner) as check:
        yield check


def _refusal(uri: str, text: bytes) -> ConfigError:
    try:
        by = json.loads(text)
        who = f"`medray {by['what']}`, process {by['process']} on {by['host']}, since "
        who += by["since"]
    except (ValueError, KeyError, TypeError):
        who = "another process"
    return ConfigError(
        f"{uri.rpartition('/')[0]}: in use by {who}; wait until it ends, or stop it, "
        f"or choose another --out"
    )


# --- on a disk ------------------------------------------------------------------------


@contextlib.contextmanager
def _held_on_disk(path: str, owner: dict[str, Any]) -> Iterator[Callable[[], None]]:
    handle = _take_on_disk(path)
    try:
        os.truncate(handle, 0)
        os.write(handle, json.dumps(owner).encode())
        yield lambda: None
    finally:
        # Removed while it is held: whoever waits for it sees that it has gone.
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(handle)


def _take_on_disk(path: str) -> int:
    while True:
        with object_store.answered(path, "written"):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                return handle
        except BlockingIOError:
            raise _refusal(path, os.pread(handle, 4096, 0)) from None
        except OSError as error:
            log.warning(
                "%s: this disk has no locks (%s); going on without", path, error
            )
            return handle
        os.close(handle)  # the owner before had just removed it


def _is_at(handle: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


# --- in an object store ---------------------------------------------------------------


@contextlib.contextmanager
def _held_in_store(uri: str, owner: dict[str, Any]) -> Iterator[Callable[[], None]]:
    store, path = object_store.locate(uri)
    beat = 0
    with object_store.answered(uri, "written"):
        tag = _take_in_store(uri, store, path, owner)
    stop, lost = threading.Event(), threading.Event()

    def keep() -> None:
        nonlocal tag, beat
        alive = time.monotonic()
        while not stop.wait(_BEAT_S):
            beat += 1
            try:
                tag = _put(store, path, owner | {"beat": beat}, tag)
                alive = time.monotonic()
            except PreconditionError:
                lost.set()
                return
            except Exception as error:  # the store may answer again
                log.debug("%s: %s", uri, error)
            if time.monotonic() - alive > _LEASE_S:
                lost.set()
                return

    def check() -> None:
        if lost.is_set():
            raise MedrayError(
                f"{uri}: the lock was lost, for it could not be renewed in "
                f"{_LEASE_S:.0f} s; run the same command again"
            )

    keeper = threading.Thread(target=keep, name="lock", daemon=True)
    keeper.start()
    try:
        yield check
    finally:
        stop.set()
        keeper.join()
        if not lost.is_set():
            with contextlib.suppress(Exception):  # then it is taken over in its time
                obstore.delete(store, path)


def _put(store: Any, path: str, value: dict[str, Any], tag: str | None) -> str:
    """Write the lock if it is as it was last seen (None: absent); return its tag."""
    mode: Any = "create" if tag is None else {"e_tag": tag}
    result = obstore.put(store, path, json.dumps(value).encode(), mode=mode)
    return str(result["e_tag"])


def _take_in_store(uri: str, store: Any, path: str, owner: dict[str, Any]) -> str:
    try:
        return _put(store, path, owner, None)
    except AlreadyExistsError:
        pass
    seen, text = _look(store, path)
    if seen is not None:
        said = _refusal(uri, text)
        log.info("%s: looking for %.0f s whether it lives", said, _LEASE_S)
        deadline = time.monotonic() + _LEASE_S
        while time.monotonic() < deadline:
            time.sleep(_BEAT_S / 2)
            tag, text = _look(store, path)
            if tag is None:
                break
            if tag != seen:
                raise _refusal(uri, text)
        else:
            log.warning("%s: its owner is dead; taken over", uri)
            tag = seen
        seen = tag
    try:
        return _put(store, path, owner, seen)
    except (AlreadyExistsError, PreconditionError):
        raise _refusal(uri, _look(store, path)[1]) from None


def _look(store: Any, path: str) -> tuple[str | None, bytes]:
    try:
        found = obstore.get(store, path)
        return str(found.meta["e_tag"]), bytes(found.bytes())
    except FileNotFoundError:
        return None, b""
