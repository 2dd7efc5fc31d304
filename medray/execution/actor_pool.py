"""A pool of Ray actors that retries the rows of an actor that dies.

What is done when is decided in `medray.execution.pool_state`; here Ray's events are
turned into its events, and its decisions are carried out.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Self

import ray
from ray.exceptions import (
    ActorUnschedulableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from medray.errors import MedrayError
from medray.execution import cluster
from medray.execution.pool_state import (
    Answered,
    Call,
    Decision,
    Dismiss,
    Ended,
    Event,
    Finish,
    Give,
    Grow,
    Kill,
    Looked,
    Lost,
    NotStarted,
    PoolState,
    Start,
    Started,
    WarnStuck,
)

log = logging.getLogger(__name__)


class Pool:
    """Actors whose method takes rows and yields one result per row, in their order.

    The method is a generator of lists of results, so that results come back while later
    rows are worked on. `HandedBack` gives a row back, which another actor then does; an
    empty list says that the next row takes long, and does not hang. `pool_state` has
    the rules for actors that die, hang, or are on a node that is being drained.
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
            start: Starts one actor and returns its handle.
            method: Name of the actor's method to call.
            actors: How many.
            most: How many it may grow to, if that is more.
            calls: How many calls each has at once.
            timeout: Seconds that a row may take; then its actor is taken to hang and
                killed. None: any time.
        """
        self._start, self._method = start, method
        most = max(actors, most)
        self._state = PoolState(method, most, calls, timeout, time.monotonic())
        self._handles: dict[int, Any] = {}  # of actors
        # What Ray is waited for: actors that start, and generators of results.
        self._starting: dict[Any, int] = {}
        self._calls: dict[Any, int] = {}
        for _ in range(actors):
            self.grow()

    def __enter__(self) -> Self:
        """Return the pool itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the actors: at once after an error, else once what they do is done."""
        for handle in self._handles.values():
            if kind is None:
                handle.__ray_terminate__.remote()
            else:
                ray.kill(handle)

    @property
    def size(self) -> int:
        """How many actors there are, those included that Ray has yet to start."""
        return self._state.size

    @property
    def busy(self) -> bool:
        """Whether there is work under way."""
        return self._state.busy

    @property
    def room(self) -> int:
        """How many more calls could be under way now."""
        return self._state.room

    @property
    def start_s(self) -> float:
        """Seconds from asking for an actor until it was there, of the slowest.

        A machine may have had to be bought for it. 0: none is there yet.
        """
        return self._state.start_s

    @property
    def there_s(self) -> float:
        """Seconds that actors have been there, all together."""
        return self._state.there_s

    @property
    def awaited(self) -> list[Any]:
        """What `ray.wait` can wait for: calls, and actors that start."""
        return [*self._calls, *self._starting]

    def grow(self) -> None:
        """Start one more actor, if there may be more."""
        self._decide(Grow())

    def give(self, rows: list[Any]) -> None:
        """Send rows to the next actor that can take them."""
        self._decide(Give(tuple(rows)))

    def take(self, ready: Any) -> list[tuple[Any, Any]]:
        """Return the results that are ready.

        Returns:
            Rows with their results; a LostError for a row that was lost too often.

        Raises:
            MedrayError: The actors die, whichever rows they get.
            Exception: What the method raised.
        """
        return self._decide(self._event(ready))

    def look_after(self) -> None:
        """Look for hung actors and draining nodes, each second; warn if none starts."""
        if time.monotonic() - self._state.looked_at >= 1:
            self._decide(Looked(frozenset(cluster.leaving_nodes())))

    def _event(self, ready: Any) -> Event:
        """Return what happened to an actor that starts, or to a call."""
        try:
            if ready in self._starting:
                ray.get(ready)
                actor = self._starting.pop(ready)
                return Started(actor, cluster.node_of(self._handles[actor]))
            return Answered(self._calls[ready], tuple(ray.get(next(ready))))
        except StopIteration:
            return Ended(self._calls.pop(ready))
        except RayTaskError as error:
            raise error.cause from error
        except ActorUnschedulableError as error:
            raise MedrayError(
                f"{self._method}: no node of the cluster, nor any that its autoscaler "
                f"may start, can run its processes ({_one_line(error)}); compare what "
                f"its nodes have with what is asked for"
            ) from error
        except RayError as error:
            why = why_lost(error)
            if ready in self._starting:
                actor = self._starting.pop(ready)
                node = cluster.node_of(self._handles[actor])
                return NotStarted(actor, why, bool(node) and cluster.is_gone(node))
            call = self._calls.pop(ready)
            gone = filter(cluster.is_gone, self._state.nodes_of(call))
            return Lost(call, why, frozenset(gone))

    def _decide(self, event: Event) -> list[tuple[Any, Any]]:
        """Carry out what an event asks for; return the rows that are finished."""
        return self._carry_out(self._state.decide(event, time.monotonic()))

    def _carry_out(self, decisions: Iterable[Decision]) -> list[tuple[Any, Any]]:
        found = []
        for decision in decisions:
            match decision:
                case Start(actor):
                    handle = self._handles[actor] = self._start()
                    self._starting[handle.__ray_ready__.remote()] = actor
                case Call(call, actor, rows):
                    method = getattr(self._handles[actor], self._method)
                    streaming = method.options(num_returns="streaming")
                    self._calls[streaming.remote([*rows])] = call
                case Kill(actor):
                    ray.kill(self._handles.pop(actor))
                case Dismiss(actor):
                    self._handles.pop(actor).__ray_terminate__.remote()
                case Finish(row, result):
                    found.append((row, result))
                case WarnStuck():
                    _warn_stuck()
        return found


def _warn_stuck() -> None:
    # A head node that waits for others counts as one.
    if not any(node["Alive"] for node in ray.nodes()):
        raise MedrayError(
            "no node of the Ray cluster is alive any more; its logs may say "
            "why. Run the same command again to go on"
        )
    log.warning("no node has room for the processes yet; still waiting")


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
    """Return the results of several pools that are ready: (pool, row, result).

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
