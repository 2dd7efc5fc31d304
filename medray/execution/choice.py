"""Where a stage runs by default: on Ray, or without it where that is sooner."""

from __future__ import annotations

import glob
import logging
import os
import sys
from collections.abc import Collection

from medray.errors import MedrayError
from medray.storage import files
from medray.types import Executor

log = logging.getLogger(__name__)

# Bytes of slides. Ray's start and end take 15 s and more; two cores ingest so much of
# compressed slides in about that time, and are no slower at more of it.
_LITTLE = 256 << 20
_ASKED = 100  # files of a store whose sizes are asked for, one by one


def settle_executor(executor: Executor, uris: Collection[str]) -> Executor:
    """Return where work is done; `auto` is resolved.

    It becomes Ray where a cluster is named (RAY_ADDRESS) or joined, this machine has
    several GPUs, or the files have more than 256 MiB; else processes of this machine.

    Args:
        executor: What was asked for.
        uris: Files that the work is about.
    """
    if executor != "auto":
        return executor
    if _has_cluster() or len(glob.glob("/dev/nvidia[0-9]*")) > 1:
        return "ray"
    size = _size(uris)
    if size is None or size > _LITTLE:
        return "ray"
    log.info("%.1f MB: in processes here, without Ray (--executor ray)", size / 1e6)
    return "processes"


def _has_cluster() -> bool:
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        return True
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _size(uris: Collection[str]) -> int | None:
    """Return the bytes of files, without those that are gone; None: not known."""
    if len(uris) > _ASKED and not all(map(files.is_local, uris)):
        return None
    size = 0
    for uri in uris:
        try:
            size += _size_of(uri)
        except FileNotFoundError:
            continue
        except (MedrayError, OSError):
            return None
        if size > _LITTLE:
            break
    return size


def _size_of(uri: str) -> int:
    if files.is_folder(uri):
        return sum(files.list_files(uri).values())
    size = files.size(uri)
    if uri.lower().endswith(".mrxs"):  # its pixels lie next to it
        return size + _size_of(os.path.splitext(uri)[0])
    return size
