"""How near `medray infer` comes to the bare model, and to a plain loop.

In one run, interleaved, over the same slides and windows, with the same weights,
precision and batch:

    bare    the model's forward over the windows, pixels already in memory
    loop    one process: read the whole slide, window, average, write the zarr
    medray  `medray.infer`, Ray up: from the first read to the last commit, and whole

Run: python benchmarks/infer.py --slides 8 --rounds 3 [--model MODEL]
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import ray
import torch

from medray import cluster
from medray.classes import Classes
from medray.grid import Rectangle, Windows, region_windows, window_starts
from medray.infer import infer
from medray.models.config import Architecture, ModelConfig
from medray.models.folder import save_model
from medray.models.predict import Predictor, RegionPixels
from medray.models.segmenters import build_segmenter
from medray.slides import open_slide
from medray.store import omezarr
from medray.store.files import read_table
from medray.synth import generate


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


def bare(predictor: Predictor, slides: list[Path]) -> float:
    """The forward alone, over every window of every slide, in full batches."""
    size = predictor.config.window.size
    windows = []
    for path in slides:
        with open_slide(path) as slide:
            level = slide.levels[0]
            pixels = slide.read(0, 0, level.height, level.width)
        for y in window_starts(level.height, predictor.config.window):
            for x in window_starts(level.width, predictor.config.window):
                windows.append(pixels[y : y + size, x : x + size].transpose(2, 0, 1))
    start = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(windows), predictor.batch):
            batch = np.stack(windows[first : first + predictor.batch])
            predictor.windows(torch.from_numpy(batch).to(predictor.device))
    if predictor.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def loop(predictor: Predictor, slides: list[Path], out: Path) -> float:
    """What one writes in a notebook, with the same blending."""
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
        omezarr.create_labels(
            uri, *size, mpp=0.5, name="", classes=Classes(), attributes={}
        )
        omezarr.write_region(uri, whole, result.labels)
        omezarr.build_pyramid(uri)
    return time.perf_counter() - start


def medray(model: str, slides: list[Path], out: Path, precision: str) -> dict:
    start = time.perf_counter()
    infer(
        [str(slides[0].parent)],
        model=model,
        out=str(out),
        precision=precision,
        everywhere=True,
    )
    whole = time.perf_counter() - start
    rows = read_table(str(out / "slides.parquet")).to_pylist()
    first = min(row["first_read_at"] for row in rows)
    last = max(row["last_write_at"] for row in rows)
    return {"whole": whole, "read_to_commit": last - first}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slides", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model")
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--precision", default="auto")
    args = parser.parse_args()
    logging.getLogger("medray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slides = generate(folder / "data", slides=args.slides, seed=1)
        model = args.model or random_model(folder / "model", args.encoder)
        cluster.connect()
        torch.set_num_threads(cluster.cpus_per_node())
        predictor = Predictor.from_folder(model, precision=args.precision)
        times: dict[str, list[float]] = {}
        for index in range(args.rounds + 1):  # the first round warms up
            figures = {
                "bare": bare(predictor, slides),
                "loop": loop(predictor, slides, folder / f"loop{index}"),
            }
            job = medray(model, slides, folder / f"run{index}", args.precision)
            figures |= job
            if index:
                for key, value in figures.items():
                    times.setdefault(key, []).append(value)
        ray.shutdown()
        median = {key: statistics.median(values) for key, values in times.items()}
        ratios = {
            f"bare / {key}": statistics.median(
                b / v for b, v in zip(times["bare"], times[key], strict=True)
            )
            for key in ("loop", "read_to_commit", "whole")
        }
        windows = 25 * args.slides
        print(
            json.dumps(
                {
                    "device": str(predictor.device),
                    "precision": str(predictor.dtype),
                    "batch": predictor.batch,
                    "windows": windows,
                    "seconds": median,
                    "ratio": ratios,
                    "bare MPix/s": windows * 0.512**2 / median["bare"],
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
