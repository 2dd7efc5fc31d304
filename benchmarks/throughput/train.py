"""How near the training loop comes to its own step on one batch that is already there.

In one run, interleaved, the same model, recipe, crops and step (augmentation included):

    limit   the step on one resident batch, again and again: nothing is read
    medray  fed by medray.training.dataloader: Ray Data's tasks cut the crops from zarr
    loader  fed by torch's DataLoader: as many processes, the same crops and zarr

With --workers: whole trainings by Ray Train with one and with two workers, the same
batch in all. With --files: patches a second read by one process from zarr chunks, and
from loose PNG and TIFF files of the same pixels and labels.

Run: python benchmarks/train.py --rounds 3 --steps 30 --workers --files
"""

import argparse
import itertools
import json
import logging
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import ray
import tifffile
import torch
from PIL import Image

from medray.datasets.dataset import read_dataset
from medray.datasets.ingest_slides import ingest
from medray.datasets.synthetic import generate
from medray.execution import cluster
from medray.models.config import ModelConfig
from medray.models.network import choose_device
from medray.storage.yaml_config import write_settings
from medray.training.checkpoint import read_history
from medray.training.crops import Batch, read_crop, read_train
from medray.training.dataloader import BatchIndex, read_batches
from medray.training.recipe import Recipe, read_recipe
from medray.training.sampler import Data, usable_patches
from medray.training.schedule import Schedule
from medray.training.train_model import train
from medray.training.trainer import Trainer
from medray.training.world import World

ROOT = Path(__file__).resolve().parents[1]
_WARM = 6


class Crops(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Batches by their number, for the DataLoader."""

    def __init__(self, data: str, recipe: Recipe, steps: int) -> None:
        self.data, self.recipe, self.steps = data, recipe, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        first = index * self.recipe.batch
        return read_train(self.data, self.recipe.sampling, 0, first)


def by_ray(data: str, recipe: Recipe, steps: int, readers: int) -> Iterator[Batch]:
    indices = [BatchIndex(0, step, 0) for step in range(steps)]
    # As many steps an epoch as indices: none of them is validation.
    yield from read_batches(indices, recipe.sampling, data, steps, b"", readers)


def by_loader(data: str, recipe: Recipe, steps: int, readers: int) -> Iterator[Batch]:
    yield from torch.utils.data.DataLoader(
        Crops(data, recipe, steps),
        batch_size=None,
        num_workers=readers,
        multiprocessing_context="spawn",  # a fork would inherit torch's threads
    )


def timed(trainer: Trainer, batches: Iterator[Batch], steps: int) -> float:
    """Return crops a second of `steps` steps, after some that warm up."""
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


def feeding(data: str, recipe: Recipe, rounds: int, steps: int) -> dict[str, object]:
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
    (resident,) = itertools.islice(by_ray(data, recipe, 1, 1), 1)
    speeds: dict[str, list[float]] = {"limit": [], "medray": [], "loader": []}
    for _ in range(rounds):
        feeds = {
            "limit": itertools.repeat(resident),
            "medray": by_ray(data, recipe, total, readers),
            "loader": by_loader(data, recipe, total, readers),
        }
        for name, feed in feeds.items():
            speeds[name].append(timed(trainer, feed, steps))
    ratios = {
        f"{name} / limit": statistics.median(
            one / limit
            for one, limit in zip(speeds[name], speeds["limit"], strict=True)
        )
        for name in ("medray", "loader")
    }
    return {"crops/s": speeds, "device": str(device), "readers": readers} | ratios


def sharing(data: str, recipe: Recipe, folder: Path) -> dict[str, object]:
    """Train for a few epochs with one worker and with two; the first epoch warms up."""
    speeds = {}
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
        entries = read_history(str(out))[1:]
        speeds[workers] = statistics.median(e["crops_per_second"] for e in entries)
    return {"crops/s by workers": speeds, "two / one": speeds[2] / speeds[1]}


def reading(data: str, folder: Path, count: int = 300) -> dict[str, object]:
    """Read whole patches with labels in a random order, from zarr and from files."""
    patches = [p for p in usable_patches(data, "train", Data()) if p["height"] == 512]
    rng = np.random.default_rng(0)
    for kind in ("png", "tiff"):
        (folder / kind).mkdir()
    sizes: dict[str, int] = {}
    for index, patch in enumerate(patches):
        image, mask = read_crop(data, patch, 512, rng)
        pixels = np.moveaxis(image, 0, 2)
        Image.fromarray(pixels).save(folder / "png" / f"{index}.png")
        Image.fromarray(mask).save(folder / "png" / f"{index}.mask.png")
        name = folder / "tiff" / f"{index}.tiff"
        tifffile.imwrite(name, pixels, compression="zstd", photometric="rgb")
        tifffile.imwrite(name.with_suffix(".mask.tiff"), mask, compression="zstd")
    for kind in ("png", "tiff"):
        sizes[kind] = sum(f.stat().st_size for f in (folder / kind).iterdir())
    order = rng.integers(len(patches), size=count).tolist()

    def from_zarr(index: int) -> None:
        read_crop(data, patches[index], 512, rng)

    def from_png(index: int) -> None:
        np.asarray(Image.open(folder / "png" / f"{index}.png"))
        np.asarray(Image.open(folder / "png" / f"{index}.mask.png"))

    def from_tiff(index: int) -> None:
        tifffile.imread(folder / "tiff" / f"{index}.tiff")
        tifffile.imread(folder / "tiff" / f"{index}.mask.tiff")

    speeds: dict[str, list[float]] = {"zarr": [], "png": [], "tiff": []}
    for _ in range(3):
        for name, read in (("zarr", from_zarr), ("png", from_png), ("tiff", from_tiff)):
            start = time.perf_counter()
            for index in order:
                read(index)
            speeds[name].append(count / (time.perf_counter() - start))
    median = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "patches/s by one process": median,
        "zarr / png": median["zarr"] / median["png"],
        "zarr / tiff": median["zarr"] / median["tiff"],
        "files": {"zarr shards": "one a slide", "loose": 2 * len(patches)},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slides", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--recipe", default=str(ROOT / "recipes" / "unet.yaml"))
    parser.add_argument("--workers", action="store_true")
    parser.add_argument("--files", action="store_true")
    args = parser.parse_args()
    logging.getLogger("medray").setLevel(logging.ERROR)
    recipe = read_recipe(args.recipe)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder / "slides", slides=args.slides, seed=1)
        data = str(folder / "data")
        cluster.connect()
        ingest(
            [str(folder / "slides" / "slides")],
            annotations=str(folder / "slides" / "annotations"),
            fractions=(0.8, 0.2, 0.0),
            out=data,
        )
        result = {"feeding": feeding(data, recipe, args.rounds, args.steps)}
        if args.files:
            result["files"] = reading(data, folder)
        if args.workers:
            result["workers"] = sharing(data, recipe, folder)
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
