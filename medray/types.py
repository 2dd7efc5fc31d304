"""Types that every room uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Row = dict[str, Any]
"""A row of a table, or what becomes one."""
type Cell = str | int | float | bool | Sequence[Cell] | None
Columns = dict[str, Cell]
"""The values of a row that is written to a table, by column."""
Executor = Literal["auto", "ray", "processes", "local"]
"""On a Ray cluster; in processes of this machine, without Ray; in this process, one
thing after the other. `auto` is settled by `execution`."""
Layers = dict[str, npt.NDArray[Any]]
"""Arrays that are written of a region, by name."""
UInt8 = npt.NDArray[np.uint8]
"""Pixels, labels or parts of them; the shape stands where it is used."""
