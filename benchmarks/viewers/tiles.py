"""Latency of the viewer's tiles, compared with a plain read of the same pixels.

A slide of gigapixels (JPEG tiles of 512 px, levels of 1/4) whose mask is written in
one corner; `medray view` serves it on loopback. For random tiles of each zoom, in turn:
the tile over HTTP, then the same rectangle by tifffile's zarr store, or the same part
of the mask by zarr, in this process. What the viewer adds is encoding and HTTP.

Run: python -m benchmarks.viewers.tiles [--side 61440] [--tiles 150]
"""

import concurrent.futures
import http.client
import itertools
import json
import math
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tifffile
import zarr

from benchmarks import harness
from medray.apps.viewer.tiles import TILE, last_zoom
from medray.classes import Classes
from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.geometry import Rectangle, Windows
from medray.inference.run import RunSettings, mask_uri, open_run
from medray.slides.fingerprint import fingerprint_of, slide_digest
from medray.slides.opening import open_slide
from medray.slides.resolution import choose_level
from medray.storage import files, ome_zarr

CORNER = 8192  # pixels of the mask that are written, a side


def write_gigapixels(folder: Path, side: int) -> Path:
    """Repeat the encoded tiles of a small slide, at every level."""
    small = write_slide(folder, "small", draw_scene(1, height=2048, width=2048))
    with tifffile.TiffFile(small) as tiff:
        page = tiff.pages[0]
        tiles = [
            tiff.filehandle.read_array("u1", count, offset=offset).tobytes()
            for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True)
        ]
        options: dict[str, Any] = {"photometric": page.photometric}
        options |= {"tile": (512, 512), "dtype": "uint8", "compression": "jpeg"}
    path = folder / "large.tif"
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        levels = [side >> (2 * k) for k in range(4)]
        for k, length in enumerate(levels):
            count = math.ceil(length / 512) ** 2
            tiff.write(
                itertools.islice(itertools.cycle(tiles), count),
                shape=(length, length, 3),
                subifds=len(levels) - 1 if k == 0 else None,
                subfiletype=0 if k == 0 else 1,
                resolution=(20000, 20000),
                resolutionunit="CENTIMETER",
                **options,
            )
    return path


def write_run(folder: Path, path: Path) -> str:
    """A run with a mask of that slide, written in one corner."""
    run, uri = str(folder / "run"), str(path)
    settings = RunSettings(
        models=("model",),
        model_digest="",
        classes=Classes(),
        windows=Windows(),
        model_mpp=0.5,
    )
    open_run(run, settings)
    slide = open_slide(uri)
    working = choose_level(slide, 0.5, None)
    size = (working.height, working.width)
    mask = mask_uri(run, "large")
    ome_zarr.create_labels(
        mask, *size, mpp=0.5, name="large", classes=Classes(), attributes={"a": 1}
    )
    pattern = np.kron(
        np.random.default_rng(0).integers(0, 2, (32, 32)), np.ones((64, 64))
    ).astype(np.uint8)
    for y in range(0, min(CORNER, size[0]), ome_zarr.REGION):
        for x in range(0, min(CORNER, size[1]), ome_zarr.REGION):
            region = Rectangle(y, x, ome_zarr.REGION, ome_zarr.REGION)
            ome_zarr.write_region(mask, region, pattern)
    ome_zarr.build_pyramid(mask)
    row = {"slide": "large", "status": "done", "message": "", "uri": uri}
    row |= {
        "digest": slide_digest(uri),
        "fingerprint": fingerprint_of(uri),
        "annotation": "",
    }
    row |= {"level": working.level, "scale": working.scale, "mpp": working.mpp}
    row |= {"downsample": working.downsample, "height": size[0], "width": size[1]}
    row |= {"level0_height": size[0], "level0_width": size[1], "committed_at": 0.0}
    row |= {"note": "", "px_background": 0, "px_tumour": 0}
    files.write_table(files.join(run, "slides.parquet"), pa.Table.from_pylist([row]))
    return run


def measure(port: int, run: str, path: Path, tiles: int) -> Iterator[harness.Result]:
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def get(url: str, over: http.client.HTTPConnection = connection) -> float:
        start = time.perf_counter()
        over.request("GET", url)
        answer = over.getresponse()
        data = answer.read()
        assert answer.status == 200, data
        return time.perf_counter() - start

    yield {"first tile, ms": round(1e3 * get("/tile/slide/0/0/0?slide=large"))}
    pages = tifffile.TiffFile(path).series[0].levels
    side = pages[0].shape[0]
    last = last_zoom(side, side)
    store = [
        zarr.open(tifffile.imread(path, aszarr=True, series=0, level=k), mode="r")
        for k in range(len(pages))
    ]
    mask = [
        zarr.open_array(f"{mask_uri(run, 'large')}/{k}", mode="r")
        for k in range(len(ome_zarr.level_shapes(side, side)))
    ]
    draw = random.Random(0)
    corner = min(CORNER, side)
    for zoom in range(last, max(last - 7, 0), -1):
        step = 1 << (last - zoom)
        level = (last - zoom) // 2 if (last - zoom) // 2 < len(store) else -1
        factor = step / 4 ** (level if level >= 0 else len(store) - 1)
        slide = harness.Rounds("tifffile", {"what": "slide", "zoom": f"1/{step}"})
        labels = harness.Rounds("zarr", {"what": "mask", "zoom": f"1/{step}"})
        for _ in range(tiles):
            y, x = (draw.randrange(max(1, side // step // TILE)) for _ in "yx")
            seconds = get(f"/tile/slide/{zoom}/{y}/{x}?slide=large")
            slide.add("medray view", ms=1e3 * seconds)
            start = time.perf_counter()
            a, b = int(TILE * factor * y), int(TILE * factor * x)
            n = int(TILE * factor)
            np.asarray(store[level][a : a + n, b : b + n])
            slide.add("tifffile", ms=1e3 * (time.perf_counter() - start))
            y, x = (draw.randrange(max(1, corner // step // TILE)) for _ in "yx")
            url = f"/tile/mask/{zoom}/{y}/{x}?slide=large&shown=1"
            labels.add("medray view", ms=1e3 * get(url))
            start = time.perf_counter()
            rows = slice(TILE * y, TILE * (y + 1)), slice(TILE * x, TILE * (x + 1))
            np.asarray(mask[min(last - zoom, len(mask) - 1)][rows])
            labels.add("zarr", ms=1e3 * (time.perf_counter() - start))
        yield slide
        yield labels
        yield {
            "zoom": f"1/{step}",
            "p95, ms: slide": round(p95(slide), 1),
            "p95, ms: mask": round(p95(labels), 1),
        }

    def pan(_: int) -> int:
        over = http.client.HTTPConnection("127.0.0.1", port)
        mine = random.Random(_)
        for _ in range(tiles // 3):
            y, x = (mine.randrange(side // TILE) for _ in "yx")
            get(f"/tile/slide/{last}/{y}/{x}?slide=large", over)
        return tiles // 3

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        count = sum(pool.map(pan, range(6)))
    rate = count / (time.perf_counter() - start)
    yield {"six at once, as browsers ask, tiles/s": round(rate)}


def p95(found: harness.Rounds) -> float:
    return statistics.quantiles(found.figures["medray view"]["ms"], n=20)[-1]


def main(side: int = 61440, tiles: int = 150) -> Iterator[harness.Result]:
    """Compare the viewer's tiles with plain reads of the same pixels.

    Args:
        side: Of the slide, pixels.
        tiles: Number of tiles of each zoom.
    """
    with tempfile.TemporaryDirectory() as name:
        path = write_gigapixels(Path(name), side)
        yield {"side": side, "file, MiB": round(path.stat().st_size / 2**20)}
        run = write_run(Path(name), path)
        command = [sys.executable, "-m", "medray.cli", "view", run, "--json"]
        server = subprocess.Popen(
            [*command, "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        assert server.stdout is not None
        try:
            url = json.loads(server.stdout.readline())["url"]
            yield from measure(
                int(url.rstrip("/").rpartition(":")[2]), run, path, tiles
            )
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)


if __name__ == "__main__":
    harness.run(main)
