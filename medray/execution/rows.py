"""One function over rows of any kind, in processes that may die of a row.

For what is done with things that are no slides of a stage: images, sheets, copies.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from medray.errors import MedrayError, SlideError
from medray.slides import bound_memory
from medray.types import Executor


def map_rows[R](
    function: Callable[[R], Any],
    rows: Iterable[R],
    *,
    executor: Executor = "ray",
    device: bool = False,
    bounded: bool = False,
    timeout: float = 24 * 3600.0,
    batch: int = 1,
    check: Callable[[], None] = lambda: None,
) -> Iterator[tuple[R, Any]]:
    """Yield each row with what a function returns for it, in any order.

    A MedrayError or OSError that the function raises is yielded in place of a result,
    a MemoryError as a SlideError, and a LostError for a row at which three processes
    died or hung.

    Args:
        function: Of a module, so that Ray can send it; it is called in processes that
            stay, and may cache what all rows share.
        rows: What it is called with, one by one.
        executor: Where it runs.
        device: A process has a GPU, or where there is none most of a node's cores; else
            there is one a core.
        bounded: A process may allocate 4 GiB and no more, for files of strangers.
        timeout: Seconds that one row may take.
        batch: How many rows a process is given at once.
        check: Is called again and again; raises if it may not go on.

    Raises:
        MedrayError: The processes die, whatever they are given.
    """
    if executor == "local":
        for row in rows:
            check()
            yield row, _call(function, row)
        return
    import ray

    from medray.execution import cluster
    from medray.execution.actor_pool import Pool, poll
    from medray.execution.gpu_worker import gpu_worker_resources

    todo = deque(itertools.batched(rows, batch))
    if not todo:
        return
    cluster.connect()
    resources = gpu_worker_resources() if device else {"num_cpus": 0.75}
    most = cluster.gpu_workers() if device else _cpus()
    start = functools.partial(
        ray.remote(_RowWorker).options(**resources).remote, function, bounded
    )
    workers = max(1, min(most, len(todo)))
    with Pool(start, "work", workers, timeout=lambda _: timeout) as pool:
        while todo or pool.busy:
            check()
            while todo and pool.room > 0:
                pool.give([*todo.popleft()])
            for _, row, result in poll(pool):
                # Boxed, for the pool takes None to hand a row back.
                yield row, result if isinstance(result, Exception) else result[0]


def _cpus() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 1))


class _RowWorker:
    """Calls the function in a process that stays."""

    def __init__(self, function: Callable[[Any], Any], bounded: bool) -> None:
        if bounded:
            bound_memory()
        self._function = function

    def work(self, rows: list[Any]) -> Iterator[list[Any]]:
        """Yield the result of each row, in a tuple."""
        for row in rows:
            yield [(_call(self._function, row),)]


def _call(function: Callable[[Any], Any], row: Any) -> Any:
    try:
        return function(row)
    except (MedrayError, OSError) as error:
        return error
    except MemoryError as error:
        return SlideError(
            f"takes more memory than there is ({error or 'no more said'})"
        )
