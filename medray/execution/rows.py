"""Call one function for many rows, in worker processes.

A row that ends or hangs its process does not stop the others (`executor="local"` has no
such protection). For work that is not a stage of slides: images, contact sheets,
copies.
"""

from __future__ import annotations

import pickle
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

from medray.errors import MedrayError, SlideError
from medray.types import Executor


def map_rows[R](
    function: Callable[[R], Any],
    rows: Iterable[R],
    *,
    executor: Executor,
    device: bool = False,
    bounded: bool = False,
    timeout: float = 24 * 3600.0,
    check: Callable[[], None] = lambda: None,
) -> Iterator[tuple[R, Any]]:
    """Yield each row with the function's result for it, in any order.

    A MedrayError or OSError of the function is yielded instead of a result, a
    MemoryError as a SlideError; any other exception is a bug and is raised. A row whose
    process dies or hangs is tried again; the third time a LostError is yielded for it.

    Args:
        function: Function of a module, because it is pickled; may run more than once
            for a row. Processes are kept, so it may cache what all rows share.
        rows: Its arguments, one per call.
        executor: Where it runs, not `auto`.
        device: Give each process a GPU, or most of a node's cores if it has none; else
            there are two per core, so that one computes while another waits.
        bounded: Limit a process to 4 GiB of memory, for untrusted files. Not `local`.
        timeout: Timeout of one row, seconds. Not `local`.
        check: Called repeatedly in this process; raises to stop (a lock that is lost).

    Raises:
        MedrayError: Processes die whichever rows they are given.
    """
    if executor == "local":
        for row in rows:
            check()
            yield row, _call(function, row)
        return
    todo = deque(rows)
    if not todo:
        return
    with _start(function, len(todo), executor, device, bounded, timeout) as stream:
        while todo or stream.busy:
            check()
            if todo and (room := stream.room) > 0:
                stream.give([todo.popleft() for _ in range(min(room, len(todo)))])
            yield from stream.take()


def _start(
    function: Callable[[Any], Any],
    expected: int,
    executor: Executor,
    device: bool,
    bounded: bool,
    timeout: float,
) -> Any:
    """Start the processes; return their stream."""
    if executor == "processes":
        from medray.execution.processes import Processes

        return Processes(
            function,
            timeout=lambda _: timeout,
            bounded=bounded,
            processes=1 if device else None,
        )
    # Imported here: the other executors need no Ray, which takes seconds to load.
    from medray.execution import cluster
    from medray.execution.gpu_worker import gpu_worker_resources
    from medray.execution.stream import CORE, Stream

    cluster.connect()
    resources = gpu_worker_resources() if device else {"num_cpus": CORE}
    return Stream(
        function,
        num_cpus=resources["num_cpus"],
        num_gpus=resources.get("num_gpus", 0),
        timeout=lambda _: timeout,
        bounded=bounded,
        expected=expected,
    )


def steps_of(function: Callable[[Any], Any], row: Any) -> Generator[Any, None, Any]:
    """Return a row's result, or the error in its place, as a generator's value.

    If the function returns a generator, its yields are passed on; they say that the row
    makes progress.
    """
    try:
        result = function(row)
        if isinstance(result, Generator):
            result = yield from result
        return result
    except (MedrayError, OSError) as error:
        return error
    except MemoryError as error:
        said = f" ({error})" if str(error) else ""
        return SlideError(f"takes more memory than there is{said}")


def _call(function: Callable[[Any], Any], row: Any) -> Any:
    steps = steps_of(function, row)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def sendable(error: Exception, otherwise: type[Exception]) -> Exception:
    """Return the exception if it can be pickled, else one of a class that can be.

    A RuntimeError in its place stands for a bug: then the traceback, which pickling
    drops, is added as a note.
    """
    text = "".join(traceback.format_exception(error))
    try:
        if otherwise is RuntimeError:
            error.add_note(text)
        pickle.loads(pickle.dumps(error))
    except Exception:  # pickling runs code of its class, which may raise anything
        return otherwise(text if otherwise is RuntimeError else f"{error}")
    return error
