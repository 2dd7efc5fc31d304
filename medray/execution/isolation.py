"""Calls in processes that a call may kill, for commands that work without Ray.

A damaged file that ends, hangs or bloats its decoder costs that one call; the next call
gets a new process. Run as a program this module is such a process.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from medray.errors import LostError
from medray.slides import bound_memory

_PR_SET_PDEATHSIG = 1  # linux/prctl.h; the parent is the thread of the call


class Isolated:
    """One process, started when it is needed, that answers calls one at a time."""

    def __init__(
        self, *, bounded: bool = True, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start nothing yet.

        Args:
            bounded: Let it allocate 4 GiB and no more.
            environment: Variables that it has besides those of this process.
        """
        self._bounded, self._environment = bounded, dict(environment or {})
        self._running: tuple[subprocess.Popen[bytes], Connection[Any, Any]] | None
        self._running = None
        self._lock, self._closed = threading.Lock(), False

    def call(self, function: Callable[[Any], Any], task: Any, limit_s: float) -> Any:
        """Return what `function(task)` returns there.

        Args:
            function: Of a module, so that it can be imported there. What it raises
                ends its process. It may be a generator, that yields as long as it
                waits for something, and returns the result.
            task: Its argument; argument and result are pickled.
            limit_s: Seconds that it may take, from one yield to the next; after them
                its process is ended.

        Raises:
            LostError: The process ended, or took too long.
        """
        with self._lock:
            if self._closed:
                raise LostError("was not started: the command ends")
            if self._running is None:
                self._running = _start(self._bounded, self._environment)
            process, pipe = self._running
        try:
            pipe.send((function, task))
            while pipe.poll(limit_s):
                if result := pipe.recv():
                    return result[0]
            how = f"took more than {limit_s:g} s"
        except (EOFError, OSError):
            code = process.wait()
            how = f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        self._end()
        raise LostError(how)

    def _end(self) -> None:
        with self._lock:
            running, self._running = self._running, None
        if running is not None:
            process, pipe = running
            process.kill()
            process.wait()
            pipe.close()

    def close(self) -> None:
        """End the process; from another thread too, while a call waits for it."""
        with self._lock:
            self._closed = True
        self._end()


def call_each(
    function: Callable[[Any], Any],
    tasks: Iterable[Any],
    *,
    processes: int,
    limit_s: float,
) -> Iterator[tuple[Any, Any]]:
    """Yield (task, result) as they come, in any order.

    A result is what `function(task)` returned in one of the processes, or a
    `LostError`. Arguments are those of `Isolated.call`.
    """
    workers = [Isolated() for _ in range(processes)]
    idle: queue.SimpleQueue[Isolated] = queue.SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def call(task: Any) -> Any:
        worker = idle.get()
        try:
            return worker.call(function, task, limit_s)
        except LostError as error:
            return error
        finally:
            idle.put(worker)

    with ThreadPoolExecutor(processes) as threads:
        try:
            futures = {threads.submit(call, task): task for task in tasks}
            for future in as_completed(futures):
                yield futures.pop(future), future.result()
        finally:  # Ctrl-C too: threads that wait see their process end
            threads.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.close()


def _start(
    bounded: bool, environment: Mapping[str, str]
) -> tuple[subprocess.Popen[bytes], Connection[Any, Any]]:
    ours, theirs = Pipe()
    # The same modules as here, not those of the current folder.
    path = os.pathsep.join(filter(None, sys.path))
    numbers = [str(theirs.fileno()), str(os.getpid()), str(int(bounded))]
    with theirs:
        # In a session of its own, so that Ctrl-C reaches the command alone.
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "medray.execution.isolation", *numbers],
            env=os.environ | environment | {"PYTHONPATH": path},
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
    return process, ours


def _serve(descriptor: int, parent: int, bounded: int) -> None:
    # However the command ends: while a decoder hangs nothing else would end it.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        return
    if bounded:
        bound_memory()
    with contextlib.suppress(EOFError), Connection(descriptor) as pipe:
        while True:
            function, task = pipe.recv()
            result = function(task)
            if isinstance(result, Generator):
                result = _result_of(result, pipe)
            pipe.send((result,))


def _result_of(steps: Generator[Any, None, Any], pipe: Connection[Any, Any]) -> Any:
    """Run a generator, and report with each step that it goes on."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        pipe.send(())


if __name__ == "__main__":
    _serve(*map(int, sys.argv[1:]))
