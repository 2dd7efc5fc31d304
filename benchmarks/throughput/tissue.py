"""Cost follows tissue: a slide with little of it, and a first pass that looks coarsely.

Run: python -m benchmarks.throughput.tissue --model demo/model --side 8192
"""

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import ray

from benchmarks import harness
from medray.datasets.synthetic import write_pyramid, write_slide
from medray.datasets.synthetic_scene import Scene, draw_scene
from medray.execution import cluster
from medray.inference.infer_run import infer
from medray.inference.run import Options, mask_uri
from medray.storage import ome_zarr
from medray.storage.files import read_table

FIELD = 2048


def measure(path: Path, model: str, out: Path, **options) -> tuple[dict, np.ndarray]:
    infer([str(path)], model=model, out=str(out), options=Options(**options))
    first, last, windows = float("inf"), 0.0, 0
    for folder in (out / "coarse", out):
        if (folder / "slides.parquet").exists():
            (row,) = read_table(str(folder / "slides.parquet")).to_pylist()
            if row["status"] != "done":
                raise SystemExit(f"{path.stem}: {row['message']}")
            first = min(first, row["first_read_at"] or first)
            last, windows = row["committed_at"], windows + row["windows"]
    figures = {"slide": path.stem, **options, "s": round(last - first, 1)}
    mask = np.asarray(ome_zarr.open_level(mask_uri(str(out), path.stem))[:])
    return figures | {"windows": windows}, mask


def f1(mask: np.ndarray, truth: np.ndarray) -> float:
    both = int(((mask == 1) & (truth == 1)).sum())
    return 2 * both / (int((mask == 1).sum()) + int((truth == 1).sum()))


def mostly_healthy(folder: Path, side: int) -> tuple[Path, np.ndarray]:
    """A slide whose fields are drawn one by one, an eighth of them with tumour."""
    fields = side // FIELD
    scenes = [
        draw_scene(50 + i, height=FIELD, width=FIELD, tumour=i % 8 == 5)
        for i in range(fields**2)
    ]
    pixels, mask = (
        np.vstack(
            [
                np.hstack([getattr(s, part) for s in scenes[first : first + fields]])
                for first in range(0, fields**2, fields)
            ]
        )
        for part in ("pixels", "mask")
    )
    scene = Scene(pixels, [], mask)
    return write_slide(folder, "mostly_healthy", scene, layout="pyramid"), mask


def main(model: str, side: int = 8192) -> Iterator[harness.Result]:
    """Measure slides with little tissue, and a coarse first pass.

    Args:
        model: Model folder.
        side: Of the slides, a multiple of 2048 pixels.
    """
    logging.getLogger("medray").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        cluster.connect()
        for share in (1.0, 0.2):
            path = Path(name) / f"tissue{share * 100:.0f}.tif"
            write_pyramid(path, side, side, seed=1, tissue=share)
            figures, _ = measure(path, model, Path(name) / f"{share}")
            yield figures
        path, truth = mostly_healthy(Path(name), side)
        for coarse in (1, 2, 4):
            out = Path(name) / f"coarse{coarse}"
            figures, mask = measure(path, model, out, coarse=coarse)
            yield figures | {"F1": round(f1(mask, truth), 4)}
        ray.shutdown()


if __name__ == "__main__":
    harness.run(main)
