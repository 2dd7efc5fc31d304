"""A GPU worker: one device, and all that keeps it busy.

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
from typing import Any

import ray
from ray.util.metrics import Counter
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from medray.execution import cluster, memory
from medray.execution.actor_pool import Pool, why_lost
from medray.execution.region_io import RegionIO
from medray.execution.stage import Stage, not_finite, outcome
from medray.slides import fetch
from medray.types import Layers, Row, UInt8


def gpu_worker_resources() -> dict[str, float]:
    """One GPU worker a GPU; without GPUs one a node, all but a core of it.

    Its I/O workers are counted here and take nothing themselves: one that had to find a
    place of its own, or to find it again after it died, could wait for good on a node
    that others have filled meanwhile.
    """
    gpu = bool(cluster.gpus())
    io_workers = 0.25 * memory.io_workers_of(gpu)
    if gpu:
        return {"num_gpus": 1, "num_cpus": min(io_workers, cluster.cpus_per_node() / 2)}
    return {"num_cpus": max(0.5, cluster.cpus_per_node() - 1) + io_workers}


def start_gpu_workers(stage: Stage, slides: int) -> Pool:
    """Start a GPU worker for each device that is there, but no more than slides.

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
    """One device with all that keeps it busy: readers ahead of it, writers behind.

    One thread has the device to itself. Two batches may be under way: the second is
    read while the first is predicted, and predicted while the last regions of the
    first are written.
    """

    def __init__(self, stage: Stage) -> None:
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
        self._lost: dict[str, str] = {}  # slides whose regions end processes, and how
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

    def work(self, rows: list[Row]) -> Iterator[list[Row | None]]:
        """Work on a batch of regions; give what came of each, in their order.

        None hands a region back that was not begun when this node was told to go.

        Raises:
            MedrayError: The models cannot be used.
        """
        self._loading.result()
        # All of this node's processes find the copies then.
        for uri in sorted({row["uri"] for row in rows if row.get("copied")}):
            for _ in fetch(uri):
                yield []
        outcomes: list[Row | None] = []
        for row in self._work(rows):
            outcomes.append(None if "left" in row else outcome(row))
            if len(outcomes) == self._group:
                yield outcomes
                outcomes = []
        if outcomes:
            yield outcomes

    def _work(self, rows: list[Row]) -> Iterator[Row]:
        ahead = _ReadAhead(
            self._io_workers,
            rows,
            self._device.read_bytes,
            self._ahead_bytes,
            self._lost,
            self._notice,
        )
        predicted: queue.Queue[Any] = queue.Queue(memory.UNWRITTEN // 3)
        predicting = self._thread.submit(self._predict, ahead, predicted)
        writes: deque[tuple[Row, Any]] = deque()
        more = True
        while more or writes:
            if writes and (
                not more
                or len(writes) > memory.UNWRITTEN * 2 // 3
                or _is_ready(writes[0][1])
            ):
                yield self._outcome(*writes.popleft())
                continue
            try:
                item = predicted.get(timeout=0.1 if writes else None)
            except queue.Empty:
                continue
            if item is None:
                predicting.result()  # raises what went wrong
                more = False
            else:
                writes.append((item[0], self._start_writing(*item)))

    def _predict(self, ahead: _ReadAhead, predicted: queue.Queue[Any]) -> None:
        """Predict a batch in the device's thread; None ends what it gives."""
        try:
            for item in self._predicted(ahead):
                predicted.put(item)
        finally:
            predicted.put(None)

    def _predicted(self, ahead: _ReadAhead) -> Iterator[tuple[Row, Layers]]:
        """Yield the rows in their order, with what the models make of their pixels."""
        waiting: deque[tuple[Row, bool]] = deque()

        def regions() -> Iterator[Any]:
            for row, pixels, waited in ahead:
                waiting.append((row, pixels is not None))
                if pixels is not None:
                    self._waited.inc(waited)
                    row["waited_s"] = waited
                    yield self._device.source(row, pixels)

        def passed_through() -> Iterator[tuple[Row, Layers]]:
            while waiting and not waiting[0][1]:
                yield waiting.popleft()[0], {}

        start = time.perf_counter()
        for result in self._loading.result().predict(regions()):
            yield from passed_through()
            row, _ = waiting.popleft()
            row["predict_s"] = time.perf_counter() - start
            self._regions.inc()
            self._pixels.inc(row["region"][2] * row["region"][3])
            if not result.finite:
                row = row | not_finite(row)
            yield row, self._device.layers(result)
            start = time.perf_counter()
        yield from passed_through()

    def _start_writing(self, row: Row, layers: Layers) -> Any:
        if "error" in row or "left" in row:
            return None
        return self._io_workers.start("write", row, layers)

    def _outcome(self, row: Row, write: Any) -> Row:
        if write is not None:
            try:
                row = write.result()
            except ray.exceptions.RayError as error:
                why = f"{row['uri']}: the writer was lost twice: {why_lost(error)}"
                row = row | {"error": why}
        if "error" in row:
            self._failures.inc()
        return row


def _is_ready(write: Any) -> bool:
    return write is None or write.is_ready()


class _Notice:
    """Whether this node was told to go: then nothing new is begun on it."""

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
    GPU worker without a GPU gives one less often; starting one costs as much as a
    region.
    """

    def __init__(self, stage: Stage, gpu: bool) -> None:
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
        self, stage: Stage, name: str, args: tuple[Any, ...], io_worker: Any
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
        """Wait for what comes of it.

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


def _alone(stage: Stage, name: str, args: tuple[Any, ...]) -> Any:
    """Read or write in a process of its own."""
    return getattr(RegionIO(stage), name)(*args)


class _ReadAhead:
    """Reads the regions of a batch in their order, some bytes ahead."""

    def __init__(
        self,
        io_workers: _IoWorkers,
        rows: list[Row],
        read_bytes: Callable[[Row], int],
        ahead_bytes: int,
        lost: dict[str, str],
        notice: _Notice,
    ) -> None:
        self._io_workers, self._lost = io_workers, lost
        self._read_bytes = read_bytes
        self._notice = notice
        self._todo = deque(rows)
        self._under_way: deque[tuple[Row, Any]] = deque()
        self._free = ahead_bytes
        self._fill()

    def _fill(self) -> None:
        while self._todo and (self._free > 0 or not self._under_way):
            if self._notice:
                return
            row = self._todo.popleft()
            self._free -= self._read_bytes(row)
            reading = None
            if row["slide"] not in self._lost:
                reading = self._io_workers.start("read", row)
            self._under_way.append((row, reading))

    def __iter__(self) -> Iterator[tuple[Row, UInt8 | None, float]]:
        """Yield each row with its pixels, and how many seconds they were waited for."""
        while self._under_way:
            row, reading = self._under_way.popleft()
            start = time.perf_counter()
            pixels: UInt8 | None = None
            self._free += self._read_bytes(row)
            slide = row["slide"]
            try:
                if reading is not None and slide not in self._lost:
                    row, pixels = reading.result()
            except ray.exceptions.RayError as error:
                # No other region of it shall cost two processes.
                self._lost[slide] = (
                    f"{row['uri']}: quarantined: reading region "
                    f"{row['region']} twice ended with: {why_lost(error)}"
                )
            if slide in self._lost:
                row = row | {"error": self._lost[slide], "lost": True}
            self._fill()
            yield row, pixels, time.perf_counter() - start
        for row in self._todo:
            yield row | {"left": True}, None, 0.0
