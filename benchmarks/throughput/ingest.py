"""How near `medray ingest` comes to a bare decode and write of the same pixels.

In one run, interleaved, over the same slides:

    bare    two threads: decode a slide with tifffile, write it as one sharded zarr
    medray  `medray.ingest`, Ray up: pixels, pyramid, tissue, labels, tables

Run: python benchmarks/ingest.py --slides 16 --rounds 3
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import ray
import tifffile

from medray.datasets.ingest import ingest
from medray.datasets.synthetic import generate
from medray.execution import cluster
from medray.geometry import Rectangle
from medray.storage import ome_zarr
from medray.storage.files import read_table


def bare(slides: list[Path], out: Path) -> float:
    def one(path: Path) -> None:
        pixels = tifffile.imread(path, maxworkers=1)
        uri, (height, width) = str(out / path.stem), pixels.shape[:2]
        ome_zarr.create_image(uri, height, width, mpp=0.5, name="", attributes={})
        whole = Rectangle(0, 0, height, width)
        ome_zarr.write_region(uri, whole, np.moveaxis(pixels, 2, 0))

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, slides))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--slides", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.getLogger("medray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slides = generate(folder / "data", slides=args.slides, seed=1)
        cluster.connect()
        times: dict[str, list[float]] = {}
        for index in range(args.rounds + 1):  # the first round warms up
            figures = {"bare": bare(slides, folder / f"bare{index}")}
            out = folder / f"set{index}"
            start = time.perf_counter()
            ingest(
                [str(folder / "data" / "slides")],
                annotations=str(folder / "data" / "annotations"),
                out=str(out),
            )
            figures["whole"] = time.perf_counter() - start
            rows = read_table(str(out / "slides.parquet")).to_pylist()
            first = min(row["first_cut_at"] for row in rows)
            figures["first_to_last"] = max(row["last_cut_at"] for row in rows) - first
            if index:
                for key, value in figures.items():
                    times.setdefault(key, []).append(value)
        ray.shutdown()
        megapixels = args.slides * 2048 * 2048 / 1e6
        median = {key: statistics.median(values) for key, values in times.items()}
        ratios = {
            f"bare / {key}": statistics.median(
                b / v for b, v in zip(times["bare"], times[key], strict=True)
            )
            for key in ("first_to_last", "whole")
        }
        speed = {key: megapixels / value for key, value in median.items()}
        result = {"seconds": median, "MPix/s": speed, "ratio": ratios}
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
