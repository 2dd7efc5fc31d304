"""What the training loop is fed: batches, read by Ray Data, in order.

A batch is the few crops that go through the network together: a micro batch of a step,
or some of the validation patches. It travels as one row of bytes, so that epochs may
differ in the size of their crops, and it is looked at where it lies in Ray's object
store.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from medray.errors import FormatError
from medray.execution import cluster
from medray.training.crops import (
    Batch,
    count_val_batches,
    read_train,
    read_val,
    val_batch_size,
)
from medray.training.sampler import Sampling
from medray.types import Row

if TYPE_CHECKING:  # the processes that read do without torch
    from medray.training.progress import Progress
    from medray.training.schedule import Schedule
    from medray.training.world import World

_CHAIN_BATCHES = 4096  # that one chain of Ray Data reads
_TASK_BATCHES = 4  # that a task of Ray Data reads
_MOST_READERS = 8  # a worker's processes that read


class BatchIndex(NamedTuple):
    """Which batch of a training; those of validation follow an epoch's last step."""

    epoch: int
    step: int
    micro_batch: int


def read_epochs(
    data: str,
    sampling: Sampling,
    schedule: Schedule,
    progress: Progress,
    world: World,
    steps: int,
) -> Iterator[tuple[int, Iterator[Batch]]]:
    """Yield each epoch that is left, and the batches that are read for this worker.

    One chain of Ray Data reads several epochs, so that the next one is under way while
    this one ends; where the order follows the losses, it reads one.
    """
    checks = count_val_batches(data, sampling)
    readers = (os.cpu_count() or 1) // (2 * world.local_size)
    readers = min(_MOST_READERS, max(1, readers))
    hard = bool(sampling.data.hard)
    while not progress.is_over(schedule):
        indices: list[BatchIndex] = []
        first = end = progress.epoch
        while end < schedule.epochs and (
            end == first or (len(indices) < _CHAIN_BATCHES and not hard)
        ):
            begin = progress.step if end == first else 0
            share = world.share(sampling.micro_batches)
            indices += [
                BatchIndex(end, s, m) for s in range(begin, steps) for m in share
            ]
            indices += [BatchIndex(end, steps, batch) for batch in world.share(checks)]
            end += 1
        losses = progress.order_losses.numpy().tobytes() if hard else b""
        stream = read_batches(indices, sampling, data, steps, losses, readers)
        for epoch in range(first, end):
            yield epoch, stream


def read_batches(
    indices: Sequence[BatchIndex],
    sampling: Sampling,
    data: str,
    steps: int,
    losses: bytes,
    readers: int,
) -> Iterator[Batch]:
    """Read batches in the order of their indices, some of them ahead.

    Args:
        indices: Which batches.
        sampling: Which crops come when.
        data: Dataset.
        steps: Of an epoch.
        losses: (N,) float64 of the patches that the order follows, see
            medray.training.sampler.
        readers: Processes that read at a time.

    Raises:
        FormatError: The dataset is damaged beyond what is endured.
    """
    blocks = [
        pa.Table.from_pylist([index._asdict() for index in some])
        for some in itertools.batched(indices, _TASK_BATCHES)
    ]
    # A block is a batch: larger ones would have to be taken apart by copying.
    with cluster.streaming(block_bytes=1, in_order=True):
        tables = (
            ray.data.from_arrow(blocks)
            .map_batches(
                _read_rows,
                fn_args=(sampling, data, steps, losses),
                batch_size=None,
                num_cpus=0.25,
                compute=ray.data.TaskPoolStrategy(size=readers),
            )
            .iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        )
        for table in tables:
            for index in range(table.num_rows):
                yield _to_batch({key: table[key][index] for key in table.column_names})


def _read_rows(
    rows: Row, sampling: Sampling, data: str, steps: int, losses: bytes
) -> Iterator[pa.Table]:
    for values in zip(*(rows[name] for name in BatchIndex._fields), strict=True):
        index = BatchIndex(*map(int, values))
        yield _read_batch(index, sampling, data, steps, losses)


def _read_batch(
    index: BatchIndex, sampling: Sampling, data: str, steps: int, losses: bytes
) -> pa.Table:
    epoch, step, number = index
    try:
        if step == steps:
            count = val_batch_size(data)
            batch = read_val(data, sampling, number * count, count)
        else:
            first = step * sampling.batch + number * sampling.micro_batch_size
            batch = read_train(data, sampling, epoch, first, losses)
    except FormatError as error:
        # Raised where the batch is wanted; here Ray would wrap it up.
        return pa.Table.from_pylist([{"failure": f"{error}"}], _SCHEMA)
    unlabelled = batch.unlabelled
    row = {
        "failure": "",
        "shape": list(batch.images.shape),
        "images": batch.images.tobytes(),
        "masks": batch.masks.tobytes(),
        "unlabelled": None if unlabelled is None else unlabelled.tobytes(),
        "patches": batch.patches.tolist(),
        "sizes": batch.sizes.ravel().tolist(),
        "damaged": json.dumps(batch.damaged),
    }
    return pa.Table.from_pylist([row], _SCHEMA)


_SCHEMA = pa.schema(
    {
        "failure": pa.string(),
        "shape": pa.list_(pa.int64()),
        "images": pa.large_binary(),
        "masks": pa.large_binary(),
        "unlabelled": pa.large_binary(),
        "patches": pa.list_(pa.int64()),
        "sizes": pa.list_(pa.int64()),
        "damaged": pa.string(),
    }
)


def _to_batch(row: dict[str, Any]) -> Batch:
    """Return a batch that looks at the bytes of a row where they lie.

    Raises:
        FormatError: It could not be read.
    """
    if failure := row["failure"].as_py():
        raise FormatError(failure)
    shape = row["shape"].as_py()

    def pixels(name: str) -> npt.NDArray[np.uint8]:
        return np.frombuffer(row[name].as_buffer(), np.uint8)

    return Batch(
        images=pixels("images").reshape(shape),
        masks=pixels("masks").reshape(shape[0], *shape[2:]),
        patches=np.array(row["patches"].as_py(), np.int64),
        sizes=np.array(row["sizes"].as_py(), np.int64).reshape(-1, 2),
        damaged=json.loads(row["damaged"].as_py()),
        unlabelled=pixels("unlabelled").reshape(-1, *shape[1:])
        if row["unlabelled"].is_valid
        else None,
    )
