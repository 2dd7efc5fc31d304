"""Local copies of whole slides from object stores, for readers that need files.

OpenSlide reads files only. A slide of a bucket that it is to read is copied, all its
files, into a folder that all processes of this machine share:

    CACHE/KEY-BYTES/        a copy; it is complete if it is there
    CACHE/KEY-BYTES.new/    one that is being made, and the room that is taken for it
    CACHE/KEY-BYTES.lock    who uses, makes or removes it

KEY is made of the addresses, sizes and etags of the slide's files, so a slide that was
replaced is copied again. Readers hold a copy's lock together (flock, shared), and only
while they read; who makes or removes it has the lock alone. The system frees the locks
of a process that is killed, and what it left unfinished is removed by the next. What
was used longest ago is removed first.

One file, because all that makes, uses or removes a copy takes its lock in one order.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from medray.errors import ConfigError, MedrayError, SlideError, StoreError
from medray.slides import dicom_header
from medray.slides.base import NeedsOpenSlideError
from medray.slides.listing import SLIDE_SUFFIXES
from medray.slides.members import SEVERAL_FILES, Member, slide_members
from medray.slides.tiff import TiffSlide
from medray.storage import files, object_store, remote_files

log = logging.getLogger(__name__)

FOLDER_VARIABLE = "MEDRAY_SLIDE_CACHE"
"""Folder of the copies, on a disk of this machine."""
SIZE_VARIABLE = "MEDRAY_SLIDE_CACHE_GIB"
"""At most so many GiB of copies are kept."""
_DEFAULT_GIB = 50.0

_COPIED = (*SEVERAL_FILES, *dicom_header.SUFFIXES, ".bif")
_NO_TIFFS = (".zarr", ".png", ".jpeg", ".jpg", ".bmp")
_READERS = 16
_NEW, _LOCK, _GONE = ".new", ".lock", ".gone"
# For others to have read what takes up the room; a region is read in seconds.
_WAIT_S, _LOOK_S = 120.0, 0.2


def cache_folder() -> Path:
    """Return the folder of the copies: MEDRAY_SLIDE_CACHE, or ~/.cache/medray/slides.

    XDG_CACHE_HOME takes the place of ~/.cache.
    """
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named).expanduser()
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(caches) / "medray" / "slides"


def cache_bytes() -> int:
    """Return how many bytes the copies may take: MEDRAY_SLIDE_CACHE_GIB, or 50 GiB.

    Raises:
        ConfigError: It is no positive number.
    """
    said = os.environ.get(SIZE_VARIABLE) or _DEFAULT_GIB
    try:
        gib = float(said)
    except ValueError:
        gib = math.nan
    if not 0 < gib < math.inf:
        raise ConfigError(
            f"{SIZE_VARIABLE} is {said!r}, expected a positive number of GiB"
        )
    return int(gib * 2**30)


@contextlib.contextmanager
def local_copy(members: Sequence[Member]) -> Iterator[Path]:
    """Keep a copy of a slide's files on this machine, as long as the context lasts.

    Args:
        members: The files, by their addresses; the one to be opened first.

    Yields:
        Path of the first one's copy; the others lie to it as they lie in the store.

    Raises:
        SlideError: The slide is larger than the cache may become, or was replaced.
        StoreError: It cannot be read, or the cache's disk is full or not writable.
    """
    while True:
        for _ in copy_parts(members):
            pass
        entry = _entry(members)
        with _locked(entry, fcntl.LOCK_SH):
            if entry.is_dir():
                os.utime(_beside(entry, _LOCK))
                yield entry / _inside(members)[0]
                return


def copy_parts(members: Sequence[Member]) -> Iterator[None]:
    """Copy a slide's files if there is no copy yet, or wait for the process that does.

    Yields:
        Whenever there is more of it: as long as something comes it does not hang.

    Raises:
        SlideError: As `local_copy`.
        StoreError: As `local_copy`.
    """
    size, most = sum(member.size for member in members), cache_bytes()
    if size > most:
        raise SlideError(
            f"{members[0].uri}: its {len(members)} files have {_gib(size)}, the cache "
            f"of whole slides {cache_folder()} may have {_gib(most)}; set "
            f"{SIZE_VARIABLE} to a larger number"
        )
    entry, seen = _entry(members), -1
    while not entry.is_dir():
        with _locked(entry, fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
            if free and not entry.is_dir():
                yield from _make(entry, members, size, most)
                return
        there = _bytes_in(_beside(entry, _NEW))
        if there != seen:
            yield
        seen = there
        time.sleep(_LOOK_S)


def fetch(uri: str) -> Iterator[None]:
    """Copy a slide that is read from a local copy, part by part.

    For whoever has a limit of time for a slide: how long its copy takes depends on the
    line, and says nothing about the slide. What is wrong is left to its opening to say.

    Yields:
        As `copy_parts`.
    """
    with contextlib.suppress(MedrayError, OSError):
        yield from copy_parts(slide_members(uri))


def fetch_if_copied(
    uri: str, scene: int | None = None, plane: int | None = None
) -> Iterator[None]:
    """Do as `fetch` for any slide; the header of a TIFF says whether it is copied.

    Args:
        uri: Path or address.
        scene: As for medray.slides.open_slide.
        plane: As for medray.slides.open_slide.

    Yields:
        As `copy_parts`.
    """
    if files.is_local(uri):
        return
    if _is_copied(uri) or _needs_openslide(uri, scene, plane):
        yield from fetch(uri)


def _needs_openslide(uri: str, scene: int | None, plane: int | None) -> bool:
    """Return whether a TIFF is one that tifffile cannot put together."""
    if uri.lower().endswith(_NO_TIFFS):
        return False
    try:
        TiffSlide(uri, scene, plane).close()
    except NeedsOpenSlideError:
        return True
    except (MedrayError, OSError):
        pass
    return False


def _is_copied(uri: str) -> bool:
    """Return whether a slide of a store is read from a copy, judged by its name."""
    lower = uri.lower()
    return lower.endswith(_COPIED) or not lower.endswith(SLIDE_SUFFIXES)


def _entry(members: Sequence[Member]) -> Path:
    size = sum(member.size for member in members)
    return cache_folder() / f"{_key(members)}-{size}"


def _bytes_in(folder: Path) -> int:
    return sum(files.list_files(f"{folder}").values())


def copied_bytes(uris: Iterable[str]) -> tuple[int, int]:
    """Return how many of these slides will be copied, and their bytes together.

    By their names: a TIFF of an object store that only OpenSlide can put together
    shows when it is opened.
    """
    wanted = [uri for uri in uris if not files.is_local(uri) and _is_copied(uri)]
    with ThreadPoolExecutor(_READERS) as readers:
        sizes = [size for size in readers.map(_size, wanted) if size]
    return len(sizes), sum(sizes)


def _size(uri: str) -> int:
    """Return a slide's bytes; 0 if it cannot be opened, which planning reports."""
    try:
        return sum(member.size for member in slide_members(uri))
    except (MedrayError, OSError):
        return 0


def log_copies(uris: Iterable[str]) -> None:
    """Log what a run over these slides will copy, if anything.

    Raises:
        ConfigError: The bound of the cache is no positive number.
    """
    count, size = copied_bytes(uris)
    if count:
        log.info(
            "%d slides, %s, are copied whole from their store to the nodes that read "
            "them: to %s, at most %s on each node at once",
            count,
            _gib(size),
            cache_folder(),
            _gib(cache_bytes()),
        )


def _key(members: Sequence[Member]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for member in members:
        digest.update(f"{member.uri}\n{member.fingerprint}\n".encode())
    return digest.hexdigest()


def _inside(members: Sequence[Member]) -> list[str]:
    """Return where the files lie below the folder that is common to all."""
    folders = [PurePosixPath(member.uri).parent for member in members]
    common = os.path.commonpath(folders)
    return [f"{PurePosixPath(one.uri).relative_to(common)}" for one in members]


def _beside(entry: Path, end: str) -> Path:
    return entry.with_name(entry.name + end)


@contextlib.contextmanager
def _locked(entry: Path, how: int) -> Iterator[bool]:
    """Hold the lock of a copy; with LOCK_NB the context says whether it was free."""
    path = _beside(entry, _LOCK)
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise StoreError(
                f"{path.parent}: copies of slides cannot be written there ({error}); "
                f"name another folder in {FOLDER_VARIABLE}"
            ) from error
        try:
            try:
                fcntl.flock(handle, how)
            except BlockingIOError:
                yield False
                return
            # Who removed the copy removed its lock as well: then this guards nothing.
            if os.fstat(handle).st_nlink:
                yield True
                return
        finally:
            os.close(handle)


def _make(
    entry: Path, members: Sequence[Member], size: int, most: int
) -> Iterator[None]:
    """Copy the files, part by part; the caller has the lock alone."""
    new = _beside(entry, _NEW)
    _take_room(entry, members[0].uri, size, most)
    log.info("copying %s, %s, to %s", members[0].uri, _gib(size), entry.parent)
    start = time.perf_counter()
    try:
        for member, name in zip(members, _inside(members), strict=True):
            path = new / name
            with object_store.answered(f"{path}", "written"):
                path.parent.mkdir(parents=True, exist_ok=True)
            try:
                for _ in remote_files.download(member.uri, f"{path}"):
                    yield
                now = files.fingerprint(member.uri)
            except FileNotFoundError as error:
                raise SlideError(f"{member.uri}: is missing now ({error})") from error
            if now != member.fingerprint or path.stat().st_size != member.size:
                raise SlideError(
                    f"{member.uri}: changed while it was copied (size and etag were "
                    f"{member.fingerprint}, are {now}); run again when it is complete"
                )
        files.sync(f"{new}")
        new.rename(entry)
    except StoreError as error:
        if f"{new}" not in f"{error}":
            raise
        free = shutil.disk_usage(entry.parent).free
        raise StoreError(
            f"{error}; the slide has {_gib(size)}, the disk of {entry.parent} now "
            f"{_gib(free)} free, {FOLDER_VARIABLE} names another folder"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
    seconds = time.perf_counter() - start
    log.info("copied %s in %.1f s", members[0].uri, seconds)


def _take_room(entry: Path, uri: str, size: int, most: int) -> None:
    """Make room for a copy and reserve it, by making its folder.

    Raises:
        StoreError: Other copies are in use, or the disk is full.
    """
    root = entry.parent
    new = _beside(entry, _NEW)
    until = time.monotonic() + _WAIT_S
    while True:
        # One at a time, so that two do not take the same room.
        with _locked(root / "room", fcntl.LOCK_EX):
            shutil.rmtree(new, ignore_errors=True)  # of a process that was killed
            for gone in root.glob(f"*{_GONE}"):
                shutil.rmtree(gone, ignore_errors=True)
            taken, free = _taken(root), shutil.disk_usage(root).free
            for other in _oldest_first(root):
                if taken + size <= most and size <= free:
                    break
                _remove_unused(other)
                taken, free = _taken(root), shutil.disk_usage(root).free
            if taken + size <= most and size <= free:
                with object_store.answered(f"{new}", "written"):
                    new.mkdir()
                return
        if size > free and not taken:
            raise StoreError(
                f"{uri}: its copy needs {_gib(size)}, the disk of {root} has "
                f"{_gib(free)} free; free space, or name another folder in "
                f"{FOLDER_VARIABLE}"
            )
        if time.monotonic() > until:
            raise StoreError(
                f"{uri}: its copy needs {_gib(size)}; of {_gib(most)} that {root} may "
                f"have {_gib(taken)} were in use for {_WAIT_S:.0f} s, the disk has "
                f"{_gib(free)} free; set {SIZE_VARIABLE} to a larger number, or name "
                f"another folder in {FOLDER_VARIABLE}"
            )
        time.sleep(_LOOK_S)


def _entries(root: Path) -> list[Path]:
    """Return the copies that are there or being made."""
    found = {
        path.with_name(path.name.removesuffix(_NEW))
        for path in root.iterdir()
        if path.name.removesuffix(_NEW).rpartition("-")[2].isdigit() and path.is_dir()
    }
    return sorted(found)


def _taken(root: Path) -> int:
    return sum(int(entry.name.rpartition("-")[2]) for entry in _entries(root))


def _oldest_first(root: Path) -> list[Path]:
    """Return the copies, the least recently used first."""

    def used(entry: Path) -> float:
        try:
            return _beside(entry, _LOCK).stat().st_mtime
        except FileNotFoundError:  # somebody removed the lock
            return 0.0

    return sorted(_entries(root), key=used)


def _remove_unused(entry: Path) -> None:
    """Remove a copy, whole or not at all, unless another process holds its lock."""
    with _locked(entry, fcntl.LOCK_EX | fcntl.LOCK_NB) as free:
        if not free:
            return
        gone = _beside(entry, _GONE)
        for path in (entry, _beside(entry, _NEW)):
            with contextlib.suppress(FileNotFoundError):
                path.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
        log.info("removed %s, which was used longest ago", entry)
        _beside(entry, _LOCK).unlink(missing_ok=True)


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"
