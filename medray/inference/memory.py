"""How much memory a run may need on a node."""

from __future__ import annotations

import logging

from medray.execution import cluster, memory
from medray.inference.run import RunSettings

log = logging.getLogger(__name__)


def kept_layers(settings: RunSettings) -> int:
    """Return how many bytes a run stores of each pixel of level 0, uncompressed."""
    channels = len(settings.classes) if settings.options.prediction.probabilities else 0
    return 1 + channels + len(settings.layers)


def bounds(
    settings: RunSettings, worker_bytes: int = memory.GPU_WORKER_BYTES
) -> tuple[int, int]:
    """Bound a node's memory.

    Args:
        settings: Of the run.
        worker_bytes: Memory of a GPU worker's process with its models loaded and warm.

    Returns:
        Bytes of all processes with the object store, and of the object store alone.
    """
    pixels = settings.options.region**2
    how = settings.options.prediction
    # Scores are float32 on the device; on a CPU that is the host.
    scored = how.probabilities or how.quality or how.stitch == "blend"
    canvas = pixels * (3 + 1 + 4 * len(settings.classes) * scored)
    halo = 3 * (settings.options.region + 2 * settings.windows.size) ** 2
    return memory.bounds_of(halo, kept_layers(settings) * pixels, canvas, worker_bytes)


def check_memory(settings: RunSettings) -> None:
    """Check that a run's memory is there, and log how much it may be.

    Raises:
        ConfigError: A node of the cluster has less.
    """
    most, there = bounds(settings)[0], cluster.memory_per_node()
    memory.check_budget(most, there)
    log.info(
        "%d GPU workers, regions of %d px, at most %.1f of %.1f GiB of memory a node",
        cluster.gpu_workers(),
        settings.options.region,
        most / 2**30,
        there / 2**30,
    )
