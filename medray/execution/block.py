"""What a process does with a block of a stream: a task of one of Ray Data's actors."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import pickle
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import ray

from medray.errors import MedrayError, SlideError
from medray.execution.feed import Head
from medray.execution.rows import sendable, steps_of
from medray.execution.tries import Verdict
from medray.slides import bounded_memory


@dataclass(frozen=True)
class Answer:
    """The result of a row.

    Attributes:
        kind: `done`; `bug`: the function raised what it may not; `lost`: the row was
            given up; `stop`: it was not begun, since the run ends; `again`: it was not
            begun, since the block has taken long, another row of its group is tried, or
            the node is being drained.
        value: The result, the exception, or why the row was lost.
        seconds: That it took.
    """

    kind: Literal["done", "bug", "lost", "stop", "again"]
    value: Any = None
    seconds: float = 0.0


def as_table(block: int, content: bytes) -> pa.Table:
    """Return a block as a table of one row."""
    large = pa.array([content], pa.large_binary())
    return pa.table({"block": [block], "content": large})


# After so many seconds the rest of a block waits for another: what is done is not kept
# back by a row that takes long, nor done again if one ends the process.
_LONG_S = 1.0
_PAUSE_S = 0.2  # before a row that may not begin yet is tried again


def do_block(
    feed: Any, function: Callable[[Any], Any], bounded: bool, table: pa.Table
) -> pa.Table:
    """Call the function with each row of a block.

    Returns:
        The number of the block, and the answers, each pickled.
    """
    content = table["content"][0].as_py()
    heads, rows = pickle.loads(content) if content else ([], [])
    node = ray.get_runtime_context().get_node_id()
    name = feed._actor_id.hex()
    traces = f"{tempfile.gettempdir()}/medray-{name}"
    answers: list[bytes] = []
    done: int | None = None
    leaving = False
    end = time.monotonic() + _LONG_S
    with (
        bounded_memory() if bounded else contextlib.nullcontext(),
        _ending_with(feed),
    ):
        for head, row in zip(heads, rows, strict=True):
            if answers and (leaving or time.monotonic() > end):
                answers.append(pickle.dumps(Answer("again")))
                continue
            path = Path(f"{traces}-{head.number}")
            trace = path.read_text(errors="replace") if path.exists() else None
            # Waited for: a note that is only sent would be lost with this process.
            verdict: Verdict = ray.get(feed.begin.remote(done, head, node, trace))
            done = None
            if verdict.kind == "go":
                _at_hand[name] = path
                with _traced(path) as file:
                    answers.append(_answer(feed, function, head, row, file))
                done = head.number
                continue
            if verdict.kind == "leave" and not answers:
                os._exit(0)  # Ray starts it again, on a node that stays
            leaving = verdict.kind == "leave"
            if not leaving:
                path.unlink(missing_ok=True)
            answers.append(pickle.dumps(_without_result(verdict)))
        if done is not None:
            ray.get(feed.begin.remote(done, None, node, None))
    return as_table(table["block"][0].as_py(), pickle.dumps(answers))


class Process:
    """An actor of Ray Data's pool, which keeps what the function has cached."""

    def __init__(self, feed: Any, function: Callable[[Any], Any], bounded: bool):
        """Start, or start again after the process has died."""
        self._do = functools.partial(do_block, feed, function, bounded)
        here = ray.get_runtime_context()
        ray.get(feed.enter.remote(here.current_actor, here.get_node_id()))

    def __call__(self, block: pa.Table) -> pa.Table:
        """Do a block."""
        return self._do(block)


def _without_result(verdict: Verdict) -> Answer:
    match verdict.kind:
        case "lost" | "stop":
            return Answer(verdict.kind, verdict.why)
        case "hopeless":
            return Answer("bug", MedrayError(verdict.why))
        case _:
            time.sleep(_PAUSE_S)
            return Answer("again")


@contextlib.contextmanager
def _ending_with(feed: Any) -> Iterator[None]:
    """End this process if the stream ends before its block: nothing waits for it."""
    name = feed._actor_id.hex()
    if name not in _watched:
        _watched.add(name)
        threading.Thread(target=_watch, args=(feed, name), daemon=True).start()
    try:
        yield
    finally:
        _at_hand.pop(name, None)


_watched: set[str] = set()  # streams that this process has had blocks of
_at_hand: dict[str, Path] = {}  # of which it has one now, and the trace of its row


def _watch(feed: Any, name: str) -> None:
    ray.wait([feed.forever.remote()])
    if path := _at_hand.get(name):
        path.unlink(missing_ok=True)
        os._exit(0)


@contextlib.contextmanager
def _traced(path: Path) -> Iterator[IO[str]]:
    """Open a file into which Python writes how this process ends, if it dies now."""
    with _opened(path) as file:
        faulthandler.enable(file, all_threads=False)
        try:
            yield file
        finally:
            faulthandler.enable()
    path.unlink(missing_ok=True)


def _opened(path: Path) -> IO[str]:
    try:
        return path.open("w")
    except OSError:  # the temporary folder is full, or cannot be written
        return open(os.devnull, "w")


def _answer(
    feed: Any, function: Callable[[Any], Any], head: Head, row: Any, file: IO[str]
) -> bytes:
    """Return the result of a row, pickled; end this process if it hangs."""
    # A thread of C's: it also fires while native code holds the interpreter's lock.
    arm = functools.partial(
        faulthandler.dump_traceback_later, head.timeout, exit=True, file=file
    )
    start = time.monotonic()
    arm()
    try:
        steps = steps_of(function, row)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                value = end.value
                if isinstance(value, Exception):  # stands for a result
                    value = sendable(value, SlideError)
                seconds = time.monotonic() - start
                return pickle.dumps(Answer("done", value, seconds))
            feed.goes_on.remote(head.number)
            arm()
    except Exception as error:  # also of a result that cannot be pickled
        return pickle.dumps(Answer("bug", sendable(error, RuntimeError)))
    finally:
        faulthandler.cancel_dump_traceback_later()
