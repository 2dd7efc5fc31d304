"""Actors that work off rows: who has what, and who has it when one dies.

One file, because the methods of `Pool` change one state: who works on which row.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from medray.errors import LostError, MedrayError
from medray.execution import cluster
from medray.execution.tasks import HandedBack

log = logging.getLogger(__name__)

# A row that was at hand when this many actors died is given up: of those whose nodes
# live on, and of all, should no node ever seem to.
_TRIES, _MOST_TRIES = 3, 20
# So many deaths without a result between them are no row's fault.
_DEATHS = 10
# Seconds without an actor after which it is said.
_SAY_STUCK = 60.0


@dataclass(eq=False)
class _Actor:
    handle: Any
    asked_at: float
    node: str = ""  # its id
    calls: int = 0
    alone: bool = False  # with one row that may have killed another
    hung: str = ""  # how, when it was ended for it


@dataclass
class _Call:
    actor: _Actor
    rows: list[Any]  # that have no result yet
    lost_on: tuple[str, ...]  # nodes on which an actor died that had them at hand
    since: float  # when it last gave a result


class Pool:
    """Actors with a method that takes rows and gives a result for each, in their order.

    The method is a generator of lists of results, so that results come back while later
    rows are worked on. `HandedBack` gives a row back, which another actor then does; an
    empty list says that the next row takes long, and not for it hangs. What a dead
    actor held is done again row by row, each with an actor to itself: a row that kills
    is found out and costs no other row. An actor that dies with its node speaks against
    no row. An actor whose node is told to go gets nothing more, and another takes its
    place.

    Attributes:
        start_s: Seconds from asking for an actor until it was there, of the slowest;
            a machine may have had to be bought for it. 0: none is there yet.
        there_s: Seconds that actors have been there, all together.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        method: str,
        actors: int,
        *,
        most: int = 0,
        calls: int = 1,
        timeout: Callable[[Any], float] | None = None,
    ) -> None:
        """Start the actors.

        Args:
            start: Starts one actor and gives its handle.
            method: What to call of it.
            actors: How many.
            most: How many it may grow to, if that is more.
            calls: How many calls each has at once.
            timeout: Seconds that a row may take; then its actor is taken to hang and
                ended. None: any time.
        """
        self._start, self._method, self._limit = start, method, calls
        self._timeout = timeout
        self._most = max(actors, most)
        self._starting: dict[Any, _Actor] = {}
        self._actors: list[_Actor] = []
        self._leaving: list[_Actor] = []
        self._queue: deque[list[Any]] = deque()
        self._again: deque[tuple[Any, tuple[str, ...]]] = deque()
        self._calls: dict[Any, _Call] = {}
        self._deaths = 0
        self.start_s = self.there_s = 0.0
        self._looked_at = self._stuck_since = time.monotonic()
        for _ in range(actors):
            self._start_actor()

    def __enter__(self) -> Self:
        """Return the pool itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the actors: at once after an error, else once what they do is done."""
        for actor in (*self._actors, *self._leaving, *self._starting.values()):
            if kind is None:
                actor.handle.__ray_terminate__.remote()
            else:
                ray.kill(actor.handle)

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
    def awaited(self) -> list[Any]:
        """What `ray.wait` can wait for: calls, and actors that start."""
        return [*self._calls, *self._starting]

    def grow(self) -> None:
        """Start one more actor, if there may be more."""
        if self.size < self._most:
            self._start_actor()

    def give(self, rows: list[Any]) -> None:
        """Give rows to the next actor that can take them."""
        self._queue.append(rows)
        self._start_calls()

    def take(self, ready: Any) -> list[tuple[Any, Any]]:
        """Take what is ready of what is awaited.

        Returns:
            Rows with their results; a LostError for a row that was lost too often.

        Raises:
            MedrayError: The actors die, whatever they are given.
            Exception: What the method raised.
        """
        found: list[tuple[Any, Any]] = []
        try:
            if ready in self._starting:
                ray.get(ready)
                actor = self._starting.pop(ready)
                self.start_s = max(self.start_s, time.monotonic() - actor.asked_at)
                actor.node = cluster.node_of(actor.handle)
                self._actors.append(actor)
            else:
                results = ray.get(next(ready))
                call = self._calls[ready]
                pairs = list(zip(call.rows, results, strict=False))
                found = [
                    (row, result)
                    for row, result in pairs
                    if not isinstance(result, HandedBack)
                ]
                if back := [
                    row for row, result in pairs if isinstance(result, HandedBack)
                ]:
                    self._queue.appendleft(back)
                call.rows = call.rows[len(results) :]
                # Also of no results: who copies a slide says so that it does not hang.
                call.since = time.monotonic()
                if results:
                    self._deaths = 0
        except StopIteration:
            self._end(ready)
        except RayTaskError as error:
            raise error.cause from error
        except ActorUnschedulableError as error:
            raise MedrayError(
                f"{self._method}: no node of the cluster, nor any that its autoscaler "
                f"may start, can run its processes ({_one_line(error)}); compare what "
                f"its nodes have with what is asked for"
            ) from error
        except RayError as error:
            if ready in self._starting:
                self._replace(self._starting.pop(ready), why_lost(error))
            else:
                found = self._lost(self._end(ready), error)
        self._start_calls()
        return found

    def look_after(self) -> None:
        """End the actors that have had no result for too long; say if none starts."""
        now = time.monotonic()
        if now - self._looked_at < 1:
            return
        self.there_s += len(self._actors) * (now - self._looked_at)
        self._looked_at = now
        for call in self._calls.values():
            if self._timeout is None or not call.rows or call.actor.hung:
                continue
            seconds = self._timeout(call.rows[0])
            if now - call.since > seconds:
                call.actor.hung = f"no answer for {seconds:.0f} s"
                ray.kill(call.actor.handle)
        self._leave_nodes()
        if self._actors:
            self._stuck_since = now
        elif now - self._stuck_since > _SAY_STUCK:
            self._stuck_since = now
            # A head node that waits for others counts as one.
            if not any(node["Alive"] for node in ray.nodes()):
                raise MedrayError(
                    "no node of the Ray cluster is alive any more; its logs may say "
                    "why. Run the same command again to go on"
                )
            log.warning("no node has room for the processes yet; still waiting")

    def _leave_nodes(self) -> None:
        """Give nothing more to actors whose nodes are about to go."""
        if not (nodes := cluster.leaving_nodes()):
            return
        for actor in [*self._actors]:
            if actor.node in nodes:
                log.info("a process of %s leaves its node, which goes", self._method)
                self._actors.remove(actor)
                self._leaving.append(actor)
                self._dismiss(actor)
                self._start_actor()

    def _dismiss(self, actor: _Actor) -> None:
        """End an actor that leaves, once it has nothing to do."""
        if actor in self._leaving and not actor.calls:
            self._leaving.remove(actor)
            actor.handle.__ray_terminate__.remote()

    def _start_actor(self) -> None:
        handle = self._start()
        # Only an actor that runs is given rows: where its node is gone, the next may
        # have to wait for another node.
        self._starting[handle.__ray_ready__.remote()] = _Actor(handle, time.monotonic())

    def _start_calls(self) -> None:
        while self._again and (idle := self._least_busy(0)):
            row, lost_on = self._again.popleft()
            idle.alone = True
            self._call(idle, [row], lost_on)
        while self._queue and (actor := self._least_busy(self._limit - 1)):
            self._call(actor, self._queue.popleft(), ())

    def _least_busy(self, most: int) -> _Actor | None:
        can = [a for a in self._actors if a.calls <= most and not a.alone]
        return min(can, key=lambda actor: actor.calls, default=None)

    def _call(self, actor: _Actor, rows: list[Any], lost_on: tuple[str, ...]) -> None:
        method = getattr(actor.handle, self._method)
        call = method.options(num_returns="streaming").remote(rows)
        self._calls[call] = _Call(actor, rows, lost_on, time.monotonic())
        actor.calls += 1

    def _end(self, call: Any) -> _Call:
        ended = self._calls.pop(call)
        ended.actor.calls, ended.actor.alone = ended.actor.calls - 1, False
        self._dismiss(ended.actor)
        return ended

    def _lost(self, call: _Call, error: RayError) -> list[tuple[Any, Any]]:
        """Replace a dead actor; do again what it held, or give it up."""
        why = call.actor.hung or why_lost(error)
        if call.actor in self._actors:  # the first of its calls to tell
            self._actors.remove(call.actor)
            self._replace(call.actor, why)
        lost_on = (*call.lost_on, call.actor.node)
        # That an earlier one had gone may be known by now.
        if len(lost_on) >= _TRIES and (
            sum(not cluster.is_gone(node) for node in lost_on) >= _TRIES
            or len(lost_on) >= _MOST_TRIES
        ):
            # What is given up counts as one death: ten such rows are no row's fault.
            self._deaths -= min(self._deaths, _TRIES - 1)
            said = f"{why}, three times"
            return [(row, LostError(said)) for row in call.rows]
        self._again.extend((row, lost_on) for row in call.rows)
        return []

    def _replace(self, actor: _Actor, why: str) -> None:
        log.info("a process of %s was lost: %s", self._method, why)
        self._deaths += not (actor.node and cluster.is_gone(actor.node))
        if self._deaths >= _DEATHS:
            raise MedrayError(
                f"{self._method}: {_DEATHS} processes died one after the other, the "
                f"last: {why}; Ray's logs on its node may say more"
            )
        ray.kill(actor.handle)  # it may only be out of reach
        self._start_actor()


def _one_line(error: Exception) -> str:
    return " ".join(f"{error}".split())[:300]


def why_lost(error: RayError) -> str:
    """Return what matters of Ray's account of a death: how the process ended."""
    if isinstance(error, GetTimeoutError):
        return "no answer in time"
    text = f"{error}"
    if isinstance(error, OutOfMemoryError):
        return "its node had too little memory"
    detail = re.search(r"Worker exit detail: ([^\n]+)", text)
    said = detail[1] if detail else text.strip().splitlines()[-1].strip()
    return f"the process died ({said[:200]})"


def poll(
    *pools: Pool, wait: bool = True, seconds: float = 1.0
) -> list[tuple[Pool, Any, Any]]:
    """Take results of several pools as they come: (pool, row, result).

    Args:
        pools: Where to take from; with `wait`, one of them is busy or starting.
        wait: For something to happen; else take a result only if it is there.
        seconds: How long to wait.

    Returns:
        Some results, or none: when a call ended, an actor has started, or nothing
        happened in time. A result is a LostError for a row that was lost too often.
    """
    owner = {one: pool for pool in pools for one in pool.awaited}
    ready, _ = ray.wait(list(owner), timeout=seconds if wait else 0)
    for pool in pools:
        pool.look_after()
    if not ready:
        return []
    pool = owner[ready[0]]
    return [(pool, row, result) for row, result in pool.take(ready[0])]
