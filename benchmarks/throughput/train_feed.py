"""How much of what a process reads a training's feed delivers, by ways to feed.

For each batch and number of readers, in one run, interleaved, crops per second of

    read here   a loop over read_train in this process: what one reader can do
    medray      medray.training.dataloader, and a consumer that only counts
    Ray Data    tasks of Ray Data that return each batch as a row of Arrow

counted after some batches, once the readers run; `a reader`: divided by their number.
`core ms/crop` is the CPU time of all processes: it shows what a way costs also where
other programs take the cores, and Ray's own processes count.

Run: python -m benchmarks.throughput.train_feed --rounds 5
"""

import contextlib
import functools
import itertools
import logging
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import ray
import ray.data
import torch

from benchmarks import harness
from medray.datasets.ingest_slides import ingest
from medray.datasets.synthetic import generate
from medray.execution import cluster
from medray.training.crops import Batch, read_train
from medray.training.dataloader import BatchIndex, Readers, Source
from medray.training.sampler import Data, Sampling

_WARM = 512  # crops


def read_here(data: str, sampling: Sampling, steps: int) -> Iterator[Batch]:
    for step in range(steps):
        yield read_train(data, sampling, 0, step * sampling.batch)


def by_medray(
    data: str, sampling: Sampling, steps: int, readers: int
) -> Iterator[Batch]:
    # As many steps an epoch as indices: none of them is validation.
    indices = [BatchIndex(0, step, 0) for step in range(steps)]
    with Readers(readers) as some:
        yield from some.read(Source(data, sampling, steps), indices)


def by_ray(
    data: str,
    sampling: Sampling,
    steps: int,
    readers: int,
    block: int,
    task: int,
) -> Iterator[Batch]:
    """Read by tasks of `task` batches, which return `block` of them at a time."""

    def read(rows: dict[str, Any]) -> Iterator[pa.Table]:
        for some in itertools.batched(rows["step"], block):
            found = [
                read_train(data, sampling, 0, int(step) * sampling.batch)
                for step in some
            ]
            flat = [
                np.concatenate((batch.images.ravel(), batch.masks.ravel()))
                for batch in found
            ]
            beside = [(b.images.shape, b.patches, b.sizes, b.damaged) for b in found]
            ends = np.cumsum([0, *map(len, flat)])
            (whole,) = flat if len(flat) == 1 else (np.concatenate(flat),)
            buffers = [None, pa.py_buffer(ends), pa.py_buffer(whole)]
            pixels = pa.LargeBinaryArray.from_buffers(
                pa.large_binary(), len(flat), buffers
            )
            yield pa.table(
                {"pixels": pixels, "beside": [pickle.dumps(each) for each in beside]}
            )

    ranges = [
        pa.table({"step": list(some)}) for some in itertools.batched(range(steps), task)
    ]
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = block * sampling.batch * 4 * 256**2
    context.target_min_block_size = 1
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    with ray.data.DataContext.current(context):
        tables = (
            ray.data.from_arrow(ranges)
            .map_batches(
                read,
                batch_size=None,
                num_cpus=0.25,
                compute=ray.data.TaskPoolStrategy(size=readers),
            )
            .iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=4)
        )
        for table in tables:
            for row in range(table.num_rows):
                shape, *others = pickle.loads(table["beside"][row].as_py())
                flat = np.frombuffer(table["pixels"][row].as_buffer(), np.uint8)
                images, masks = np.split(flat, [int(np.prod(shape))])
                yield Batch(
                    images.reshape(shape), masks.reshape(-1, *shape[2:]), *others
                )


class Shared(torch.utils.data.Dataset[Any]):
    """Batches by their number, as tensors in shared memory."""

    def __init__(self, data: str, sampling: Sampling, steps: int) -> None:
        self.data, self.sampling, self.steps = data, sampling, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Any, ...]:
        first = step * self.sampling.batch
        batch = read_train(self.data, self.sampling, 0, first)
        pixels = np.concatenate((batch.images.ravel(), batch.masks.ravel()))
        beside = batch.images.shape, batch.patches, batch.sizes, batch.damaged
        return torch.from_numpy(pixels), *beside


def by_loader(
    data: str, sampling: Sampling, steps: int, readers: int
) -> Iterator[Batch]:
    loader = torch.utils.data.DataLoader(
        Shared(data, sampling, steps),
        batch_size=None,
        num_workers=readers,
        multiprocessing_context="spawn",
    )
    for flat, shape, *others in loader:
        images, masks = np.split(flat.numpy(), [int(np.prod(shape))])
        yield Batch(images.reshape(shape), masks.reshape(-1, *shape[2:]), *others)


def timed(
    feed: Callable[[], Iterator[Batch]], warm: int, count: int, readers: int
) -> dict[str, float]:
    """Return what `count` batches after `warm` ones cost."""
    batches = feed()
    for _ in itertools.islice(batches, warm):
        pass
    start, before = time.perf_counter(), used()
    crops = sum(len(batch.images) for batch in itertools.islice(batches, count))
    rate = crops / (time.perf_counter() - start)
    cores = 1e3 * (used() - before) / crops
    for _ in batches:  # ends the processes
        pass
    return {"crops/s": rate, "a reader": rate / readers, "core ms/crop": cores}


def used() -> float:
    """Return the CPU seconds of this process and of those below it."""
    here, total = psutil.Process(), 0.0
    for process in [here, *here.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def main(
    slides: int = 4,
    rounds: int = 5,
    crops: int = 4096,
    batches: tuple[int, ...] = (8, 64),
    readers: tuple[int, ...] = (1, 2),
    rays: tuple[str, ...] = ("1 4", "8 64"),
) -> Iterator[harness.Result]:
    """Compare a training's feed with what one process reads.

    Args:
        slides: Number of generated slides.
        rounds: Number of rounds.
        crops: Number of crops of 256 px that are timed in each.
        batches: Crops of a batch.
        readers: Processes that read.
        rays: Batches of a block and of a task of Ray Data.
    """
    logging.getLogger("medray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "slides", slides=slides, seed=1)
        data = str(folder / "data")
        ingest(
            [str(folder / "slides" / "slides")],
            annotations=str(folder / "slides" / "annotations"),
            fractions=(0.8, 0.2, 0.0),
            out=data,
            executor="local",
        )
        cluster.connect()
        for batch, count in itertools.product(batches, readers):
            warm = max(4 * count, _WARM // batch)
            steps = warm + crops // batch + 1
            sampling = Sampling(Data(samples=steps * batch), 0, 1, batch, batch)
            ways: dict[str, Callable[[], Iterator[Batch]]] = {
                "read here": functools.partial(read_here, data, sampling, steps),
                "medray": functools.partial(by_medray, data, sampling, steps, count),
                "DataLoader": functools.partial(
                    by_loader, data, sampling, steps, count
                ),
            }
            for way in rays:
                block, task = map(int, way.split())
                ways[f"Ray Data, {block} a block, {task} a task"] = functools.partial(
                    by_ray, data, sampling, steps, count, block, task
                )
            variants = {
                way: functools.partial(
                    timed,
                    feed,
                    warm,
                    crops // batch,
                    1 if way == "read here" else count,
                )
                for way, feed in ways.items()
            }
            yield harness.interleaved(
                variants, rounds, warmup=0, batch=batch, readers=count, side=256
            )
        ray.shutdown()


if __name__ == "__main__":
    harness.run(main)
