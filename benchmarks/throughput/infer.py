"""How near `medray infer` comes to the bare model, and to a plain loop.

In one run, interleaved, over the same slides and windows, with the same weights,
precision and batch:

    bare    the model's forward over the windows, counted once, pixels in memory
    loop    one process: read the whole slide, predict, write the zarr (flat slides)
    Ray, processes
            `medray.infer`, Ray up, or by processes of this machine: from the first read
            to the last commit, and whole

Run: python -m benchmarks.throughput.infer --slides 16 --rounds 3 [--model MODEL]
     python -m benchmarks.throughput.infer --pyramid 20480 --rounds 1
"""

import logging
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import ray
import torch

from benchmarks import harness
from benchmarks.random_model import random_model
from medray.classes import Classes
from medray.datasets.synthetic import generate, write_pyramid
from medray.execution import cluster
from medray.geometry import (
    Rectangle,
    Windows,
    region_windows,
    window_starts,
)
from medray.inference.infer_run import infer
from medray.inference.run import Options
from medray.models.canvas import RegionPixels
from medray.models.config import Precision, Prediction
from medray.models.predict import Predictor
from medray.slides.opening import open_slide
from medray.storage import ome_zarr
from medray.storage.files import read_table
from medray.types import Executor

EXECUTORS: tuple[tuple[str, Executor], ...] = (
    ("Ray", "ray"),
    ("processes", "processes"),
)


def count_windows(slides: list[Path], windows: Windows) -> int:
    total = 0
    for path in slides:
        with open_slide(path) as slide:
            level = slide.levels[0]
        rows, columns = (
            len(window_starts(length, windows))
            for length in (level.height, level.width)
        )
        total += rows * columns
    return total


def bare(predictor: Predictor, slides: list[Path], sample: int) -> float:
    """The forward alone over every window, in full batches.

    Of more than `sample` windows, the first ones are timed and counted up: a forward's
    time does not depend on its pixels.
    """
    size = predictor.config.window.size
    windows = []
    for path in slides:
        with open_slide(path) as slide:
            level = slide.levels[0]
            for y in window_starts(level.height, predictor.config.window):
                for x in window_starts(level.width, predictor.config.window):
                    if len(windows) < sample:
                        windows.append(slide.read(int(y), int(x), size, size))
    total = count_windows(slides, predictor.config.window)
    pixels = torch.from_numpy(np.stack(windows)).to(predictor.device)
    batches = pixels.split(predictor.batch)

    @torch.inference_mode()
    def forward(batch: torch.Tensor) -> None:
        predictor.logits(batch)

    # As many threads as the predictor has, each with batches of its own.
    with ThreadPoolExecutor(
        predictor.threads, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        list(pool.map(forward, batches[: predictor.threads]))  # makes the threads ready
        start = time.perf_counter()
        list(pool.map(forward, batches))
        if predictor.device.type == "cuda":
            torch.cuda.synchronize()
        elapsed = time.perf_counter() - start
    return elapsed * total / len(windows)


def loop(predictor: Predictor, slides: list[Path], out: Path) -> float:
    """What one writes in a notebook, with the same stitching."""
    start = time.perf_counter()
    for path in slides:
        with open_slide(path) as slide:
            level = slide.levels[0]
            size = (level.height, level.width)
            pixels = slide.read(0, 0, *size)
        whole = Rectangle(0, 0, *size)
        plan = region_windows(whole, *size, predictor.config.window)
        result = next(predictor.predict([RegionPixels(pixels, plan, *size)]))
        uri = str(out / f"{path.stem}.ome.zarr")
        ome_zarr.create_labels(
            uri, *size, mpp=0.5, name="", classes=Classes(), attributes={}
        )
        ome_zarr.write_region(uri, whole, result.labels)
        ome_zarr.build_pyramid(uri)
    return time.perf_counter() - start


def medray(
    model: str, slides: list[Path], out: Path, how: Prediction, executor: Executor
) -> dict[str, float]:
    start = time.perf_counter()
    infer(
        [str(slides[0].parent)],
        model=model,
        out=str(out),
        options=Options(prediction=how, everywhere=True),
        executor=executor,
    )
    whole = time.perf_counter() - start
    rows = read_table(str(out / "slides.parquet")).to_pylist()
    first = min(row["first_read_at"] for row in rows)
    last = max(row["committed_at"] for row in rows)
    return {
        "whole": whole,
        "read_to_commit": last - first,
        "waited for pixels, s": sum(row["waited_s"] for row in rows),
        "predicting, s": sum(row["predict_s"] for row in rows),
    }


def main(
    slides: int = 16,
    pyramid: int | None = None,
    rounds: int = 3,
    sample: int = 400,
    model: str | None = None,
    encoder: str = "resnet18",
    precision: Precision = "auto",
) -> Iterator[harness.Result]:
    """Compare `medray infer` with the model's forward alone, and with a plain loop.

    Args:
        slides: Number of generated slides of 2048 px.
        pyramid: One slide instead, of this side, pixels.
        rounds: Number of rounds.
        sample: Number of windows that `bare` times, at most.
        model: Model folder; without one a U-Net of random weights.
        encoder: Of the random U-Net.
        precision: As of `medray infer`.
    """
    logging.getLogger("medray").setLevel(logging.ERROR)
    how = Prediction(precision=precision)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if pyramid:
            path = folder / "data" / "pyramid.tif"
            path.parent.mkdir()
            write_pyramid(path, pyramid, pyramid, seed=1)
            paths = [path]
        else:
            paths = generate(folder / "data", slides=slides, seed=1)
        model = model or random_model(folder / "model", encoder=encoder)
        cluster.connect()
        threads = cluster.cpus_per_node()
        predictor = Predictor.from_folders([model], how, threads=threads)
        windows = count_windows(paths, predictor.config.window)
        found = harness.Rounds(
            "bare",
            {
                "device": str(predictor.device),
                "precision": str(predictor.dtype),
                "batch": predictor.batch,
                "windows, counted once": windows,
            },
        )
        bare(predictor, paths, 40)  # warms up
        for index in range(rounds):
            before = bare(predictor, paths, sample)
            seconds = {"bare": before}
            if not pyramid:
                out = folder / f"loop{index}"
                seconds["plain loop"] = loop(predictor, paths, out)
            others: dict[str, dict[str, float]] = {}
            for name, executor in EXECUTORS[:: -1 if index % 2 else 1]:
                out = folder / f"{executor}{index}"
                figures = medray(model, paths, out, how, executor)
                read_to_commit = figures.pop("read_to_commit")
                seconds[f"{name}, first read to last commit"] = read_to_commit
                seconds[f"{name}, whole stage"] = figures.pop("whole")
                others[f"{name}, whole stage"] = figures
            # Before and after: the machine's speed drifts.
            seconds["bare"] = (before + bare(predictor, paths, sample)) / 2
            for variant, one in seconds.items():
                found.add(variant, **{"seconds": one, "windows/s": windows / one})
            for variant, figures in others.items():
                found.add(variant, **figures)
        ray.shutdown()
    yield found


if __name__ == "__main__":
    harness.run(main)
