"""Batches for the training loop, read by separate processes, in order.

A batch is the few crops that go through the network together: a micro batch of a step,
or some of the validation patches. The process that reads it writes its arrays into
memory of the training's process, which views them where they lie.

One file, because what writes and what views that memory must agree on its layout.
"""

from __future__ import annotations

import functools
import itertools
import mmap
import os
import pickle
import queue
import traceback
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np

from medray.errors import LostError, MedrayError
from medray.execution import Isolated
from medray.training.crops import (
    Batch,
    Stack,
    count_val_batches,
    read_train,
    read_val,
    val_batch_size,
)
from medray.training.sampler import Sampling
from medray.types import UInt8

if TYPE_CHECKING:  # the processes that read do without torch
    from medray.training.progress import Progress
    from medray.training.schedule import Schedule
    from medray.training.world import World

_MOST_READERS = 8  # a worker's processes that read
_TRIES = 3  # processes that may end of one batch
_LONGEST_S = 600.0  # that a batch may take: a store may stall
_ALIGNED = 64  # bytes
# Of malloc, see mallopt(3): what a crop took is kept for the next one. By itself it is
# given back and taken again for each batch, a fifth of a reader's time.
_KEEP_MEMORY = {
    "MALLOC_TRIM_THRESHOLD_": f"{64 << 20}",
    "MALLOC_MMAP_THRESHOLD_": f"{32 << 20}",
}
_CALL_PX = 64 * 256**2  # that a call reads: small batches are not worth one each


class BatchIndex(NamedTuple):
    """Which batch of a training; those of validation follow an epoch's last step."""

    epoch: int
    step: int
    micro_batch: int


@dataclass(frozen=True)
class Source:
    """What batches are read from.

    Attributes:
        data: Dataset.
        sampling: Which crops come when.
        steps: Of an epoch.
        losses: (N,) float64 of the patches that the order follows, see
            medray.training.sampler.
    """

    data: str
    sampling: Sampling
    steps: int
    losses: bytes = b""

    def read(self, index: BatchIndex, stack: Stack = np.stack) -> Batch:
        """Read a batch in this process.

        Args:
            index: Which one.
            stack: Makes the batch's arrays of those of the crops.

        Raises:
            FormatError: The dataset is damaged beyond what is endured.
        """
        epoch, step, number = index
        if step == self.steps:
            count = val_batch_size(self.data)
            return read_val(self.data, self.sampling, number * count, count, stack)
        first = step * self.sampling.batch + number * self.sampling.micro_batch_size
        return read_train(self.data, self.sampling, epoch, first, self.losses, stack)


def read_epochs(
    data: str,
    sampling: Sampling,
    schedule: Schedule,
    progress: Progress,
    world: World,
    steps: int,
) -> Generator[tuple[int, Iterator[Batch]]]:
    """Yield each epoch that is left, and the batches that are read for this worker.

    The next epoch is under way while this one ends, unless its order follows the losses
    of this one.
    """
    count = (os.cpu_count() or 1) // (2 * world.local_size)
    count = min(_MOST_READERS, max(1, count))
    hard = bool(sampling.data.hard)
    with Readers(count, pinned=world.device.type == "cuda") as readers:
        while not progress.is_over(schedule):
            losses = progress.order_losses.numpy().tobytes() if hard else b""
            source = Source(data, sampling, steps, losses)
            first = progress.epoch
            epochs = range(first, first + 1 if hard else schedule.epochs)
            indices = _list_batches(source, epochs, progress.step, world)
            stream = readers.read(source, indices)
            for epoch in epochs:
                yield epoch, stream


def _list_batches(
    source: Source, epochs: range, first_step: int, world: World
) -> Iterator[BatchIndex]:
    """Yield the indices of a worker's batches of epochs, the first from a step on."""
    micro_batches = world.share(source.sampling.micro_batches)
    checks = world.share(count_val_batches(source.data, source.sampling))
    for epoch in epochs:
        for step in range(first_step, source.steps):
            yield from (BatchIndex(epoch, step, number) for number in micro_batches)
        yield from (BatchIndex(epoch, source.steps, number) for number in checks)
        first_step = 0


class Readers:
    """Processes that read batches; one that ends is replaced."""

    def __init__(self, count: int, *, pinned: bool = False) -> None:
        """Start nothing yet.

        Args:
            count: Processes.
            pinned: Have pixels in memory that a GPU copies from while it computes.
        """
        self._count, self._pinned = count, pinned
        self._threads = ThreadPoolExecutor(count, "reader")  # that call them
        self._all = [
            Isolated(bounded=False, environment=_KEEP_MEMORY) for _ in range(count)
        ]
        self._idle: queue.SimpleQueue[Isolated] = queue.SimpleQueue()
        for reader in self._all:
            self._idle.put(reader)
        self._free: queue.SimpleQueue[_Memory] = queue.SimpleQueue()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the processes, with the batches in progress."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for reader in self._all:
            reader.close()

    def read(self, source: Source, indices: Iterable[BatchIndex]) -> Iterator[Batch]:
        """Read batches in the order of their indices, two calls per process ahead.

        Raises:
            FormatError: The dataset is damaged beyond what is endured.
            LostError: One process after the other ended of a batch.
        """
        ahead: deque[Future[list[Batch | Exception]]] = deque()
        sides = source.sampling.data.crops
        pixels = source.sampling.micro_batch_size * max(sides) ** 2
        for some in itertools.batched(indices, max(1, _CALL_PX // pixels)):
            ahead.append(self._threads.submit(self._read, source, some))
            if len(ahead) > 2 * self._count:
                yield from _raising(ahead.popleft().result())
        while ahead:
            yield from _raising(ahead.popleft().result())

    def _read(
        self, source: Source, indices: Sequence[BatchIndex]
    ) -> list[Batch | Exception]:
        reader, how = self._idle.get(), ""
        try:
            for _ in range(_TRIES):
                try:
                    found = self._read_by(reader, source, indices)
                except LostError as error:  # the next call starts a process
                    how = f"{error}"
                    continue
                return [_pin(one) for one in found] if self._pinned else found
        finally:
            self._idle.put(reader)
        epoch, step, _ = indices[0]
        raise LostError(
            f"epoch {epoch}, step {step}: {_TRIES} processes that were to read its "
            f"crops ended, the last one: {how}; if the system's log says that memory "
            f"ran out, free some; run the same command again to go on"
        )

    def _read_by(
        self, reader: Isolated, source: Source, indices: Sequence[BatchIndex]
    ) -> list[Batch | Exception]:
        """Read batches in one of the processes."""
        try:
            memory = self._free.get_nowait()
        except queue.Empty:
            memory = _Memory()
        told = reader.call(_read_into, (source, indices, memory.name), _LONGEST_S)
        arrays = memory.look(self._free)
        found: list[Batch | Exception] = []
        for one in told:
            if not isinstance(one, Exception):
                pickled, places = one
                buffers = [arrays[at : at + length] for at, length in places]
                one = pickle.loads(pickled, buffers=buffers)
            found.append(one)
        return found


class _Memory:
    """Memory that a process writes batches into.

    It is reused once no array views it: new pages cost a virtual machine more than what
    is copied into them.
    """

    def __init__(self) -> None:
        self._file = os.memfd_create("batches")
        os.truncate(self._file, 1)  # what is empty cannot be mapped
        weakref.finalize(self, os.close, self._file)
        self._map: mmap.mmap | None = None
        self.name = f"/proc/{os.getpid()}/fd/{self._file}"

    def look(self, free: queue.SimpleQueue[_Memory]) -> UInt8:
        """Return the bytes; this is free once no array views them any more."""
        size = os.fstat(self._file).st_size
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self._file, size)
        found: UInt8 = np.frombuffer(self._map, np.uint8)
        weakref.finalize(found, free.put, self)
        return found


def _raising(found: Iterable[Batch | Exception]) -> Iterator[Batch]:
    """Yield batches; raise the error where one stands for a batch."""
    for one in found:
        if isinstance(one, Exception):
            raise one
        yield one


class _Shared:
    """Arrays in a memory of the process that called, which maps it too."""

    def __init__(self, name: str) -> None:
        self._file = os.open(name, os.O_RDWR)
        self._map = mmap.mmap(-1, 1)
        self._end = 0
        self._offsets: dict[int, int] = {}  # of arrays, by their address

    def clear(self) -> None:
        """Reuse the memory from the first array on."""
        self._end, self._offsets = 0, {}

    def stack(self, arrays: Sequence[UInt8]) -> UInt8:
        """Do as `np.stack`, into an array that lies here."""
        whole = self._allocate(len(arrays) * arrays[0].nbytes)
        whole = whole.reshape(len(arrays), *arrays[0].shape)
        return np.stack(arrays, out=whole)

    def place(self, array: pickle.PickleBuffer) -> tuple[int, int]:
        """Return offset and bytes of an array, which is copied if it is not here."""
        raw = np.frombuffer(array, np.uint8)
        if (at := self._offsets.get(raw.ctypes.data)) is None:
            at = self._end
            self._allocate(raw.nbytes)[:] = raw
        return at, raw.nbytes

    def _allocate(self, count: int) -> UInt8:
        at, end = self._end, self._end + count
        if end > len(self._map):
            # Never smaller than a process before this one has made it. Arrays that lie
            # in the old map keep it: it shows the same pages.
            size = max(2 * end, os.fstat(self._file).st_size)
            os.truncate(self._file, size)
            self._map = mmap.mmap(self._file, size)
        whole = np.frombuffer(self._map, np.uint8, end)[at:]
        self._offsets[whole.ctypes.data] = at
        self._end = -(-end // _ALIGNED) * _ALIGNED
        return whole


# New pages cost a virtual machine more than what is written there, so maps are kept.
_shared = functools.cache(_Shared)


def _read_into(
    task: tuple[Source, Sequence[BatchIndex], str],
) -> list[tuple[bytes, list[tuple[int, int]]] | Exception]:
    """Read batches into the memory of a name, in a process of its own.

    Returns:
        Of each batch, itself pickled without its arrays, and where each of these lies
        in the memory. An error stands for a batch that is not there; none is read
        after.
    """
    source, indices, name = task
    found: list[tuple[bytes, list[tuple[int, int]]] | Exception] = []
    shared = _shared(name)
    shared.clear()
    for index in indices:
        try:
            batch = source.read(index, shared.stack)
        except MedrayError as error:
            found.append(error)
            break
        except Exception:  # another process would only do the same
            found.append(RuntimeError(f"{index}: {traceback.format_exc()}"))
            break
        arrays: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(batch, protocol=5, buffer_callback=arrays.append)
        found.append((pickled, [shared.place(array) for array in arrays]))
    return found


def _pin(batch: Batch | Exception) -> Batch | Exception:
    """Return a batch whose pixels a GPU can copy while it computes."""
    import torch

    if isinstance(batch, Exception):
        return batch

    def pin(pixels: UInt8) -> UInt8:
        pinned: UInt8 = torch.from_numpy(pixels).pin_memory().numpy()
        return pinned

    unlabelled = batch.unlabelled
    return replace(
        batch,
        images=pin(batch.images),
        masks=pin(batch.masks),
        unlabelled=None if unlabelled is None else pin(unlabelled),
    )
