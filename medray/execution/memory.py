"""How much memory a run may need on a node, and whether it is there.

A bound is a sum of what may be held at once: reading ahead is limited by bytes, writing
behind by regions, and everything else is a fixed number of processes.

Ray is imported by what is about nodes alone.
"""

from __future__ import annotations

from medray.errors import ConfigError
from medray.execution.predicting import REGIONS, io_processes

_MIB = 1 << 20

AHEAD_BYTES = {False: 64 * _MIB, True: 512 * _MIB}
"""Bytes of pixels that a GPU worker without or with a GPU has read ahead of each
batch."""
UNWRITTEN = 12
"""Predicted regions of a GPU worker that may wait for their writer."""
BATCHES = 2
"""Batches of a GPU worker that are under way at once."""

GPU_WORKER_BYTES = 1500 * _MIB
"""Memory of a GPU worker whose model was not measured."""

# Memory of processes that were measured idle: Ray's own and the driver, a process that
# reads and writes, a planner.
_BASE_BYTES, _IO_WORKER_BYTES, _PLANNER_BYTES = 1200 * _MIB, 260 * _MIB, 400 * _MIB


def io_workers_of(gpu: bool) -> int:
    """Return how many processes read and write for a GPU worker.

    With a GPU: all of its share of the node's cores but what the GPU worker itself
    needs.
    """
    from medray.execution import cluster

    share = cluster.cpus_per_node() // max(1, cluster.gpus_per_node())
    return max(2, share - 2) if gpu else 1


def bounds_of(
    halo: int, written: int, canvas: int, worker_bytes: int = GPU_WORKER_BYTES
) -> tuple[int, int]:
    """Bound a node's memory, for any stage with a device.

    Args:
        halo: Bytes that are read of a region.
        written: Bytes that are written of it.
        canvas: Bytes that a GPU worker has of it while it is predicted.
        worker_bytes: Memory of a GPU worker's process with its models loaded and warm.

    Returns:
        Bytes of all processes with the object store, and of the object store alone.
    """
    from medray.execution import cluster

    gpus = cluster.gpus_per_node()
    gpu_workers = max(1, gpus)
    io_workers = gpu_workers * io_workers_of(gpus > 0)
    store = gpu_workers * (
        BATCHES * (AHEAD_BYTES[gpus > 0] + halo) + UNWRITTEN * written + halo
    )
    host = _BASE_BYTES + _PLANNER_BYTES + store
    host += io_workers * (_IO_WORKER_BYTES + 3 * halo + 3 * written)
    host += gpu_workers * (worker_bytes + 3 * canvas + UNWRITTEN * written)
    return host, store


def bound_in_processes(halo: int, written: int, canvas: int, device_bytes: int) -> int:
    """Bound the memory of a stage with a device in processes of this machine.

    Args:
        halo: Bytes that are read of a region.
        written: Bytes that are written of it.
        canvas: Bytes that the device's process has of it while it is predicted.
        device_bytes: Memory of that process with its models loaded and warm.
    """
    here = device_bytes + 3 * canvas + REGIONS * (halo + written)
    return here + io_processes() * (_IO_WORKER_BYTES + 3 * halo + 3 * written)


def check_budget(host_bytes: int, budget_bytes: int) -> None:
    """Raise an error if the memory bound exceeds the budget.

    Raises:
        ConfigError: More may be needed than there is.
    """
    if host_bytes > budget_bytes:
        raise ConfigError(
            f"memory: up to {host_bytes / 2**30:.1f} GiB may be needed on a node, Ray "
            f"has {budget_bytes / 2**30:.1f} GiB; choose a smaller --region (a "
            f"multiple of 512), do without --probabilities and --quality, or give the "
            f"container more memory"
        )
