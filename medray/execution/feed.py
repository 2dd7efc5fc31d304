"""The actor that hands out a stream's blocks and counts the tries of their rows."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any, Literal

from medray.execution import cluster
from medray.execution.tries import Tries, Verdict

_LOOK_S = 2.0  # how often the draining nodes are asked for
_IDLE_S = 10.0  # so long nothing is begun if all wait for nodes that are gone
_WAIT_S = 5.0  # how long the source waits for a block in one call


class Feed:
    """Holds the blocks that are under way, and counts the tries of their rows.

    An actor on the driver's node: what it knows outlives the processes that die. Its
    methods are coroutines of one thread.
    """

    def __init__(self) -> None:
        """Start without blocks."""
        self._news = asyncio.Condition()
        self._blocks: dict[int, bytes] = {}
        self._given = 0
        self._tries = Tries()
        # Actors of Ray Data's pool by their ids, and the nodes where they last began.
        self._processes: dict[str, tuple[Any, str]] = {}
        self._round = 0  # number of the execution
        self._called_at = time.monotonic()
        self._leaving: set[str] = set()
        self._looked_at = -math.inf
        self._closed = self._stopped = False

    async def give(self, block: int, content: bytes) -> None:
        """Add the next block."""
        async with self._news:
            self._blocks[block] = content
            while self._given in self._blocks:
                self._given += 1
            self._news.notify_all()

    async def block(self, number: int, block: int) -> bytes | Literal[False] | None:
        """Return a block: b"" once it is done, False if it is not there yet.

        None: there will be no other in the execution of this number.
        """
        if number != self._round:
            return None
        with contextlib.suppress(TimeoutError):
            async with self._news:
                there = self._news.wait_for(lambda: block < self._given or self._closed)
                await asyncio.wait_for(there, _WAIT_S)
        if block < self._given:
            return self._blocks.get(block, b"")
        return None if self._closed else False

    async def begin(
        self, done: int | None, row: Head | None, node: str, trace: str | None
    ) -> Verdict:
        """Record that a row is done, and that the next one is begun.

        Args:
            done: Number of the row that is done; None: none.
            row: The next one; None: there is none.
            node: Where it is begun.
            trace: What a process that had it on this node wrote as it ended; None: it
                is not known.
        """
        self._called_at = time.monotonic()
        if done is not None:
            self._tries.end(done)
        if row is None or self._stopped:
            return Verdict("stop")
        if await self._is_leaving(node):
            return Verdict("leave")
        # It takes seconds to know whether a node is gone.
        gone = {
            node: await asyncio.to_thread(cluster.is_gone, node)
            for node in self._tries.suspects(row.number)
        }
        verdict = self._tries.begin(
            row.number,
            group=row.group,
            node=node,
            now=time.monotonic(),
            timeout=row.timeout,
            trace=trace,
            is_gone=lambda node: gone.get(node, False),
        )
        if self._tries.hopeless:
            how = f"processes died one after the other, the last: {self._tries.how}"
            return Verdict("hopeless", f"{how}; Ray's logs on its node may say more")
        return verdict

    async def _is_leaving(self, node: str) -> bool:
        now = time.monotonic()
        if now - self._looked_at > _LOOK_S:
            self._looked_at = now
            self._leaving = await asyncio.to_thread(cluster.leaving_nodes)
        return node in self._leaving

    async def goes_on(self, row: int) -> None:
        """Record that a row waits for something, and does not hang."""
        self._called_at = time.monotonic()
        self._tries.goes_on(row, time.monotonic())

    async def forget(self, block: int, rows: list[int]) -> None:
        """Forget a block whose results have arrived."""
        self._blocks.pop(block, None)
        for row in rows:
            self._tries.forget(row)

    async def enter(self, process: Any, node: str) -> None:
        """Record that an actor has started, or restarted, on a node."""
        self._processes[process._actor_id.hex()] = process, node

    async def processes(self) -> list[Any]:
        """Return all actors that have started in this execution."""
        return [process for process, _ in self._processes.values()]

    async def is_stuck(self) -> bool:
        """Return whether all wait for actors whose nodes are gone.

        Ray Data leaves the blocks of such an actor to it, until there is a place for it
        again: while others have the places that are left, that may be never.
        """
        if time.monotonic() - self._called_at < _IDLE_S:
            return False
        nodes = {node for _, node in self._processes.values()}
        gone = {
            node for node in nodes if await asyncio.to_thread(cluster.is_gone, node)
        }
        return bool(gone) and self._tries.nodes <= gone

    async def renew(self) -> int:
        """Begin another execution and return its number; what is under way is kept."""
        self._round += 1
        self._processes.clear()
        self._tries.let_go()
        self._called_at = time.monotonic()
        return self._round

    async def forever(self) -> None:
        """Do not return before this actor ends."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """Let no other row begin."""
        self._stopped = True

    async def close(self) -> None:
        """Hand out no other block."""
        async with self._news:
            self._closed = self._stopped = True
            self._news.notify_all()


@dataclass(frozen=True)
class Head:
    """What must be known of a row before it is touched.

    Attributes:
        number: Of the row.
        group: That it belongs to; "": to none.
        timeout: Seconds that it may take, or go on without a yield.
    """

    number: int
    group: str
    timeout: float
