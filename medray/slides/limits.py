"""How processes that decode files of strangers keep a file's faults to themselves."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path

# A field of PNG or JPEG, read whole, needs as much; a region far less.
_MOST_BYTES = 4 << 30


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Bound what this process may allocate, for a while; see `bound_memory`."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    bound_memory()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def bound_memory() -> None:
    """Let this process allocate so much and no more.

    Beyond it a decoder fails with MemoryError or dies: alone, not with whatever the
    system or Ray would end to save the node.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _limit(os.getpid())
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


@functools.cache
def _limit(_: int) -> int:
    """Return the limit of a process: what it held when it was first asked, and more."""
    status = Path("/proc/self/status").read_text()
    held = int(re.findall(r"VmData:\s+(\d+) kB", status)[0]) << 10
    return held + _MOST_BYTES


def too_large(uri: str, error: MemoryError) -> str:
    """Say that decoding a slide wants more memory than a process may have."""
    return (
        f"{uri}: quarantined: decoding it takes more than "
        f"{_MOST_BYTES >> 30} GiB ({error or 'out of memory'}); the file is damaged, "
        f"or should be saved as a tiled TIFF"
    )
