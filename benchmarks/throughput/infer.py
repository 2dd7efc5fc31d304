"""How near `medray infer` comes to the bare model, and to a plain loop.

In one run, interleaved, over the same slides and windows, with the same weights,
precision and batch:

    bare    the model's forward over the windows, counted once, pixels in memory
    loop    one process: read the whole slide, predict, write the zarr (flat slides)
    medray  `medray.infer`, Ray up: from the first read to the last commit, and whole

Run: python benchmarks/infer.py --slides 16 --rounds 3 [--model MODEL]
     python benchmarks/infer.py --pyramid 20480 --rounds 1
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from medray.classes import Classes
from medray.datasets.synthetic import generate, write_pyramid
from medray.execution import cluster
from medray.geometry import (
    Rectangle,
    Windows,
    region_windows,
    window_starts,
)
from medray.inference.infer import infer
from medray.inference.run import Options
from medray.models.canvas import RegionPixels
from medray.models.config import Architecture, ModelConfig, Prediction
from medray.models.folder import save_model
from medray.models.predict import Predictor
from medray.models.segmenters import build_segmenter
from medray.slides import open_slide
from medray.storage import ome_zarr
from medray.storage.files import read_table


def random_model(folder: Path, encoder: str) -> str:
    torch.manual_seed(0)
    architecture = Architecture("unet", encoder)
    network = build_segmenter(architecture, 2)
    config = ModelConfig(
        architecture=architecture,
        classes=Classes(),
        window=Windows(512, 384),
        mpp=0.5,
    )
    save_model(str(folder), config, network, {"f1": None})
    return str(folder)


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


def bare(predictor: Predictor, slides: list[Path], most: int) -> float:
    """The forward alone over every window, in full batches.

    Of more than `most` windows, the first `most` are timed and counted up: a forward's
    time does not depend on its pixels.
    """
    size = predictor.config.window.size
    windows = []
    for path in slides:
        with open_slide(path) as slide:
            level = slide.levels[0]
            for y in window_starts(level.height, predictor.config.window):
                for x in window_starts(level.width, predictor.config.window):
                    if len(windows) < most:
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


def medray(model: str, slides: list[Path], out: Path, how: Prediction) -> dict:
    start = time.perf_counter()
    infer(
        [str(slides[0].parent)],
        model=model,
        out=str(out),
        options=Options(prediction=how, everywhere=True),
    )
    whole = time.perf_counter() - start
    rows = read_table(str(out / "slides.parquet")).to_pylist()
    first = min(row["first_read_at"] for row in rows)
    last = max(row["committed_at"] for row in rows)
    return {
        "whole": whole,
        "read_to_commit": last - first,
        "lane waited for pixels": sum(row["waited_s"] for row in rows),
        "lane predicting": sum(row["predict_s"] for row in rows),
        "windows": sum(row["windows"] for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slides", type=int, default=16)
    parser.add_argument("--pyramid", type=int, help="one slide, this many px a side")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--most", type=int, default=400, help="windows of `bare`")
    parser.add_argument("--model")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    logging.getLogger("medray").setLevel(logging.ERROR)
    how = Prediction(precision=args.precision)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.pyramid:
            path = folder / "data" / "pyramid.tif"
            path.parent.mkdir()
            write_pyramid(path, args.pyramid, args.pyramid, seed=1)
            slides = [path]
        else:
            slides = generate(folder / "data", slides=args.slides, seed=1)
        model = args.model or random_model(folder / "model", args.encoder)
        cluster.connect()
        threads = cluster.cpus_per_node()
        predictor = Predictor.from_folders([model], how, threads=threads)
        times: dict[str, list[float]] = {}
        bare(predictor, slides, 40)  # warms up
        for index in range(args.rounds):
            before = bare(predictor, slides, args.most)
            figures: dict[str, Any] = {}
            if not args.pyramid:
                figures["loop"] = loop(predictor, slides, folder / f"loop{index}")
            figures |= medray(model, slides, folder / f"run{index}", how)
            # Before and after: the machine's speed drifts.
            figures["bare"] = (before + bare(predictor, slides, args.most)) / 2
            print(json.dumps(figures), flush=True)
            for key, value in figures.items():
                times.setdefault(key, []).append(value)
        ray.shutdown()
        median = {key: statistics.median(values) for key, values in times.items()}
        ratios = {
            f"bare / {key}": statistics.median(
                b / v for b, v in zip(times["bare"], times[key], strict=True)
            )
            for key in ("loop", "read_to_commit", "whole")
            if key in times
        }
        windows = count_windows(slides, predictor.config.window)
        print(
            json.dumps(
                {
                    "device": str(predictor.device),
                    "precision": str(predictor.dtype),
                    "batch": predictor.batch,
                    "windows, counted once": windows,
                    "medians": median,
                    "ratio": ratios,
                    "bare MPix/s": windows * 0.512**2 / median["bare"],
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
