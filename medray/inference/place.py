"""Where a run would be: how fast it predicts there, and what memory there is.

Measured on one of the cluster's own GPU workers, or in this process.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass

from medray.errors import ConfigError
from medray.execution import map_rows
from medray.inference.memory import (
    bound_here,
    bound_in_processes,
    bounds,
    memory_limit,
)
from medray.inference.run import RunSettings
from medray.types import Executor

# Of the GPU worker's time the forward alone; the rest is in benchmarks/RESULTS.md.
_EFFICIENCY = (0.75, 0.95)
# In this process a region is read, predicted and written one after the other.
_EFFICIENCY_HERE = (0.3, 0.95)
# Seconds from the command to the first region, and from the last to the end.
_START_S, _START_HERE_S = 25.0, 10.0


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a run would be.

    Attributes:
        gpu_workers: Devices that predict.
        window_s: Seconds of one for a window, measured several times.
        efficiency: Least and most share of its time in which it predicts.
        start_s: Seconds from the command to the first region, and from the last to the
            end.
        host_bytes: Bound on the memory that the run needs on a node.
        store_bytes: Of it the object store; 0 without Ray.
        budget_bytes: Memory that there is.
        device_bytes: Peak of a GPU's memory; 0 without.
    """

    gpu_workers: int
    window_s: tuple[float, ...]
    efficiency: tuple[float, float]
    start_s: float
    host_bytes: int
    store_bytes: int
    budget_bytes: int
    device_bytes: int


def measure_place(settings: RunSettings, executor: Executor) -> Place:
    """Return where the run would be, measured when nothing else needs the cores.

    Raises:
        MedrayError: The models cannot be loaded.
    """
    if executor != "ray":
        here = _measure(settings, os.cpu_count() or 1)
        alone = executor == "local"
        bound = bound_here if alone else bound_in_processes
        return Place(
            gpu_workers=1,
            window_s=here.window_s,
            efficiency=_EFFICIENCY_HERE if alone else _EFFICIENCY,
            start_s=_START_HERE_S,
            host_bytes=bound(settings, here.host_bytes),
            store_bytes=0,
            budget_bytes=memory_limit(),
            device_bytes=here.device_bytes,
        )
    # Imported here: the other executor needs no Ray.
    from medray.execution import cluster

    cluster.connect()
    measure = functools.partial(_measure, threads=cluster.cpus_per_node())
    ((_, there),) = map_rows(
        measure, [settings], executor="ray", device=True, timeout=1800
    )
    if isinstance(there, Exception):
        raise there
    host, store = bounds(settings, there.host_bytes)
    return Place(
        gpu_workers=cluster.gpu_workers(),
        window_s=there.window_s,
        efficiency=_EFFICIENCY,
        start_s=_START_S,
        host_bytes=host,
        store_bytes=store,
        budget_bytes=cluster.memory_per_node(),
        device_bytes=there.device_bytes,
    )


def check_budget(place: Place, executor: Executor) -> None:
    """Refuse a run that does not fit.

    Raises:
        ConfigError: More memory may be needed than there is.
    """
    most, there = place.host_bytes, place.budget_bytes
    if executor == "ray":
        from medray.execution import memory

        memory.check_budget(most, there)
    elif most > there:
        raise ConfigError(
            f"memory: up to {most / 2**30:.1f} GiB may be needed, there are "
            f"{there / 2**30:.1f} GiB; choose a smaller --region (a multiple of 512), "
            f"or do without --probabilities and --quality"
        )


@dataclass(frozen=True)
class _Measured:
    """What a process with the models loaded takes.

    Attributes:
        window_s: Seconds for a window, measured several times.
        host_bytes: Most memory that it had.
        device_bytes: Most of a GPU's memory; 0 without.
    """

    window_s: tuple[float, ...]
    host_bytes: int
    device_bytes: int


def _measure(settings: RunSettings, threads: int) -> _Measured:
    """Load the models as a GPU worker does, and time their windows for some seconds."""
    import resource

    from medray.models import Predictor

    predictor = Predictor.from_folders(
        settings.models, settings.options.prediction, threads=threads
    )
    predictor.warm_up()
    each = []
    for _ in range(5):
        start, windows = time.perf_counter(), 0
        while time.perf_counter() - start < 1.0:
            windows += predictor.time_batches()
        each.append((time.perf_counter() - start) / windows)
    return _Measured(
        window_s=tuple(each),
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        device_bytes=predictor.device_bytes,
    )
