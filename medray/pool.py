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
# Seconds after which it is said that nothing happens.
_PATIENCE = 60.0


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
        self._starting: dict[Any, _Actor] = {}
        self._actors: list[_Actor] = []
        self._queue: deque[list[Row]] = deque()
        self._again: deque[tuple[Row, int]] = deque()
        self._calls: dict[Any, _Call] = {}
        self._deaths = 0
        for _ in range(actors):
            self._start_actor()

    def __enter__(self) -> Self:
        """Give the pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the actors, once what they do is done."""
        for actor in (*self._actors, *self._starting.values()):
            actor.handle.__ray_terminate__.remote()

    @property
    def size(self) -> int:
        """How many actors there are, those included that Ray has yet to start."""
        return len(self._actors) + len(self._starting)

    @property
    def busy(self) -> bool:
        """Whether there is work under way."""
        return bool(self._calls or self._queue or self._again)

    @property
    def room(self) -> int:
        """How many more calls could be under way now."""
        there = len(self._actors) * self._limit
        return there - len(self._calls) - len(self._queue) - len(self._again)

    @property
    def is_stuck(self) -> bool:
        """Whether no actor runs."""
        return not self._actors

    @property
    def awaited(self) -> list[Any]:
        """What `ray.wait` can wait for: calls, and actors that start."""
        return [*self._calls, *self._starting]

    def give(self, rows: list[Row]) -> None:
        """Give rows to the next actor that can take them."""
        self._queue.append(rows)
        self._start_calls()

    def take(self, ready: Any) -> list[tuple[Row, Any]]:
        """Take what is ready of what is awaited.

        Returns:
            Rows with their results; a RayError for a row that was lost too often.

        Raises:
            MedrayError: The actors die, whatever they are given.
            Exception: What the method raised.
        """
        found: list[tuple[Row, Any]] = []
        try:
            if ready in self._starting:
                ray.get(ready)
                self._actors.append(self._starting.pop(ready))
            else:
                results = ray.get(next(ready))
                call = self._calls[ready]
                found = list(zip(call.rows, results, strict=False))
                call.rows = call.rows[len(results) :]
                self._deaths = 0
        except StopIteration:
            self._end(ready)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            if ready in self._starting:
                self._replace(self._starting.pop(ready), error)
            else:
                found = self._lost(self._end(ready), error)
        self._start_calls()
        return found

    def _start_actor(self) -> None:
        handle = self._start()
        # Only an actor that runs is given rows: where its node is gone, the next may
        # have to wait for another node.
        self._starting[handle.__ray_ready__.remote()] = _Actor(handle)

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

    def _end(self, call: Any) -> _Call:
        ended = self._calls.pop(call)
        ended.actor.calls, ended.actor.alone = ended.actor.calls - 1, False
        return ended

    def _lost(self, call: _Call, error: RayError) -> list[tuple[Row, Any]]:
        """Replace a dead actor; do again what it held, or give it up."""
        if call.actor in self._actors:  # the first of its calls to tell
            self._actors.remove(call.actor)
            self._replace(call.actor, error)
        if call.tries + 1 == _TRIES:
            return [(row, error) for row in call.rows]
        self._again.extend((row, call.tries + 1) for row in call.rows)
        return []

    def _replace(self, actor: _Actor, error: RayError) -> None:
        why = f"{error}".strip().splitlines()[-1]
        log.info("a process of %s died: %s", self._method, why)
        self._deaths += 1
        if self._deaths == _DEATHS:
            raise MedrayError(
                f"{self._method}: {_DEATHS} processes died one after the other, the "
                f"last: {why}; Ray's logs on its node may say more"
            )
        ray.kill(actor.handle)  # it may only be out of reach
        self._start_actor()


def poll(*pools: Pool, wait: bool = True) -> list[tuple[Pool, Row, Any]]:
    """Take results of several pools as they come: (pool, row, result).

    Args:
        pools: Where to take from; with `wait`, one of them is busy or starting.
        wait: For something to happen; else take a result only if it is there.

    Returns:
        Some results, or none: when a call ended or an actor has started.
    """
    owner = {one: pool for pool in pools for one in pool.awaited}
    ready, _ = ray.wait(list(owner), timeout=_PATIENCE if wait else 0)
    if not ready:
        if wait and any(pool.is_stuck for pool in pools):
            log.warning("no node has room for the processes yet; still waiting")
        return []
    pool = owner[ready[0]]
    return [(pool, row, result) for row, result in pool.take(ready[0])]
