"""What a stream has within Ray: who hands out its blocks, and who does them."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import functools
import pickle
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import ray

from medray.errors import MedrayError
from medray.execution import cluster
from medray.execution.rows import steps_of
from medray.execution.tries import Tries
from medray.slides import bounded_memory

_WAIT_S = 5.0  # how long the source waits for a block in one call
_STDERR = 2  # its number: where a process that hangs says at which line


def as_table(block: int, content: bytes) -> pa.Table:
    """Return a block as a table of one row."""
    large = pa.array([content], pa.large_binary())
    return pa.table({"block": [block], "content": large})


class Feed:
    """Has the blocks that are under way, and counts the tries of their rows.

    An actor on the driver's node: what it knows outlives the processes that die. Its
    methods are coroutines of one thread.
    """

    def __init__(self) -> None:
        """Have nothing yet."""
        self._news = asyncio.Condition()
        self._blocks: dict[int, bytes] = {}
        self._given = 0
        self._tries = Tries()
        self._closed = self._stopped = False

    async def give(self, block: int, content: bytes) -> None:
        """Take the next block."""
        async with self._news:
            self._blocks[block] = content
            while self._given in self._blocks:
                self._given += 1
            self._news.notify_all()

    async def block(self, block: int) -> bytes | Literal[False] | None:
        """Return a block: b"" once it is done, False if it is not there yet.

        None: there will be no other.
        """
        with contextlib.suppress(TimeoutError):
            async with self._news:
                there = self._news.wait_for(lambda: block < self._given or self._closed)
                await asyncio.wait_for(there, _WAIT_S)
        if block < self._given:
            return self._blocks.get(block, b"")
        return None if self._closed else False

    async def begin(self, done: int | None, row: Head | None, node: str) -> Verdict:
        """Note that a row is done, and that the next one is begun.

        Raises:
            MedrayError: Processes die whatever they are given.
        """
        if done is not None:
            self._tries.end(done)
        if row is None or self._stopped:
            return Verdict("stop")
        # It takes seconds to know whether a node is gone.
        gone = {
            node: await asyncio.to_thread(cluster.is_gone, node)
            for node in self._tries.suspects(row.number)
        }
        why = self._tries.begin(
            row.number,
            group=row.group,
            node=node,
            now=time.monotonic(),
            timeout=row.timeout,
            is_gone=lambda node: gone.get(node, False),
        )
        if self._tries.hopeless:
            raise MedrayError(
                "10 processes died one after the other; Ray's logs on their nodes may "
                "say why"
            )
        return Verdict("lost", why) if why else Verdict("go")

    async def goes_on(self, row: int) -> None:
        """Note that a row waits for something, and does not hang."""
        self._tries.goes_on(row, time.monotonic())

    async def forget(self, block: int, rows: list[int]) -> None:
        """Forget a block whose results have arrived."""
        self._blocks.pop(block, None)
        for row in rows:
            self._tries.forget(row)

    async def stop(self) -> None:
        """Let no other row begin."""
        self._stopped = True

    async def close(self) -> None:
        """Give no other block."""
        async with self._news:
            self._closed = self._stopped = True
            self._news.notify_all()


@dataclass(frozen=True)
class Head:
    """What is to be known of a row before it is touched.

    Attributes:
        number: Of the row.
        group: That it belongs to; "": to none.
        timeout: Seconds that it may take, or go on without a yield.
    """

    number: int
    group: str
    timeout: float


@dataclass(frozen=True)
class Verdict:
    """Whether a row may begin.

    Attributes:
        kind: `go`; `lost`: it is given up; `stop`: the run ends.
        why: It is given up.
    """

    kind: Literal["go", "lost", "stop"]
    why: str = ""


@dataclass(frozen=True)
class Answer:
    """What came of a row.

    Attributes:
        kind: `done`; `bug`: the function raised what it may not; `lost`: the row was
            given up; `stop`: it was not begun, since the run ends.
        value: The result, the exception, or why the row was lost.
        seconds: That it took.
    """

    kind: Literal["done", "bug", "lost", "stop"]
    value: Any = None
    seconds: float = 0.0


def do_block(
    feed: Any, function: Callable[[Any], Any], bounded: bool, table: pa.Table
) -> pa.Table:
    """Call the function with each row of a block: a task of Ray Data."""
    content = table["content"][0].as_py()
    node = ray.get_runtime_context().get_node_id()
    answers: list[Answer] = []
    done: int | None = None
    with bounded_memory() if bounded else contextlib.nullcontext():
        heads, rows = pickle.loads(content) if content else ([], [])
        for head, row in zip(heads, rows, strict=True):
            # Waited for: a note that is only sent would be lost with this process.
            verdict = ray.get(feed.begin.remote(done, head, node))
            if verdict.kind == "go":
                answers.append(_answer(feed, function, head, row))
                done = head.number
            else:
                answers.append(Answer(verdict.kind, verdict.why))
                done = None
        if done is not None:
            ray.get(feed.begin.remote(done, None, node))
    return as_table(table["block"][0].as_py(), pickle.dumps(answers))


def _answer(feed: Any, function: Callable[[Any], Any], head: Head, row: Any) -> Answer:
    """Return what came of a row; end this process if it hangs."""
    # A thread of C's: it also fires while native code holds the interpreter's lock.
    arm = functools.partial(
        faulthandler.dump_traceback_later, head.timeout, exit=True, file=_STDERR
    )
    start = time.monotonic()
    arm()
    try:
        steps = steps_of(function, row)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return Answer("done", end.value, time.monotonic() - start)
            feed.goes_on.remote(head.number)
            arm()
    except Exception as error:
        return Answer("bug", _sendable(error))
    finally:
        faulthandler.cancel_dump_traceback_later()


def _sendable(error: Exception) -> Exception:
    """Return an exception with its traceback as a note, as one that can be pickled."""
    text = "".join(traceback.format_exception(error))
    try:
        error.add_note(text)
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does
        return RuntimeError(text)
    return error
