"""Slides of object stores that OpenSlide reads, from copies on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medray.slides.cache import local_copy
from medray.slides.members import Member
from medray.slides.openslide import OpenSlideSlide
from medray.types import UInt8


class StagedSlide(OpenSlideSlide):
    """A slide of an object store, read from its local copy; see OpenSlideSlide.

    The copy is held while it is read, not while the slide is open: it may be removed
    to make room, and is made again by the next reading.
    """

    def __init__(self, uri: str, members: Sequence[Member]) -> None:
        """Copy the slide, if it is not there, and open the copy.

        Args:
            uri: Address of the slide.
            members: Its files.

        Raises:
            SlideError: It is larger than the cache, was replaced, or cannot be opened.
            StoreError: It cannot be copied.
        """
        self._members = members
        self._guard = threading.Lock()
        with local_copy(members) as path:
            super().__init__(uri, f"{path}")
            self._made = _made(path)

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> UInt8:
        """Read a rectangle; see medray.slides.base.Slide.read."""
        with self._held():
            return super().read(y, x, height, width, level)

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Hold the copy's lock; open it again if it was made again."""
        with local_copy(self._members) as path:
            with self._guard:
                made = _made(path)
                if made != self._made:
                    self._reopen()
                    self._made = made
            yield


def _made(path: Path) -> tuple[int, int]:
    """Return inode and change time, which distinguish a copy from one made later."""
    status = path.stat()
    return status.st_ino, status.st_ctime_ns
