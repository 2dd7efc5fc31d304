"""How near `medray ingest` comes to a bare decode and write of the same pixels.

In one run, interleaved, over the same slides:

    bare    two threads: decode a slide with tifffile, write it as one sharded zarr
    medray  `medray.ingest`, Ray up: pixels, pyramid, tissue, labels, tables

Run: python -m benchmarks.throughput.ingest --slides 16 --rounds 3
"""

import logging
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import ray
import tifffile

from benchmarks import harness
from medray.datasets.ingest_slides import ingest
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


def main(slides: int = 16, rounds: int = 3) -> Iterator[harness.Result]:
    """Compare `medray ingest` with decoding and writing the same pixels.

    Args:
        slides: Number of generated slides of 2048 px.
        rounds: Number of rounds.
    """
    logging.getLogger("medray").setLevel(logging.ERROR)
    found = harness.Rounds("bare", {"slides": slides})
    megapixels = slides * 2048 * 2048 / 1e6
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = generate(folder / "data", slides=slides, seed=1)
        cluster.connect()
        for index in range(rounds + 1):  # the first round warms up
            seconds = {"bare": bare(paths, folder / f"bare{index}")}
            out = folder / f"set{index}"
            start = time.perf_counter()
            ingest(
                [str(folder / "data" / "slides")],
                annotations=str(folder / "data" / "annotations"),
                out=str(out),
            )
            whole = time.perf_counter() - start
            rows = read_table(str(out / "slides.parquet")).to_pylist()
            first = min(row["first_cut_at"] for row in rows)
            last = max(row["last_cut_at"] for row in rows)
            seconds["medray, first cut to last"] = last - first
            seconds["medray, whole stage"] = whole
            if index:
                for variant, one in seconds.items():
                    found.add(variant, **{"seconds": one, "MPix/s": megapixels / one})
        ray.shutdown()
    yield found


if __name__ == "__main__":
    harness.run(main)
