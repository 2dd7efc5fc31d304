"""Rows through Ray Data, as they become known: one execution, some rows per block.

    driver   Stream.give: rows become blocks, of about a second's work
    source   a read that yields a block as soon as the driver has given it
    actors   Ray Data's map_batches: the function is called with each row of a block
    driver   Stream.take: rows with their results, as the blocks come

Ray Data moves the blocks, keeps a process for each core, asks for more nodes, and
repeats what was lost, on another node if one is gone. What it does not know is added
here and in `medray.execution.feed`: how often a row may end the process that works on
it, what hangs, and how much may be under way, so that any number of rows takes the same
memory.

One file, because what is under way is one state, of which all methods take and add.
"""

from __future__ import annotations

import contextlib
import functools
import math
import pickle
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Self

import pyarrow as pa
import ray
from ray.exceptions import RayError

from medray.errors import LostError, MedrayError
from medray.execution import cluster
from medray.execution.block import Answer, Process, as_table
from medray.execution.feed import Feed, Head

# What the rows of a block should take: Ray Data looks ten times a second what has
# ended, and has the next block queued at each process.
_BLOCK_S, _BLOCK_ROWS, _FIRST_ROWS = 0.5, 64, 2
# Blocks of an execution: Ray Data keeps statistics of each, some KB, until its end.
_BLOCKS = 20_000
CORE = 1.0
"""Cores that a process asks for."""
# Blocks for each place: that one process has at once, that are under way (some wait,
# and so ask for more nodes where they come on request), and whose rows wait to be cut.
_AT_ONCE, _AHEAD, _BACKLOG = 2, 3, 4
# Processes that are started at once for what comes of the first rows: a slide may have
# many regions. More start as blocks wait.
_FIRST_PROCESSES = 8
_LOOK_S = 5.0  # how often the places of the cluster are counted
_QUIET_S = 5.0  # without a result, after which it is asked whether all are stuck
# Seconds in which an execution ends whose rows are done, and one that is asked to end.
_CLOSE_S, _END_S = 5.0, 8.0


class Stream:
    """Rows that are given as they become known, and their results as they come.

    A row that ends its process, or hangs, three times has a LostError for its result; a
    process that goes with its node speaks against no row. A MedrayError or OSError that
    the function raises is the row's result, a MemoryError as a SlideError.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        *,
        num_cpus: float,
        num_gpus: float = 0,
        timeout: Callable[[Any], float],
        bounded: bool,
        expected: int,
        group: Callable[[Any], str] = lambda _: "",
    ) -> None:
        """Start an execution that has no rows yet.

        Args:
            function: Is called with each row, in processes that stay: it may cache what
                rows share. It may return a generator, which yields while it waits for
                something, and returns the result.
            num_cpus: Of a process.
            num_gpus: Of a process.
            timeout: Seconds that a row may take, or go on without a yield.
            bounded: A process may allocate 4 GiB and no more, for untrusted files.
            expected: How many rows are known by now.
            group: Names the group of a row: once a row is given up, so are those of its
                group that have not begun. "": none.
        """
        self._group = group
        self._place = {"CPU": num_cpus, "GPU": num_gpus}
        self._timeout = timeout
        self._places, self._looked_at = 1, -math.inf
        self._waiting: deque[int] = deque()  # rows that are in no block yet
        self._rows: dict[int, Any] = {}  # that have no result yet
        self._numbers = 0
        self._blocks: dict[int, list[int]] = {}  # under way: the rows of each
        self._given = 0
        self._row_s = _BLOCK_S / _FIRST_ROWS  # that a row takes
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._end, self._closed = cluster.End(), threading.Event()
        self._renewed = False  # the execution is to end, and another to begin
        self._heard_at = time.monotonic()
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        # Each process of the stream has a call that waits for its end.
        feed = ray.remote(Feed).options(
            num_cpus=0, label_selector=here, max_concurrency=100_000
        )
        self._feed = feed.remote()
        processes = min(self.places, expected + _FIRST_PROCESSES)
        run = functools.partial(
            _run, self._feed, here, (function, bounded), num_cpus, num_gpus, processes
        )
        self._thread = threading.Thread(
            target=self._consume, args=(run,), name="ray-data", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        """Return the stream itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the execution; at once if not everything is done."""
        self._closed.set()
        self._feed.close.remote()
        if kind is None and not self.busy:
            self._thread.join(_CLOSE_S)
        else:
            self._kill_processes()
        # Also a tidy end, which would wait for a task that waits for a place.
        self._end.set()
        self._thread.join(_END_S)
        ray.kill(self._feed)

    def _kill_processes(self) -> None:
        # Ray Data would wait for them, and Ray start them again.
        with contextlib.suppress(RayError):
            for process in ray.get(self._feed.processes.remote(), timeout=_END_S):
                ray.kill(process)

    @property
    def busy(self) -> bool:
        """Whether rows are under way, or an error is to be raised by `take`."""
        return bool(self._rows) or self._error is not None

    @property
    def places(self) -> int:
        """How many processes there can be now."""
        if time.monotonic() - self._looked_at > _LOOK_S:
            self._looked_at = time.monotonic()
            self._places = max(1, cluster.places(self._place))
        return self._places

    @property
    def room(self) -> int:
        """How many more rows keep the processes busy; more rows only wait."""
        return (_AHEAD + _BACKLOG) * self.places * self._most - len(self._rows)

    @property
    def _most(self) -> int:
        """How many rows a block may have."""
        return max(1, min(_BLOCK_ROWS, int(_BLOCK_S / self._row_s)))

    def give(self, rows: list[Any]) -> None:
        """Queue rows, which are begun in about this order."""
        for row in rows:
            self._rows[self._numbers] = row
            self._waiting.append(self._numbers)
            self._numbers += 1
        self._cut_blocks()

    def _cut_blocks(self) -> None:
        """Make blocks of rows that wait, as many as may be under way."""
        most = _AHEAD * self.places
        while self._waiting and len(self._blocks) < most:
            # Of the last rows each process gets some, in ever smaller blocks.
            share = math.ceil(len(self._waiting) / (_AT_ONCE * self.places))
            count = max(1, min(self._most, share))
            numbers = [self._waiting.popleft() for _ in range(count)]
            tasks = [self._rows[number] for number in numbers]
            heads = [
                Head(number, self._group(task), self._timeout(task))
                for number, task in zip(numbers, tasks, strict=True)
            ]
            packed = ray.cloudpickle.dumps((heads, tasks))
            self._feed.give.remote(self._given, packed)
            self._blocks[self._given] = numbers
            self._given += 1

    def stop(self) -> None:
        """Begin no other row: `busy` ends once the rows in progress are done."""
        for number in self._waiting:
            del self._rows[number]
        self._waiting.clear()
        self._feed.stop.remote()

    def take(self, seconds: float = 1.0) -> list[tuple[Any, Any]]:
        """Return rows with their results as they come; none if none comes in time.

        Raises:
            MedrayError: The processes die, whichever rows they get.
            Exception: What the function raised.
        """
        found: list[tuple[Any, Any]] = []
        with contextlib.suppress(queue.Empty):
            wait = seconds if self._error is None else 0.0
            found += self._results(self._arrived.get(timeout=wait))
            while True:
                found += self._results(self._arrived.get_nowait())
        if self._error is not None:
            if not found:
                raise self._error
            return found
        if found:
            self._heard_at = time.monotonic()
        elif self._blocks and time.monotonic() - self._heard_at > _QUIET_S:
            self._heard_at = time.monotonic()
            if ray.get(self._feed.is_stuck.remote()):
                self._renew()
        self._cut_blocks()
        return found

    def _renew(self) -> None:
        """Start another execution of what is under way, on the nodes that are left."""
        self._renewed = True
        self._end.set()
        self._kill_processes()

    def _results(self, arrived: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(arrived, Exception):
            self._error = self._error or arrived  # raised once all results are taken
            return
        block, packed = arrived
        numbers = self._blocks.pop(block, None)
        if numbers is None:
            return  # a block that came twice
        self._feed.forget.remote(block, numbers)
        for number, one in zip(numbers, pickle.loads(packed), strict=True):
            answer: Answer = pickle.loads(one)
            if answer.kind == "again":
                self._waiting.append(number)
                continue
            row = self._rows.pop(number)
            if answer.kind == "bug":
                self._error = self._error or answer.value
            elif answer.kind == "lost":
                yield row, LostError(answer.value)
            elif answer.kind == "done":
                self._row_s += 0.2 * (answer.seconds - self._row_s)
                self._row_s = max(1e-4, self._row_s)
                yield row, answer.value

    def _consume(
        self, run: Callable[[int, range], Iterator[tuple[int, bytes]]]
    ) -> None:
        """Pass on what arrives, and last why no more does."""
        why: Exception = MedrayError("Ray Data ended before all rows were done")
        first = number = 0
        try:
            while not self._closed.is_set():
                try:
                    with cluster.streaming(block_bytes=1, end=self._end):
                        for arrived in run(number, range(first, first + _BLOCKS)):
                            self._arrived.put(arrived)
                    first += _BLOCKS
                except Exception:
                    if not self._renewed:
                        raise
                    self._renewed = False
                    self._end.clear()
                    number = ray.get(self._feed.renew.remote())
                    first = min([*self._blocks], default=self._given)
        except RayError as error:
            why = MedrayError(
                f"Ray Data ended: {' '.join(f'{error}'.split())[:300]}; what is "
                f"finished is kept, run the same command again to go on"
            )
        except Exception as error:
            why = error
        self._arrived.put(why)


def _run(
    feed: Any,
    here: dict[str, str],
    what: tuple[Callable[[Any], Any], bool],
    num_cpus: float,
    num_gpus: float,
    processes: int,
    number: int,
    blocks: range,
) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each block that is done, and its answers, pickled."""
    # Imported here, in a thread, while the feed starts: it takes a second and more.
    import ray.data
    from ray.data.block import BlockMetadata

    class Source(ray.data.Datasource):  # type: ignore[misc]
        """One read, which goes on until the feed is closed."""

        def estimate_inmemory_data_size(self) -> None:
            """Return nothing: it is not known."""

        def get_read_tasks(self, *_: Any, **__: Any) -> list[ray.data.ReadTask]:
            """Return the read."""
            metadata = BlockMetadata(None, None, None, None)
            read = functools.partial(_read, feed, number, blocks)
            return [ray.data.ReadTask(read, metadata)]

    # The read only waits: it takes no core, and the driver's node may have none.
    given = ray.data.read_datasource(
        Source(), num_cpus=0, label_selector=here, override_num_blocks=1
    )
    done = given.map_batches(
        Process,
        fn_constructor_args=(feed, *what),
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            initial_size=processes,
            max_tasks_in_flight_per_actor=_AT_ONCE,
        ),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=num_cpus,
        num_gpus=num_gpus or None,
    )
    # Without prefetching: it would hold each block back until the next is there.
    for table in done.iter_batches(
        batch_size=None, batch_format="pyarrow", prefetch_batches=0
    ):
        yield table["block"][0].as_py(), table["content"][0].as_py()


def _read(feed: Any, number: int, blocks: range) -> Iterator[pa.Table]:
    """Yield the blocks in their order, each as soon as it is given.

    A read that is repeated, for its process died, yields as many blocks as before:
    those that are done are empty.
    """
    for block in blocks:
        while (content := ray.get(feed.block.remote(number, block))) is False:
            pass  # it waited for a while
        if content is None:
            return
        yield as_table(block, content)
