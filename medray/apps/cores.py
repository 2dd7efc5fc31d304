"""How long work takes on the cores of this machine."""

from __future__ import annotations

import os

from medray.types import Executor

# Of the cores' time the share that is work; the rest is for tables, for handing out,
# and for the cores that wait at the end.
_EFFICIENCY = (0.4, 1.0)
_START_S = 25.0  # of Ray at most


def cores_of(executor: Executor) -> int:
    """Return how many cores of this machine work."""
    return 1 if executor == "local" else len(os.sched_getaffinity(0))


def span_of(
    work: tuple[float, float], cores: int, executor: Executor
) -> tuple[float, float]:
    """Return the least and most seconds that work takes.

    Args:
        work: Least and most seconds on one core; 0: there is nothing to do.
        cores: That work.
        executor: Where.
    """
    least, most = (seconds / cores for seconds in work)
    start = _START_S if executor == "ray" and most else 0.0
    return least / _EFFICIENCY[1], most / _EFFICIENCY[0] + start
