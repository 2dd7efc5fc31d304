"""The memory of all processes together, and what is left out, by size of the slide.

A classifier of timm that costs little stands for the model; every window is predicted.

Run: python -m benchmarks.scaling.memory --sides 10000 100000
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import harness
from benchmarks.peak_memory import run_watched
from benchmarks.random_model import random_model
from medray.datasets.synthetic import write_pyramid
from medray.inference.run import mask_uri
from medray.storage import ome_zarr
from medray.storage.files import read_table
from medray.storage.pyramid import halved


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


def main(
    sides: tuple[int, ...] = (10_000, 100_000), tissue: float = 0.1
) -> Iterator[harness.Result]:
    """Measure the peak memory of `medray infer` by the side of one slide.

    Args:
        sides: Of the slides, pixels.
        tissue: Share of a slide that is tissue.
    """
    with tempfile.TemporaryDirectory() as name:
        model = random_model(
            Path(name) / "model", "classifier", "mobilenetv3_small_050"
        )
        peaks = []
        for side in sides:
            figures = measure(side, model, Path(name), tissue)
            peaks.append(figures["peak MiB"])
            yield figures
        yield {"peak of the last / of the first": round(peaks[-1] / peaks[0], 3)}


if __name__ == "__main__":
    harness.run(main)
