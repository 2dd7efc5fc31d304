"""One function over rows of any kind, in processes that a row may kill.

For what is done with things that are no slides of a stage: images, sheets, copies.
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
            there are two per core, so that one works while another waits.
        bounded: A process may allocate 4 GiB and no more, for untrusted files.
        timeout: Seconds that one row may take.
        check: Is called again and again; raises if it may not go on.

    Raises:
        MedrayError: The processes die, whichever rows they get.
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
    """Return the stream of these rows."""
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
    """Return a row's result, or the error that stands for it, as a generator does.

    It yields as often as the function's own generator does, if it returns one.
    """
    try:
        result = function(row)
        if isinstance(result, Generator):
            result = yield from result
        return result
    except (MedrayError, OSError) as error:
        return error
    except MemoryError as error:
        return SlideError(
            f"takes more memory than there is ({error or 'no more said'})"
        )


def _call(function: Callable[[Any], Any], row: Any) -> Any:
    steps = steps_of(function, row)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def sendable(error: Exception, otherwise: type[Exception]) -> Exception:
    """Return an exception that can be pickled; of a bug its traceback is a note."""
    text = "".join(traceback.format_exception(error))
    try:
        if otherwise is RuntimeError:
            error.add_note(text)
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return otherwise(text if otherwise is RuntimeError else f"{error}")
    return error
