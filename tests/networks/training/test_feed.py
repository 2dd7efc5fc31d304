"""What a training is fed by the processes that read: what a loop would read, and no less."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medray.errors import FormatError
from medray.training import dataloader
from medray.training.crops import Batch, count_val_batches
from medray.training.dataloader import BatchIndex, Readers, Source, read_epochs
from medray.training.progress import Progress, start_progress
from medray.training.sampler import Data, Sampling, usable_patches
from medray.training.schedule import Schedule
from medray.training.world import World

SAMPLING = Sampling(
    Data(crop=(64, 96), samples=24),
    seed=3,
    epochs=2,
    batch=12,
    micro_batch_size=2,
    unlabelled=True,
)
STEPS = 2
SCHEDULE = Schedule(epochs=2)


@pytest.fixture(autouse=True)
def small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    # Several calls of several batches each, the last with fewer.
    monkeypatch.setattr(dataloader, "_CALL_PX", 5 * 2 * 96**2)


def assert_same(one: Batch, other: Batch) -> None:
    for mine, theirs in zip(astuple(one), astuple(other), strict=True):
        if isinstance(theirs, np.ndarray):
            assert mine.dtype == theirs.dtype
            assert np.array_equal(mine, theirs)
        else:
            assert mine == theirs


def by_a_loop(
    data: str, sampling: Sampling, losses: torch.Tensor, first: tuple[int, int]
) -> Iterator[Batch]:
    source = Source(data, sampling, STEPS, losses.numpy().tobytes())
    for epoch in range(first[0], SCHEDULE.epochs):
        for step in range(first[1] if epoch == first[0] else 0, STEPS):
            for micro_batch in range(sampling.micro_batches):
                yield source.read(BatchIndex(epoch, step, micro_batch))
        for number in range(count_val_batches(data, sampling)):
            yield source.read(BatchIndex(epoch, STEPS, number))


def by_workers(
    data: str, sampling: Sampling, progress: list[Progress]
) -> Iterator[Batch]:
    """Put together in order what the workers of a training are fed."""
    size = len(progress)
    worlds = [World(rank, size, torch.device("cpu"), size) for rank in range(size)]
    fed = [
        read_epochs(data, sampling, SCHEDULE, now, world, STEPS)
        for now, world in zip(progress, worlds, strict=True)
    ]
    for epochs in zip(*fed, strict=True):
        streams = [stream for _, stream in epochs]
        assert {epoch for epoch, _ in epochs} == {progress[0].epoch}
        for _ in range(progress[0].step, STEPS):
            for micro_batch in range(sampling.micro_batches):
                yield next(streams[micro_batch % size])
        for number in range(count_val_batches(data, sampling)):
            yield next(streams[number % size])
        for now in progress:
            now.epoch, now.step = now.epoch + 1, 0


@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("first", [(0, 0), (0, 1), (1, 1)])
def test_workers_are_fed_what_a_loop_reads(
    workers: int, first: tuple[int, int], training_data: str
) -> None:
    """From any step on, however many share it."""
    patches = len(usable_patches(training_data, "train", SAMPLING.data))
    progress = [start_progress(patches) for _ in range(workers)]
    for now in progress:
        now.epoch, now.step = first
    found = by_workers(training_data, SAMPLING, progress)
    wanted = by_a_loop(training_data, SAMPLING, torch.zeros(0), first)
    for mine, theirs in zip(found, wanted, strict=True):
        assert_same(mine, theirs)
        assert mine.images.flags.writeable  # torch takes it as it is


def test_an_order_that_follows_losses_waits_for_them(training_data: str) -> None:
    hard = replace(SAMPLING, data=replace(SAMPLING.data, hard=1.0), unlabelled=False)
    patches = len(usable_patches(training_data, "train", hard.data))
    now = start_progress(patches)
    found = by_workers(training_data, hard, [now])
    count = STEPS * hard.micro_batches + count_val_batches(training_data, hard)
    known = now.order_losses, torch.arange(patches, dtype=torch.float64)
    for epoch, losses in enumerate(known):
        now.order_losses = losses  # known when the epoch before is over
        wanted = by_a_loop(training_data, hard, losses, (epoch, 0))
        for _ in range(count):
            assert_same(next(found), next(wanted))
    found.close()  # type: ignore[attr-defined]


def test_a_damaged_dataset_is_told_as_by_a_loop(
    training_data: str, tmp_path: Path
) -> None:
    data = shutil.copytree(training_data, tmp_path / "data")
    for shard in (data / "slides").glob("*/0/c/**/*"):
        if shard.is_file():
            shard.write_bytes(bytes(shard.stat().st_size))
    source, index = Source(str(data), SAMPLING, STEPS), BatchIndex(0, 1, 2)
    with pytest.raises(FormatError) as wanted:
        source.read(index)
    checks = BatchIndex(0, STEPS, 0)  # where damage is endured
    with Readers(2) as readers:
        stream = readers.read(source, [checks, checks, index, checks])
        for _ in range(2):
            assert next(stream).damaged
        with pytest.raises(FormatError) as found:
            next(stream)
    assert f"{found.value}" == f"{wanted.value}"


def test_an_empty_batch_arrives(training_data: str) -> None:
    """All of its validation patches were damaged, say."""
    checks = count_val_batches(training_data, SAMPLING)
    source, index = Source(training_data, SAMPLING, STEPS), BatchIndex(0, STEPS, checks)
    with Readers(1) as readers:
        (found,) = readers.read(source, [index])
    assert len(found.images) == 0
    assert_same(found, source.read(index))
