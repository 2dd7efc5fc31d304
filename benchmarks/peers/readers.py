r"""Reading regions of JPEG tiles: medray, OpenSlide, cuCIM, fastslide, zarr compared.

Interleaved rounds: the same rectangles of the same files by each reader,
by one process and by two at once (medray reads in processes). What each has read is
compared, and what each answers to a damaged tile.

Run, in an environment of its own:
python3.12 -m venv READERS
READERS/bin/pip install cucim-cu13 fastslide openslide-python openslide-bin tifffile \
    imagecodecs zarr pyarrow dask fsspec s3fs defusedxml pyyaml pillow scipy \
    "jsonargparse[signatures]"
READERS/bin/python -m benchmarks.peers.readers --slides SLIDE.svs SLIDE.tiff
"""

import functools
import multiprocessing
import queue
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr

from benchmarks import harness
from medray.slides.tiff import TiffSlide

Read = Callable[[int, int, int], np.ndarray]


def by_medray(path: str) -> Read:
    slide = TiffSlide(path)
    return lambda y, x, side: slide.read(y, x, side, side)


def by_zarr(path: str) -> Read:
    store = tifffile.imread(path, aszarr=True, series=0, level=0, maxworkers=1)
    array = zarr.open(store, mode="r")
    return lambda y, x, side: np.asarray(array[y : y + side, x : x + side])


def by_openslide(path: str) -> Read:
    import openslide

    slide = openslide.OpenSlide(path)
    return lambda y, x, side: np.asarray(
        slide.read_region((x, y), 0, (side, side)).convert("RGB")
    )


def by_cucim(path: str) -> Read:
    import cucim

    slide = cucim.CuImage(path)
    return lambda y, x, side: np.asarray(
        slide.read_region((x, y), (side, side), level=0)
    )


def by_fastslide(path: str) -> Read:
    import fastslide

    slide = fastslide.FastSlide.from_file_path(path)
    return lambda y, x, side: np.asarray(
        slide.read_region((x, y), 0, (side, side)).numpy()
    )[..., :3]


READERS = {
    "medray": by_medray,
    "cucim": by_cucim,
    "fastslide": by_fastslide,
    "openslide": by_openslide,
    "tifffile's zarr view": by_zarr,
}


_READ: dict[str, Read] = {}


def open_all(path: str) -> None:
    """Open the slide by each reader that can, in this process."""
    _READ.clear()
    for name, reader in READERS.items():
        try:
            _READ[name] = reader(path)
        except Exception as error:
            print(f"{Path(path).name}: {name} cannot read it: {error!r}"[:200])


def first(name: str, y: int, x: int, side: int) -> np.ndarray:
    return _READ[name](y, x, side)


def seconds_of(name: str, places: list, side: int) -> float:
    start = time.perf_counter()
    for y, x in places:
        _READ[name](y, x, side)
    return time.perf_counter() - start


def measure(path: str, side: int, reads: int, rounds: int) -> harness.Rounds:
    with tifffile.TiffFile(path) as tiff:
        height, width = tiff.series[0].shape[:2]
    side = min(side, height, width)
    rng = random.Random(0)
    places = [
        (rng.randint(0, height - side), rng.randint(0, width - side))
        for _ in range(reads)
    ]
    open_all(path)
    names = list(_READ)
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(2, open_all, (path,)) as pool:
        pixels = {name: pool.apply(first, (name, *places[0], side)) for name in names}

        def rate(name: str) -> dict[str, float]:
            rates = {}
            for processes in (1, 2):
                work = [(name, places, side)] * processes
                slowest = max(pool.starmap(seconds_of, work, chunksize=1))
                done = processes * reads * side * side
                rates[f"MPix/s of {processes}"] = done / slowest / 1e6
            return rates

        differences = {
            name: int(np.abs(own.astype(int) - pixels["medray"]).max())
            for name, own in pixels.items()
        }
        return harness.interleaved(
            {name: functools.partial(rate, name) for name in names},
            rounds,
            warmup=0,
            slide=Path(path).name,
            side=side,
            largest_differences=differences,
        )


def read_to(answers: Any, name: str, path: str, y: int, x: int) -> None:
    try:
        answers.put(READERS[name](path)(y, x, 256))
    except Exception as error:
        answers.put(f"refused: {error}"[:100])


def answers_to_damage(path: Path) -> dict[str, str]:
    """What each reader gives of a tile whose bytes are overwritten with zeros."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        place, size = page.dataoffsets[40], page.databytecounts[40]
        across = -(-page.imagewidth // 256)
    damaged = path.with_name("damaged.tif")
    shutil.copy(path, damaged)
    with damaged.open("r+b") as file:
        file.seek(place)
        file.write(bytes(size))
    y, x = 40 // across * 256, 40 % across * 256
    found = {}
    spawn = multiprocessing.get_context("spawn")
    for name in READERS:
        answers = spawn.Queue()
        arguments = (answers, name, str(damaged), y, x)
        process = spawn.Process(target=read_to, args=arguments)
        process.start()
        try:
            answer = answers.get(timeout=30)
        except queue.Empty:
            answer = "hangs, or its process has died"
        process.kill()
        if isinstance(answer, np.ndarray):
            answer = f"gives pixels, their mean {answer.mean():.1f}, as if nothing was"
        found[name] = answer
    return found


def write_tiles(path: Path, side: int) -> None:
    """A plain pyramid that every reader knows, texture like tissue."""
    rng = np.random.default_rng(0)
    small = rng.integers(90, 240, (side // 8, side // 8, 3), dtype=np.uint8)
    pixels = small.repeat(8, 0).repeat(8, 1)
    pixels += rng.integers(0, 15, pixels.shape, dtype=np.uint8)
    options = {"tile": (256, 256), "compression": "jpeg", "photometric": "rgb"}
    options |= {"compressionargs": {"level": 85}, "metadata": None}
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(pixels, **options)
        while min(pixels.shape[:2]) > 1024:
            pixels = np.ascontiguousarray(pixels[::2, ::2])
            writer.write(pixels, subfiletype=1, **options)


def main(
    slides: tuple[str, ...] = (),
    sides: tuple[int, ...] = (512, 3072),
    rounds: int = 5,
) -> Iterator[harness.Result]:
    """Compare readers of JPEG tiles, by one process and by two at once.

    Args:
        slides: Files in addition to the generated pyramid.
        sides: Of the regions, pixels.
        rounds: Number of rounds.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "generated.tif"
        write_tiles(path, 8192)
        yield {"a damaged tile": answers_to_damage(path)}
        for slide in (str(path), *slides):
            for side in sides:
                reads = max(4, 48 * 512 * 512 // side**2)
                yield measure(slide, side, reads, rounds)


if __name__ == "__main__":
    harness.run(main)
