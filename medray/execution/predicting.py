"""A device in this process, between processes that read regions and write them.

plan, finish   in the processes, as in any stream
read           in the processes: a region -> its arrays
predict        in a thread of this process; windows of successive regions share batches
write          in the processes: the layers -> its record
"""

from __future__ import annotations

import functools
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Self

from medray.execution.processes import Processes
from medray.execution.stage import (
    AnyRegion,
    AnyStage,
    Timing,
    not_finite,
    read_region,
    write_region,
)
from medray.execution.streamed import AnyTask, do_task, slide_of, timeout_of
from medray.execution.tasks import Failure, RegionTask
from medray.slides import fetch
from medray.types import Layers

REGIONS = 6
"""Regions that are read, predicted or written at once."""


_END_S = 5.0  # in which what is being predicted at the end is done


def io_processes() -> int:
    """Return how many processes read and write for a device of this machine."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


@dataclass(frozen=True)
class _Read:
    """A region that was read."""

    task: AnyRegion
    seen: Any
    arrays: Layers


@dataclass(frozen=True)
class _Write:
    """A region whose layers are to be written; no timing: there was nothing to do."""

    task: AnyRegion
    seen: Any
    layers: Layers
    timing: Timing | None


@dataclass(frozen=True)
class _Predicted:
    """A region that was predicted, and what is to be done now."""

    next: _Write | Failure
    task: AnyRegion


class PredictingStream:
    """A stream of the tasks of a stage with a device; see `streamed.RowStream`."""

    def __init__(self, stage: AnyStage) -> None:
        """Start to load the models, and no process yet."""
        assert stage.device is not None
        self._device = stage.device
        self._processes = Processes(
            functools.partial(_do, stage),
            timeout=functools.partial(_timeout_of, stage),
            group=_slide_of,
            processes=io_processes(),
        )
        self._under_way = self._reading = 0  # regions
        self._reads: queue.SimpleQueue[_Read | None] = queue.SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(
            target=self._predict, name="device", daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        """Return the stream itself."""
        return self

    def __exit__(self, *args: object) -> None:
        """End the processes, with the tasks in progress."""
        self._closed = True
        self._reads.put(None)
        self._processes.__exit__(*args)
        self._thread.join(_END_S)

    @property
    def busy(self) -> bool:
        """Whether tasks are under way, or an error is to be raised by `take`."""
        return self._under_way > 0 or self._processes.busy

    @property
    def places(self) -> int:
        """How many processes read and write."""
        return self._processes.places

    @property
    def room(self) -> int:
        """How many more tasks keep the device busy."""
        return min(REGIONS - self._under_way, self._processes.room)

    def give(self, rows: list[AnyTask]) -> None:
        """Queue tasks, which are begun in this order."""
        regions = sum(isinstance(row, RegionTask) for row in rows)
        self._under_way += regions
        self._reading += regions
        self._processes.give(rows)

    def stop(self) -> None:
        """Begin no other task: `busy` ends once the tasks in progress are done."""
        for row in self._processes.withdraw():
            if isinstance(row, _Write):
                self._processes.give([row])
            elif isinstance(row, RegionTask):
                self._reading -= 1
                self._under_way -= 1
        self._reads.put(None)  # the device may wait for one of them

    def take(self, seconds: float = 1.0) -> list[tuple[AnyTask, Any]]:
        """Return tasks with their results as they come; none if none comes in time.

        Raises:
            MedrayError: The models cannot be used, or the processes die.
        """
        found: list[tuple[AnyTask, Any]] = []
        for row, result in self._processes.take(seconds):
            match row:
                case RegionTask():
                    self._reading -= 1
                    if isinstance(result, (Exception, Failure)):
                        found.append((row, result))
                    elif result[1] is None:
                        self._processes.give([_Write(row, result[0], {}, None)])
                    else:
                        self._reads.put(_Read(row, *result))
                        continue
                    self._reads.put(None)  # the device may wait for it
                case _Predicted():
                    if isinstance(row.next, _Write):
                        self._processes.give([row.next])
                    else:
                        found.append((row.task, row.next))
                case _Write():
                    found.append((row.task, result))
                case _:
                    found.append((row, result))
        self._under_way -= sum(isinstance(task, RegionTask) for task, _ in found)
        return found

    # --- the device's thread ----------------------------------------------------------

    def _predict(self) -> None:
        try:
            # Not warmed up: with little work that is as long as what it saves.
            predictor = self._device.load(len(os.sched_getaffinity(0)))
            while not self._closed:
                if (first := self._reads.get()) is not None:
                    self._predict_burst(predictor, first)
        except Exception as error:
            self._processes.fail(error)

    def _predict_burst(self, predictor: Any, first: _Read) -> None:
        """Predict regions until none is being read."""
        taken: deque[tuple[_Read, float]] = deque()

        def sources() -> Iterator[Any]:
            read: _Read | None = first
            start = time.perf_counter()
            while not self._closed:
                if read is not None:
                    taken.append((read, time.perf_counter() - start))
                    yield self._device.source(read.task, read.seen, read.arrays)
                    start = time.perf_counter()
                if self._reads.empty() and self._reading == 0:
                    return
                read = self._reads.get()

        start = time.perf_counter()
        for result in predictor.predict(sources()):
            read, waited_s = taken.popleft()
            timing = Timing(waited_s, time.perf_counter() - start)
            after: _Write | Failure = not_finite(read.task)
            if result.finite:
                layers = self._device.layers(result)
                after = _Write(read.task, read.seen, layers, timing)
            self._processes.tell(_Predicted(after, read.task))
            start = time.perf_counter()


type _Row = AnyTask | _Write


def _do(stage: AnyStage, row: _Row) -> Generator[None, None, Any]:
    """Do the part of a task that needs no device, in an I/O process."""
    match row:
        case _Write():
            return write_region(stage, row.task, row.seen, row.layers, row.timing)
        case RegionTask():
            for _ in fetch(row.slide.uri) if row.slide.copied else ():
                yield
            return read_region(stage, row)
        case _:
            return (yield from do_task(stage, row))


def _timeout_of(stage: AnyStage, row: _Row) -> float:
    return stage.timeout if isinstance(row, _Write) else timeout_of(stage, row)


def _slide_of(row: _Row) -> str:
    return slide_of(row.task if isinstance(row, _Write) else row)
