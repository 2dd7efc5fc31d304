"""A GPU worker: prefetching readers, one prediction thread, asynchronous writers.

    read     processes of its own read regions and their halos, some bytes ahead
    predict  one thread; windows of successive regions share batches
    write    the same processes store the classes as the region's shards

Why it is made so: docs/decisions/0005-gpu-workers.md.

One file, because reading, predicting and writing share one budget of bytes, one end.
"""

from __future__ import annotations

import functools
import itertools
import math
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.metrics import Counter
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from medray.execution import cluster, memory
from medray.execution.actor_pool import Pool, why_lost
from medray.execution.region_io import RegionIO
from medray.execution.stage import (
    AnyRegion,
    AnyStage,
    Outcome,
    Timing,
    not_finite,
)
from medray.execution.tasks import Failure, HandedBack
from medray.slides import fetch
from medray.types import Layers


def gpu_worker_resources() -> dict[str, float]:
    """Return a GPU worker's resources: one GPU, or else all but one core of a node.

    Its I/O workers are counted here and take nothing themselves: one that had to find a
    place of its own, or to find it again after it died, could wait for good on a node
    that others have filled meanwhile.
    """
    gpu = bool(cluster.gpus())
    io_workers = 0.25 * memory.io_workers_of(gpu)
    if gpu:
        return {"num_gpus": 1, "num_cpus": min(io_workers, cluster.cpus_per_node() / 2)}
    return {"num_cpus": max(0.5, cluster.cpus_per_node() - 1) + io_workers}


def start_gpu_workers(stage: AnyStage, slides: int) -> Pool:
    """Start a GPU worker for each device that is there, at most one per slide.

    Where GPUs come on request there may be none yet: then for one. More are asked for
    by the work that is found (`medray.execution.scheduler`).
    """
    # While one batch's last regions are written the next is predicted.
    actor = ray.remote(GpuWorker).options(
        **gpu_worker_resources(), max_concurrency=memory.BATCHES
    )
    start = functools.partial(actor.remote, stage)
    # A GPU worker answers for each region of a batch, or ends itself what hangs.
    timeout = 2 * 16 * stage.timeout
    return Pool(
        start,
        "work",
        min(cluster.gpu_workers_now(), slides),
        most=cluster.gpu_workers(),
        calls=memory.BATCHES,
        timeout=lambda _: timeout,
    )


_LOOK_S = 1.0  # for a notice that the node goes


class GpuWorker:
    """One device, the readers that prefetch for it, and the writers behind it.

    One thread has the device to itself. Two batches may be under way: the second is
    read while the first is predicted, and predicted while the last regions of the
    first are written.
    """

    def __init__(self, stage: AnyStage) -> None:
        """Start to load the models onto the device, and the processes that read."""
        assert stage.device is not None
        self._device = stage.device
        gpu = bool(ray.get_gpu_ids())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._loading = self._thread.submit(self._load)
        self._ahead_bytes = memory.AHEAD_BYTES[gpu]
        self._group = 8 if gpu else 1
        self._io_workers = _IoWorkers(stage, gpu)
        self._notice = _Notice()
        self._quarantined: dict[str, Failure] = {}  # slides that end processes
        self._regions = Counter("medray_regions", "Regions predicted.")
        self._pixels = Counter("medray_pixels", "Pixels predicted.")
        self._failures = Counter("medray_region_failures", "Regions that failed.")
        self._waited = Counter(
            "medray_region_wait_seconds", "How long a device waited for pixels."
        )

    def _load(self) -> Any:
        predictor = self._device.load(cluster.cpus_per_node())
        predictor.warm_up()
        return predictor

    def work(self, tasks: list[AnyRegion]) -> Iterator[list[Outcome | HandedBack]]:
        """Work on a batch of regions; yield the result of each, in their order.

        Raises:
            MedrayError: The models cannot be used.
        """
        self._loading.result()
        # All of this node's processes find the copies then.
        for uri in sorted({task.slide.uri for task in tasks if task.slide.copied}):
            for _ in fetch(uri):
                yield []
        outcomes: list[Outcome | HandedBack] = []
        for outcome in self._work(tasks):
            outcomes.append(outcome)
            if len(outcomes) == self._group:
                yield outcomes
                outcomes = []
        if outcomes:
            yield outcomes

    def _work(self, tasks: list[AnyRegion]) -> Iterator[Outcome | HandedBack]:
        ahead = _ReadAhead(
            self._io_workers,
            tasks,
            self._device.read_bytes,
            self._ahead_bytes,
            self._quarantined,
            self._notice,
        )
        predicted: queue.Queue[Any] = queue.Queue(memory.UNWRITTEN // 3)
        predicting = self._thread.submit(self._predict, ahead, predicted)
        writes: deque[_Write] = deque()
        more = True
        while more or writes:
            if writes and (
                not more
                or len(writes) > memory.UNWRITTEN * 2 // 3
                or writes[0].is_ready()
            ):
                outcome = writes.popleft().result()
                if isinstance(outcome, Failure):
                    self._failures.inc()
                yield outcome
                continue
            try:
                item = predicted.get(timeout=0.1 if writes else None)
            except queue.Empty:
                continue
            if item is None:
                predicting.result()  # raises what went wrong
                more = False
            else:
                writes.append(_Write(self._io_workers, item))

    def _predict(self, ahead: _ReadAhead, predicted: queue.Queue[Any]) -> None:
        """Predict a batch in the device's thread; None ends the queue of results."""
        try:
            for item in self._predicted(ahead):
                predicted.put(item)
        finally:
            predicted.put(None)

    def _predicted(
        self, ahead: _ReadAhead
    ) -> Iterator[_Predicted | Failure | HandedBack]:
        """Yield the result of each region, in their order."""
        waiting: deque[_Read] = deque()  # their results are to come, in their order
        passing: deque[list[_Predicted | Failure | HandedBack]] = deque([[]])

        def regions() -> Iterator[Any]:
            for item in ahead:
                if not isinstance(item, _Read):
                    passing[-1].append(item)
                elif item.arrays is None:
                    passing[-1].append(_Predicted(item.task, item.seen, {}, None))
                else:
                    waiting.append(item)
                    passing.append([])
                    self._waited.inc(item.waited_s)
                    yield self._device.source(item.task, item.seen, item.arrays)

        start = time.perf_counter()
        for result in self._loading.result().predict(regions()):
            yield from passing.popleft()
            read = waiting.popleft()
            timing = Timing(read.waited_s, time.perf_counter() - start)
            self._regions.inc()
            self._pixels.inc(read.task.region.height * read.task.region.width)
            if result.finite:
                layers = self._device.layers(result)
                yield _Predicted(read.task, read.seen, layers, timing)
            else:
                yield not_finite(read.task)
            start = time.perf_counter()
        yield from passing.popleft()


@dataclass(frozen=True)
class _Read:
    """A region that was read, and how many seconds its pixels were waited for."""

    task: AnyRegion
    seen: Any
    arrays: Layers | None
    waited_s: float


@dataclass(frozen=True)
class _Predicted:
    """A region whose arrays are to be written; no timing: there was nothing to do."""

    task: AnyRegion
    seen: Any
    layers: Layers
    timing: Timing | None


class _Write:
    """A region that is being written, or of which there is nothing to write."""

    def __init__(
        self, io_workers: _IoWorkers, item: _Predicted | Failure | HandedBack
    ) -> None:
        self._item = item
        if isinstance(item, _Predicted):
            what = (item.task, item.seen, item.layers, item.timing)
            self._started = io_workers.start("write", *what)

    def is_ready(self) -> bool:
        return not isinstance(self._item, _Predicted) or self._started.is_ready()

    def result(self) -> Outcome | HandedBack:
        if not isinstance(self._item, _Predicted):
            return self._item
        try:
            outcome: Outcome = self._started.result()
        except ray.exceptions.RayError as error:
            uri = self._item.task.slide.uri
            return Failure(f"{uri}: the writer was lost twice: {why_lost(error)}")
        return outcome


class _Notice:
    """Whether this node is being drained: then nothing new is begun on it."""

    def __init__(self) -> None:
        self._node = ray.get_runtime_context().get_node_id()
        self._looked_at, self._leaves = -math.inf, False

    def __bool__(self) -> bool:
        now = time.monotonic()
        if not self._leaves and now - self._looked_at > _LOOK_S:
            self._looked_at = now
            self._leaves = self._node in cluster.leaving_nodes()
        return self._leaves


class _IoWorkers:
    """The processes that read and write a GPU worker's regions.

    Actors rather than tasks: Ray ends a process that had no task for a second, and a
    GPU worker without a GPU sends tasks less often; starting a process costs as much
    as a region.
    """

    def __init__(self, stage: AnyStage, gpu: bool) -> None:
        self._stage = stage
        # On the GPU worker's own node, so that pixels go through shared memory.
        here = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        actor = ray.remote(RegionIO).options(
            num_cpus=0, max_restarts=-1, scheduling_strategy=here
        )
        self._actors = [actor.remote(stage) for _ in range(memory.io_workers_of(gpu))]
        # Readers and writers take turns from opposite ends.
        self._turns = {
            "read": itertools.cycle(self._actors),
            "write": itertools.cycle(reversed(self._actors)),
        }

    def start(self, name: str, *args: Any) -> _Started:
        """Start to `read` or to `write`."""
        return _Started(self._stage, name, args, next(self._turns[name]))


class _Started:
    """Work that was given to a worker."""

    def __init__(
        self, stage: AnyStage, name: str, args: tuple[Any, ...], io_worker: Any
    ) -> None:
        self._stage, self._name, self._args = stage, name, args
        self._returns = 2 if name == "read" else 1
        self._io_worker = io_worker
        method = getattr(io_worker, name)
        self._ref = method.options(num_returns=self._returns).remote(*args)

    def is_ready(self) -> bool:
        refs = self._ref if isinstance(self._ref, list) else [self._ref]
        return bool(ray.wait(refs, num_returns=len(refs), timeout=0)[0])

    def result(self) -> Any:
        """Wait for the result.

        When a process dies or is ended for it hangs, all that was given to it is lost,
        also what is innocent. So each is repeated once in a process of its own.

        Raises:
            ray.exceptions.RayError: That one died too, or hangs.
        """
        try:
            return ray.get(self._ref, timeout=self._stage.timeout)
        except ray.exceptions.GetTimeoutError:
            ray.kill(self._io_worker, no_restart=False)
        except ray.exceptions.RayError:
            pass
        alone = (
            ray.remote(_alone)
            .options(num_cpus=0, max_retries=0, num_returns=self._returns)
            .remote(self._stage, self._name, self._args)
        )
        try:
            return ray.get(alone, timeout=self._stage.timeout)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(alone[0] if isinstance(alone, list) else alone, force=True)
            raise


def _alone(stage: AnyStage, name: str, args: tuple[Any, ...]) -> Any:
    """Read or write in a process of its own."""
    return getattr(RegionIO(stage), name)(*args)


class _ReadAhead:
    """Reads the regions of a batch in their order, some bytes ahead."""

    def __init__(
        self,
        io_workers: _IoWorkers,
        tasks: list[AnyRegion],
        read_bytes: Callable[[AnyRegion], int],
        ahead_bytes: int,
        quarantined: dict[str, Failure],
        notice: _Notice,
    ) -> None:
        self._io_workers, self._quarantined = io_workers, quarantined
        self._read_bytes = read_bytes
        self._notice = notice
        self._todo = deque(tasks)
        self._under_way: deque[tuple[AnyRegion, _Started | None]] = deque()
        self._free = ahead_bytes
        self._fill()

    def _fill(self) -> None:
        while self._todo and (self._free > 0 or not self._under_way):
            if self._notice:
                return
            task = self._todo.popleft()
            self._free -= self._read_bytes(task)
            reading = None
            if task.slide.slide not in self._quarantined:
                reading = self._io_workers.start("read", task)
            self._under_way.append((task, reading))

    def __iter__(self) -> Iterator[_Read | Failure | HandedBack]:
        """Yield the result of reading each region."""
        while self._under_way:
            task, reading = self._under_way.popleft()
            start = time.perf_counter()
            self._free += self._read_bytes(task)
            item = self._read(task, reading, start)
            self._fill()
            yield item
        for _ in self._todo:
            yield HandedBack()

    def _read(
        self, task: AnyRegion, reading: _Started | None, start: float
    ) -> _Read | Failure:
        slide = task.slide
        if reading is not None and slide.slide not in self._quarantined:
            try:
                seen, arrays = reading.result()
            except ray.exceptions.RayError as error:
                # No other region of it shall cost two processes.
                self._quarantined[slide.slide] = Failure(
                    f"{slide.uri}: quarantined: reading {task.where} twice ended "
                    f"with: {why_lost(error)}",
                    quarantined=True,
                )
            else:
                if isinstance(seen, Failure):
                    return seen
                return _Read(task, seen, arrays, time.perf_counter() - start)
        return self._quarantined[slide.slide]
