"""Actors that work off rows: who has what, and who has it when one dies."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray.exceptions import RayError, RayTaskError

from medray.errors import MedrayError

log = logging.getLogger(__name__)
Row = dict[str, Any]

# A row that was at hand when this many actors died is given up.
_TRIES = 3
# So many deaths without a result between them are no row's fault.
_DEATHS = 10


@dataclass(eq=False)
class _Actor:
    handle: Any
    calls: int = 0
    alone: bool = False  # with one row that may have killed another


@dataclass
class _Call:
    actor: _Actor
    rows: list[Row]  # that have no result yet
    tries: int


class Pool:
    """Actors with a method that takes rows and gives a result for each, in their order.

    The method is a generator of lists of results, so that results come back while later
    rows are worked on. What a dead actor held is done again row by row, each with an
    actor to itself: a row that kills is found out and costs no other row.
    """

    def __init__(
        self, start: Callable[[], Any], method: str, actors: int, *, calls: int = 1
    ) -> None:
        """Start the actors.

        Args:
            start: Starts one actor and gives its handle.
            method: What to call of it.
            actors: How many.
            calls: How many calls each has at once.
        """
        self._start, self._method, self._limit = start, method, calls
        self._actors = [_Actor(start()) for _ in range(actors)]
        self._queue: deque[list[Row]] = deque()
        self._again: deque[tuple[Row, int]] = deque()
        self._calls: dict[Any, _Call] = {}
        self._deaths = 0

    def __enter__(self) -> Self:
        """Give the pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the actors, once what they do is done."""
        for actor in self._actors:
            actor.handle.__ray_terminate__.remote()

    @property
    def size(self) -> int:
        """How many actors there are."""
        return len(self._actors)

    @property
    def under_way(self) -> list[Any]:
        """The calls, for `ray.wait`."""
        return list(self._calls)

    @property
    def room(self) -> int:
        """How many more calls the actors could take at once."""
        there = len(self._actors) * self._limit
        return there - len(self._calls) - len(self._queue) - len(self._again)

    def give(self, rows: list[Row]) -> None:
        """Give rows to the next actor that can take them."""
        self._queue.append(rows)
        self._start_calls()

    def take(self, call: Any) -> list[tuple[Row, Any]]:
        """Take what is ready of a call.

        Returns:
            Rows with their results; a RayError for a row that was lost too often.

        Raises:
            MedrayError: The actors die, whatever they are given.
            Exception: What the method raised.
        """
        under_way = self._calls[call]
        found: list[tuple[Row, Any]] = []
        try:
            results = ray.get(next(call))
        except StopIteration:
            self._end(call)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            self._end(call)
            found = self._lost(under_way, error)
        else:
            found = list(zip(under_way.rows, results, strict=False))
            under_way.rows = under_way.rows[len(results) :]
            self._deaths = 0
        self._start_calls()
        return found

    def _start_calls(self) -> None:
        while self._again and (idle := self._least_busy(0)):
            row, tries = self._again.popleft()
            idle.alone = True
            self._call(idle, [row], tries)
        while self._queue and (actor := self._least_busy(self._limit - 1)):
            self._call(actor, self._queue.popleft(), 0)

    def _least_busy(self, most: int) -> _Actor | None:
        can = [a for a in self._actors if a.calls <= most and not a.alone]
        return min(can, key=lambda actor: actor.calls, default=None)

    def _call(self, actor: _Actor, rows: list[Row], tries: int) -> None:
        method = getattr(actor.handle, self._method)
        call = method.options(num_returns="streaming").remote(rows)
        self._calls[call] = _Call(actor, rows, tries)
        actor.calls += 1

    def _end(self, call: Any) -> None:
        actor = self._calls.pop(call).actor
        actor.calls, actor.alone = actor.calls - 1, False

    def _lost(self, call: _Call, error: RayError) -> list[tuple[Row, Any]]:
        """Replace a dead actor; do again what it held, or give it up."""
        why = f"{error}".strip().splitlines()[-1]
        if call.actor in self._actors:  # the first of its calls to tell
            log.info("a process of %s died: %s", self._method, why)
            self._deaths += 1
            if self._deaths == _DEATHS:
                raise MedrayError(
                    f"{self._method}: {_DEATHS} processes died one after the other, "
                    f"the last: {why}; Ray's logs on its node may say more"
                )
            ray.kill(call.actor.handle)  # it may only be out of reach
            self._actors[self._actors.index(call.actor)] = _Actor(self._start())
        if call.tries + 1 == _TRIES:
            return [(row, error) for row in call.rows]
        self._again.extend((row, call.tries + 1) for row in call.rows)
        return []


def poll(*pools: Pool, wait: bool = True) -> list[tuple[Pool, Row, Any]]:
    """Take results of several pools as they come: (pool, row, result).

    Args:
        pools: Where to take from.
        wait: For a result; else take one only if it is there.

    Returns:
        Some results; none when nothing is under way or, without `wait`, is there.
    """
    found: list[tuple[Pool, Row, Any]] = []
    while not found:
        owner = {call: pool for pool in pools for call in pool.under_way}
        if not owner:
            break
        ready, _ = ray.wait(list(owner), timeout=None if wait else 0)
        if not ready:
            break
        pool = owner[ready[0]]
        found = [(pool, row, result) for row, result in pool.take(ready[0])]
    return found
