"""How much memory a run may need on a node, or in one process without Ray.

Ray is imported by what is about nodes alone.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path

from medray.inference.run import RunSettings

log = logging.getLogger(__name__)


def kept_layers(settings: RunSettings) -> int:
    """Return how many bytes a run stores of each pixel of level 0, uncompressed."""
    channels = len(settings.classes) if settings.options.prediction.probabilities else 0
    return 1 + channels + len(settings.layers)


@dataclass(frozen=True)
class RegionBytes:
    """Memory of a region.

    Attributes:
        halo: Of what is read of it.
        written: Of what is stored of it.
        canvas: Of what there is of it while it is predicted.
    """

    halo: int
    written: int
    canvas: int


def _region_bytes(settings: RunSettings) -> RegionBytes:
    pixels = settings.options.region**2
    how = settings.options.prediction
    size, stride = settings.windows.size, settings.windows.stride
    # What whole windows show, stacked until they are laid side by side; scores that are
    # summed are float32. On a CPU the device is the host.
    stacked = size * math.ceil((settings.options.region + 2 * size) / stride)
    kept = kept_layers(settings)
    canvas = 3 * pixels + kept * (pixels + stacked**2)
    if how.stitch == "blend":
        canvas += 4 * len(settings.classes) * pixels
    return RegionBytes(
        halo=3 * (settings.options.region + 2 * size) ** 2,
        written=kept * pixels,
        canvas=canvas,
    )


def bounds(settings: RunSettings, worker_bytes: int | None = None) -> tuple[int, int]:
    """Bound a node's memory.

    Args:
        settings: Of the run.
        worker_bytes: Memory of a GPU worker's process with its models loaded and warm;
            None: it was not measured.

    Returns:
        Bytes of all processes with the object store, and of the object store alone.
    """
    from medray.execution import memory

    one = _region_bytes(settings)
    worker_bytes = worker_bytes or memory.GPU_WORKER_BYTES
    return memory.bounds_of(one.halo, one.written, one.canvas, worker_bytes)


def bound_here(settings: RunSettings, process_bytes: int) -> int:
    """Bound the memory of a run in this process, which has one region at a time.

    Args:
        settings: Of the run.
        process_bytes: Memory of the process with its models loaded and warm.
    """
    one = _region_bytes(settings)
    return process_bytes + 3 * (one.halo + one.written + one.canvas)


def bound_in_processes(settings: RunSettings, process_bytes: int) -> int:
    """Bound the memory of a run in processes of this machine.

    Args:
        settings: Of the run.
        process_bytes: Memory of the process with its models loaded and warm.
    """
    from medray.execution import memory

    one = _region_bytes(settings)
    return memory.bound_in_processes(one.halo, one.written, one.canvas, process_bytes)


def memory_limit() -> int:
    """Return the bytes that processes here may use: the container's limit, or all."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total


def check_memory(settings: RunSettings) -> None:
    """Check that a run's memory is there, and log how much it may be.

    Raises:
        ConfigError: A node of the cluster has less.
    """
    from medray.execution import cluster, memory

    most, there = bounds(settings)[0], cluster.memory_per_node()
    memory.check_budget(most, there)
    log.info(
        "%d GPU workers, regions of %d px, at most %.1f of %.1f GiB of memory a node",
        cluster.gpu_workers(),
        settings.options.region,
        most / 2**30,
        there / 2**30,
    )
