"""What a process does that reads and writes regions for a GPU worker; no torch."""

from __future__ import annotations

from typing import Any

from medray.execution.stage import Stage, read_region, write_region
from medray.slides import bound_memory
from medray.types import Layers, Row


class RegionIO:
    """Both ways in a process that stays: its imports and its open slides remain."""

    def __init__(self, stage: Stage) -> None:
        """Bound what a hostile file can make a decoder allocate."""
        bound_memory()
        self._stage = stage

    def read(self, row: Row) -> tuple[Row, Any]:
        """Read a region."""
        return read_region(self._stage, row)

    def write(self, row: Row, layers: Layers) -> Row:
        """Write a region's arrays."""
        return write_region(self._stage, row, layers)
