"""What a process does that reads and writes regions for a GPU worker; no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from medray.execution.failures import bound_memory
from medray.types import Row, UInt8


class RegionIO:
    """Both ways in a process that stays: its imports and its open slides remain."""

    def __init__(self) -> None:
        """Bound what a hostile file can make a decoder allocate."""
        bound_memory()

    def read(self, read: Callable[..., Any], row: Row) -> tuple[Row, UInt8 | None]:
        """Read a region as, for example, `read_region` does."""
        result: tuple[Row, UInt8 | None] = read(row)
        return result

    def write(self, write: Callable[..., Row], row: Row, layers: Row) -> Row:
        """Write a region's arrays as, for example, `write_region` does."""
        return write(row, layers)
