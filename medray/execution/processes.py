"""Rows in processes of this machine, without Ray: for work that is not worth its start.

A row that ends its process, or hangs, costs that row alone: the next one gets a new
process. See `medray.execution.stream.Stream`, which does the same on a cluster.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Self

from medray.errors import LostError, MedrayError, SlideError
from medray.execution.isolation import Isolated
from medray.execution.rows import sendable, steps_of
from medray.execution.tries import Tries, Verdict

_AHEAD = 4  # rows for each process that wait or are in progress
_PAUSE_S = 0.2  # before a row is tried again that another one has to precede


class Processes:
    """Rows that are given as they become known, and their results as they come.

    A process is started when a row waits and none is free, and stays.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        timeout: Callable[[Any], float],
        bounded: bool = True,
        processes: int | None = None,
        group: Callable[[Any], str] = lambda _: "",
    ) -> None:
        """Start nothing yet; arguments are those of `Stream`.

        Args:
            function: Of a module, so that it can be imported by a process.
            timeout: Seconds that a row may take, or go on without a yield.
            bounded: A process may allocate 4 GiB and no more, for untrusted files.
            processes: At most; None: one for each core.
            group: Names the group of a row.
        """
        self._function = pickle.dumps(function)
        self._timeout, self._bounded, self._group = timeout, bounded, group
        self.places = processes or len(os.sched_getaffinity(0))
        self._news = threading.Condition()
        self._waiting: deque[int] = deque()
        self._rows: dict[int, Any] = {}  # that have no result yet
        self._numbers = self._idle = 0
        self._tries = Tries()
        self._threads: list[threading.Thread] = []
        self._isolated: list[Isolated] = []
        self._closed = self._stopped = False
        self._error: Exception | None = None
        self._arrived: queue.SimpleQueue[tuple[int, _Done]] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes, with the rows in progress."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        for isolated in self._isolated:
            isolated.close()
        for thread in self._threads:
            thread.join()

    @property
    def busy(self) -> bool:
        """Whether rows are under way, or an error is to be raised by `take`."""
        return bool(self._rows) or self._error is not None

    @property
    def room(self) -> int:
        """How many more rows keep the processes busy; more rows only wait."""
        return _AHEAD * self.places - len(self._rows)

    def give(self, rows: list[Any]) -> None:
        """Queue rows, which are begun in this order."""
        with self._news:
            for row in rows:
                self._rows[self._numbers] = row
                self._waiting.append(self._numbers)
                self._numbers += 1
            wanted = len(self._waiting) - self._idle
            for _ in range(min(wanted, self.places - len(self._threads))):
                # Each has a process, which ends with it (`Isolated`).
                self._isolated.append(Isolated(bounded=self._bounded))
                thread = threading.Thread(
                    target=self._serve, args=(self._isolated[-1],), daemon=True
                )
                self._threads.append(thread)
                thread.start()
            self._news.notify_all()

    def stop(self) -> None:
        """Begin no other row: `busy` ends once the rows in progress are done."""
        self.withdraw()

    def withdraw(self) -> list[Any]:
        """Take back the rows that have not begun, and return them."""
        with self._news:
            rows = [self._rows.pop(number) for number in self._waiting]
            self._waiting.clear()
            self._stopped = True
            return rows

    def tell(self, row: Any, result: Any = None) -> None:
        """Have `take` return a row that was done elsewhere; safe from any thread."""
        self._arrived.put((self._keep(row), _Done(result)))

    def fail(self, error: Exception) -> None:
        """Have `take` raise an error; safe from any thread."""
        self._arrived.put((self._keep(None), _Done(bug=error)))

    def _keep(self, row: Any) -> int:
        with self._news:
            self._numbers += 1
            self._rows[self._numbers - 1] = row
            return self._numbers - 1

    def take(self, seconds: float = 1.0) -> list[tuple[Any, Any]]:
        """Return rows with their results as they come; none if none comes in time.

        Raises:
            MedrayError: The processes die, whichever rows they get.
            Exception: What the function raised.
        """
        found: list[tuple[Any, Any]] = []
        with contextlib.suppress(queue.Empty):
            wait = seconds if self._error is None else 0.0
            found += self._results(*self._arrived.get(timeout=wait))
            while True:
                found += self._results(*self._arrived.get_nowait())
        if self._error is not None and not found:
            raise self._error
        return found

    def _results(self, number: int, done: _Done) -> list[tuple[Any, Any]]:
        row = self._rows.pop(number)
        if done.bug is None:
            return [(row, done.result)]
        self._error = self._error or done.bug  # raised once all results are taken
        return []

    # --- a process's thread -----------------------------------------------------------

    def _serve(self, isolated: Isolated) -> None:
        while (number := self._next()) is not None:
            try:
                done = self._do(isolated, number)
            except Exception as error:  # what cannot be sent, say
                done = _Done(bug=error)
            if done is not None:
                self._arrived.put((number, done))

    def _next(self) -> int | None:
        with self._news:
            self._idle += 1
            self._news.wait_for(lambda: self._waiting or self._closed)
            self._idle -= 1
            return None if self._closed else self._waiting.popleft()

    def _do(self, isolated: Isolated, number: int) -> _Done | None:
        """Return the result of a row; None: it waits for another one."""
        row = self._rows[number]
        timeout, how = self._timeout(row), ""
        while True:
            verdict = self._begin(number, row, timeout, how)
            match verdict.kind:
                case "lost":
                    return _Done(LostError(verdict.why))
                case "hopeless":
                    return _Done(bug=MedrayError(verdict.why))
                case "wait":
                    time.sleep(_PAUSE_S)
                    self._wait_again(number)
                    return None
            try:
                work = self._function, row
                done: _Done = isolated.call(_call, work, timeout)
            except LostError as error:
                if self._closed:
                    return _Done(error)
                hung = f"{error}".startswith("took")
                how = f"the process died ({error})"
                how = f"no answer for {timeout:g} s" if hung else how
                continue
            with self._news:
                self._tries.end(number)
            return done

    def _begin(self, number: int, row: Any, timeout: float, how: str) -> Verdict:
        with self._news:
            verdict = self._tries.begin(
                number,
                group=self._group(row),
                node="here",
                now=time.monotonic(),
                timeout=timeout,
                how=how,
                is_gone=lambda _: False,
            )
            if self._tries.hopeless:
                why = f"processes died one after the other, the last: {how}"
                return Verdict("hopeless", why)
            if verdict.kind == "lost":
                self._tries.forget(number)
            return verdict

    def _wait_again(self, number: int) -> None:
        with self._news:
            if self._stopped:
                del self._rows[number]
            else:
                self._waiting.append(number)
                self._news.notify()


@dataclass(frozen=True)
class _Done:
    """The outcome of a row: its result, or an unexpected exception of the function."""

    result: Any = None
    bug: Exception | None = None


def _call(work: tuple[bytes, Any]) -> Generator[None, None, _Done]:
    """Call the function with a row, in a process of its own."""
    pickled, row = work
    try:
        result = yield from steps_of(_unpickled(pickled), row)
    except Exception as error:
        return _Done(bug=sendable(error, RuntimeError))
    if isinstance(result, Exception):  # stands for a result
        result = sendable(result, SlideError)
    return _Done(result)


@functools.lru_cache(maxsize=1)
def _unpickled(function: bytes) -> Callable[[Any], Any]:
    found: Callable[[Any], Any] = pickle.loads(function)
    return found
