"""What a process does that reads and writes regions for a GPU worker; no torch."""

from __future__ import annotations

from typing import Any

from medray.execution.stage import (
    AnyRegion,
    AnyStage,
    Outcome,
    Timing,
    read_region,
    write_region,
)
from medray.execution.tasks import Failure
from medray.slides import bound_memory
from medray.types import Layers


class RegionIO:
    """Reads and writes regions in a long-lived process, which keeps its slides open."""

    def __init__(self, stage: AnyStage) -> None:
        """Bound the memory that a decoder can allocate, for untrusted files."""
        bound_memory()
        self._stage = stage

    def read(self, task: AnyRegion) -> tuple[Any, Layers | None]:
        """Return what was seen of a region and its arrays, or (Failure, None)."""
        read = read_region(self._stage, task)
        return (read, None) if isinstance(read, Failure) else read

    def write(
        self, task: AnyRegion, seen: Any, layers: Layers, timing: Timing | None
    ) -> Outcome:
        """Write a region's arrays."""
        return write_region(self._stage, task, seen, layers, timing)
