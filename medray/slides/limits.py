"""Memory limits for processes that decode untrusted files."""

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
    """Limit the memory that this process may allocate, to what it held plus 4 GiB.

    Beyond it a decoder fails with MemoryError or dies: alone, not with the processes
    that the system or Ray would end to save the node.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _limit(os.getpid())
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


@functools.cache
def _limit(_: int) -> int:
    """Return a process' limit in bytes: what it held at the first call, plus 4 GiB."""
    status = Path("/proc/self/status").read_text()
    held = int(re.findall(r"VmData:\s+(\d+) kB", status)[0]) << 10
    return held + _MOST_BYTES


def too_large(uri: str, error: MemoryError) -> str:
    """Return the message that decoding a slide takes more memory than allowed."""
    return (
        f"{uri}: quarantined: decoding it takes more than "
        f"{_MOST_BYTES >> 30} GiB ({error or 'out of memory'}); the file is damaged, "
        f"or should be saved as a tiled TIFF"
    )
