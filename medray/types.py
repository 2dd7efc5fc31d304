"""Types that every room uses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Row = dict[str, Any]
"""A row of a table, or what becomes one."""
UInt8 = npt.NDArray[np.uint8]
"""Pixels, labels or parts of them; the shape stands where it is used."""
