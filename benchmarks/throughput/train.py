"""How near the training loop comes to its own step on one batch that is already there.

In one run, interleaved, the same model, recipe, crops and step (augmentation included):

    limit   the step on one resident batch, again and again: nothing is read
    medray  fed by medray.training.dataloader: its processes cut the crops from zarr
    loader  fed by torch's DataLoader: as many processes, the same crops and zarr

With --compiled also `limit` of the recipe with `compile: true`.

With --workers: whole trainings by Ray Train with one and with two workers, the same
batch in all. With --files: patches per second read by one process from zarr chunks, and
from loose PNG and TIFF files of the same pixels and labels.

Run: python -m benchmarks.throughput.train --rounds 3 --steps 30 --workers --files
"""

import itertools
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
import tifffile
import torch
from PIL import Image

from benchmarks import harness
from medray.datasets.dataset import read_dataset
from medray.datasets.ingest_slides import ingest
from medray.datasets.synthetic import generate
from medray.execution import cluster
from medray.models.config import ModelConfig
from medray.models.network import choose_device
from medray.storage.yaml_config import write_settings
from medray.training.checkpoint import read_history
from medray.training.crops import Batch, read_crop, read_train
from medray.training.dataloader import BatchIndex, Readers, Source
from medray.training.recipe import Recipe, read_recipe
from medray.training.sampler import Data, usable_patches
from medray.training.schedule import Schedule
from medray.training.train_model import train
from medray.training.trainer import Trainer
from medray.training.world import World

_WARM = 6


class Crops(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Parts by their number, for the DataLoader."""

    def __init__(self, data: str, recipe: Recipe, steps: int) -> None:
        self.data, self.recipe, self.steps = data, recipe, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        first = index * self.recipe.batch
        return read_train(self.data, self.recipe.sampling, 0, first)


def by_medray(data: str, recipe: Recipe, steps: int, readers: int) -> Iterator[Batch]:
    # As many steps an epoch as indices: none of them is validation.
    source = Source(data, recipe.sampling, steps)
    with Readers(readers, pinned=torch.cuda.is_available()) as some:
        yield from some.read(source, [BatchIndex(0, step, 0) for step in range(steps)])


def by_loader(data: str, recipe: Recipe, steps: int, readers: int) -> Iterator[Batch]:
    yield from torch.utils.data.DataLoader(
        Crops(data, recipe, steps),
        batch_size=None,
        num_workers=readers,
        multiprocessing_context="spawn",  # a fork would inherit torch's threads
    )


def timed(trainer: Trainer, batches: Iterator[Batch], steps: int) -> float:
    """Return the crops per second of `steps` steps, after some that warm up."""
    for batch in itertools.islice(batches, _WARM):
        trainer.train_step([batch])
    synchronise()
    start = time.perf_counter()
    for batch in itertools.islice(batches, steps):
        trainer.train_step([batch])
        trainer.progress.step = 0
    synchronise()
    return steps * trainer.recipe.batch / (time.perf_counter() - start)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def feeding(
    data: str, recipe: Recipe, rounds: int, steps: int, compiled: bool
) -> harness.Rounds:
    contract = ModelConfig(
        architecture=recipe.model,
        classes=read_dataset(data).classes,
        window=recipe.window,
        mpp=0.5,
    )
    device = choose_device()
    readers = min(8, max(1, (os.cpu_count() or 1) // 2))
    total = steps + _WARM
    recipe = replace(recipe, data=replace(recipe.data, samples=total * recipe.batch))
    trainer = Trainer(World(0, 1, device), recipe, contract, 1, total)
    (resident,) = by_medray(data, recipe, 1, 1)
    feeds: dict[str, Callable[[], Iterator[Batch]]] = {
        "one resident batch": lambda: itertools.repeat(resident),
        "medray": lambda: by_medray(data, recipe, total, readers),
        "DataLoader": lambda: by_loader(data, recipe, total, readers),
    }
    variants = {
        name: lambda feed=feed: {"crops/s": timed(trainer, feed(), steps)}
        for name, feed in feeds.items()
    }
    if compiled:
        other = Trainer(
            World(0, 1, device), replace(recipe, compile=True), contract, 1, total
        )
        variants["one resident batch, compiled network"] = lambda: {
            "crops/s": timed(other, itertools.repeat(resident), steps)
        }
    return harness.interleaved(
        variants, rounds, warmup=0, device=str(device), readers=readers
    )


def sharing(data: str, recipe: Recipe, folder: Path) -> harness.Rounds:
    """Train for a few epochs with one worker and with two; the first epoch warms up."""
    found = harness.Rounds("1 worker")
    for workers in (1, 2):
        out = folder / f"workers{workers}"
        path = folder / f"workers{workers}.yaml"
        short = replace(
            recipe,
            micro_batch_size=recipe.batch // 2,
            workers=workers,
            data=Data(crop=256, samples=12 * recipe.batch),
            schedule=Schedule(epochs=4),
        )
        write_settings(str(path), short)
        train(str(path), data=data, out=str(out))
        name = "1 worker" if workers == 1 else f"{workers} workers"
        for entry in read_history(str(out))[1:]:
            found.add(name, **{"crops/s": entry["crops_per_second"]})
    return found


def reading(data: str, folder: Path, rounds: int, count: int = 300) -> harness.Rounds:
    """Read whole patches with labels in a random order, from zarr and from files."""
    patches = [p for p in usable_patches(data, "train", Data()) if p["height"] == 512]
    rng = np.random.default_rng(0)
    for kind in ("png", "tiff"):
        (folder / kind).mkdir()
    for index, patch in enumerate(patches):
        image, mask = read_crop(data, patch, 512, rng)
        pixels = np.moveaxis(image, 0, 2)
        Image.fromarray(pixels).save(folder / "png" / f"{index}.png")
        Image.fromarray(mask).save(folder / "png" / f"{index}.mask.png")
        name = folder / "tiff" / f"{index}.tiff"
        tifffile.imwrite(name, pixels, compression="zstd", photometric="rgb")
        tifffile.imwrite(name.with_suffix(".mask.tiff"), mask, compression="zstd")
    order = rng.integers(len(patches), size=count).tolist()

    def from_zarr(index: int) -> None:
        read_crop(data, patches[index], 512, rng)

    def from_png(index: int) -> None:
        np.asarray(Image.open(folder / "png" / f"{index}.png"))
        np.asarray(Image.open(folder / "png" / f"{index}.mask.png"))

    def from_tiff(index: int) -> None:
        tifffile.imread(folder / "tiff" / f"{index}.tiff")
        tifffile.imread(folder / "tiff" / f"{index}.mask.tiff")

    def timed(read: Callable[[int], None]) -> dict[str, float]:
        start = time.perf_counter()
        for index in order:
            read(index)
        return {"patches/s": count / (time.perf_counter() - start)}

    variants = {
        "zarr": lambda: timed(from_zarr),
        "png": lambda: timed(from_png),
        "tiff": lambda: timed(from_tiff),
    }
    return harness.interleaved(variants, rounds, warmup=0, files=2 * len(patches))


def main(
    slides: int = 8,
    rounds: int = 3,
    steps: int = 30,
    recipe: str = "unet",
    workers: bool = False,
    files: bool = False,
    compiled: bool = False,
) -> Iterator[harness.Result]:
    """Compare the training loop with its own step on one resident batch.

    Args:
        slides: Number of generated slides.
        rounds: Number of rounds.
        steps: Number of steps that are timed in each.
        recipe: Name or file of a recipe.
        workers: Train with one and with two workers, too.
        files: Read patches from zarr, PNG and TIFF, too.
        compiled: Time the step with the network compiled, too.
    """
    logging.getLogger("medray").setLevel(logging.ERROR)
    settings = read_recipe(recipe)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "slides", slides=slides, seed=1)
        data = str(folder / "data")
        cluster.connect()
        ingest(
            [str(folder / "slides" / "slides")],
            annotations=str(folder / "slides" / "annotations"),
            fractions=(0.8, 0.2, 0.0),
            out=data,
        )
        yield feeding(data, settings, rounds, steps, compiled)
        if files:
            yield reading(data, folder, rounds)
        if workers:
            yield sharing(data, settings, folder)
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    harness.run(main)
