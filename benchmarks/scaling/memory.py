"""The memory of all processes together, and what is left out, by size of the slide.

A classifier of timm that costs little stands for the model; every window is predicted.

Run: python benchmarks/memory.py --sides 10000 100000
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from run_memory import run_watched

from medray.classes import Classes
from medray.datasets.synthetic import write_pyramid
from medray.geometry import Windows
from medray.inference.run import mask_uri
from medray.models.classifiers import build_classifier
from medray.models.config import Architecture, ModelConfig
from medray.models.folder import save_model
from medray.storage import ome_zarr
from medray.storage.files import read_table
from medray.storage.pyramid import halved


def cheap_model(folder: Path) -> str:
    torch.manual_seed(0)
    architecture = Architecture("classifier", "mobilenetv3_small_050")
    config = ModelConfig(
        architecture=architecture,
        classes=Classes(),
        window=Windows(512, 384),
        mpp=0.5,
    )
    save_model(str(folder), config, build_classifier(architecture, 2), {})
    return str(folder)


def filled(levels: list) -> bool:
    """Compare pieces of each level with the one below it, and see that it is used."""
    rng = np.random.default_rng(0)
    for below, level in itertools.pairwise(levels):
        for _ in range(5):
            y, x = (int(rng.integers(0, max(1, n - 512))) for n in level.shape)
            piece = np.asarray(level[y : y + 512, x : x + 512])
            rows, columns = (slice(2 * n, 2 * n + 1024) for n in (y, x))
            source = np.asarray(below[rows, columns])
            if not np.array_equal(piece, halved(source)):
                return False
    return bool(np.asarray(levels[-1][:]).any())


def measure(side: int, model: str, folder: Path, tissue: float) -> dict:
    path = folder / f"{side}.tif"
    start = time.perf_counter()
    write_pyramid(path, side, side, seed=1, tissue=tissue)
    written = time.perf_counter() - start
    out = folder / f"run{side}"
    command = [sys.executable, "-m", "medray.cli", "infer", str(path), "--everywhere"]
    command += ["--model", model, "--out", str(out), "--json"]
    summary, peak = run_watched(command)
    (row,) = read_table(str(out / "slides.parquet")).to_pylist()
    shapes = ome_zarr.level_shapes(side, side)
    uri = mask_uri(str(out), str(side))
    levels = [ome_zarr.open_level(uri, level) for level in range(len(shapes))]
    return {
        "side": side,
        "file MiB": path.stat().st_size >> 20,
        "writing it, s": round(written, 1),
        "failed": summary["failed"],
        "regions": summary["regions"],
        "windows": row["windows"],
        "stage, s": round(summary["seconds"], 1),
        "peak MiB": peak.mib,
        "levels": len(levels),
        "levels complete": [a.shape for a in levels] == shapes and filled(levels),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sides", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--tissue", type=float, default=0.1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        model = cheap_model(Path(name) / "model")
        peaks = []
        for side in args.sides:
            figures = measure(side, model, Path(name), args.tissue)
            peaks.append(figures["peak MiB"])
            print(json.dumps(figures), flush=True)
        print("peak of the last / of the first:", round(peaks[-1] / peaks[0], 3))


if __name__ == "__main__":
    main()
