"""Pixels through the object store, or the slide's own compressed tiles?

A reader gives regions to the process that would predict them: decoded, or as the
tiles' bytes, which that process then decodes. On one machine, and across two raylets
(on one machine too, but through sockets instead of shared memory).

Run: python -m benchmarks.throughput.shipping
"""

import contextlib
import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import ray
from ray.cluster_utils import Cluster
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from benchmarks import harness
from medray.datasets.synthetic import write_pyramid
from medray.slides.tiff import TiffSlide, _touched

SIDE = 3072


class Shipped(TiffSlide):
    """A slide whose tiles came from elsewhere."""

    tiles: dict[int, bytes]

    def take(self, y: int, x: int) -> dict[int, bytes]:
        page = self._pages[0][0]
        indices = [*_touched(page.keyframe, 1, y, x, SIDE, SIDE)]
        return dict(self._stored(page, 0, indices))

    def decode(self, tiles: dict[int, bytes], y: int, x: int) -> np.ndarray:
        self.tiles = tiles
        return self.read(y, x, SIDE, SIDE)


class FromTiles(Shipped):
    def _stored(self, page, level, indices):
        return ((index, self.tiles[index]) for index in indices)


class Reader:
    def __init__(self, path: str) -> None:
        self.slide = Shipped(path)

    def give(self, way: str, y: int, x: int):
        if way == "pixels":
            return self.slide.read(y, x, SIDE, SIDE)
        tiles = self.slide.take(y, x)
        ends = np.cumsum([len(data) for data in tiles.values()])
        joined = np.frombuffer(b"".join(tiles.values()), np.uint8)
        return joined, list(tiles), ends

    def cpu(self) -> float:
        return time.process_time()


class Predictor:
    """Takes regions, two ahead, and touches every pixel once."""

    def __init__(self, path: str, reader) -> None:
        self.slide, self.reader = FromTiles(path), reader

    def work(self, way: str, places: list) -> dict:
        start, cpu = time.perf_counter(), time.process_time()
        refs = [self.reader.give.remote(way, *place) for place in places[:2]]
        shipped = total = 0
        for i, (y, x) in enumerate(places):
            if i + 2 < len(places):
                refs.append(self.reader.give.remote(way, *places[i + 2]))
            pixels = ray.get(refs[i])
            if way == "tiles":
                joined, indices, ends = pixels
                shipped += joined.nbytes
                parts = np.split(joined, ends[:-1])
                tiles = {
                    k: part.tobytes() for k, part in zip(indices, parts, strict=True)
                }
                pixels = self.slide.decode(tiles, y, x)
            else:
                shipped += pixels.nbytes
            total += int(pixels[::16].sum())
            refs[i] = None
        return {
            "s": time.perf_counter() - start,
            "cpu": time.process_time() - cpu,
            "MB": shipped / 1e6,
            "sum": total,
        }


def measure(
    path: str, places: list, nodes: list[str], rounds: int
) -> Iterator[harness.Rounds]:
    for where, (first, second) in {
        "one node": (nodes[0], nodes[0]),
        "two nodes": (nodes[0], nodes[1]),
    }.items():
        on = [
            NodeAffinitySchedulingStrategy(node, soft=False) for node in (first, second)
        ]
        reader = (
            ray.remote(Reader).options(num_cpus=1, scheduling_strategy=on[0])
        ).remote(path)
        predictor = (
            ray.remote(Predictor).options(num_cpus=1, scheduling_strategy=on[1])
        ).remote(path, reader)
        sums: set[int] = set()

        def ship(way: str, reader=reader, predictor=predictor, sums=sums) -> dict:
            before = ray.get(reader.cpu.remote())
            one = ray.get(predictor.work.remote(way, places))
            cpu = ray.get(reader.cpu.remote()) - before
            sums.add(one["sum"])
            return {
                "ms per region": one["s"] / len(places) * 1e3,
                "MB per region": one["MB"] / len(places),
                "reader's CPU, ms": cpu / len(places) * 1e3,
                "predicting process's CPU, ms": one["cpu"] / len(places) * 1e3,
            }

        ways = {way: functools.partial(ship, way) for way in ("pixels", "tiles")}
        yield harness.interleaved(ways, rounds, where=where)
        assert len(sums) == 1  # both saw the same pixels
        ray.kill(predictor)
        ray.kill(reader)


def main(regions: int = 24, rounds: int = 3) -> Iterator[harness.Result]:
    """Compare regions sent decoded with regions sent as the slide's tiles.

    Args:
        regions: Number of regions of 3072 px.
        rounds: Number of rounds.
    """
    cluster = Cluster()
    size = {"num_cpus": 2, "object_store_memory": 600 << 20}
    cluster.add_node(**size)
    cluster.add_node(**size)
    ray.init(address=cluster.address, logging_level="ERROR")
    nodes = [node["NodeID"] for node in ray.nodes()]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(cluster.shutdown)
        stack.callback(ray.shutdown)
        path = Path(folder) / "slide.tif"
        write_pyramid(path, 12288, 12288, seed=1, tissue=1.0)
        rng = np.random.default_rng(0)
        places = [
            tuple(int(n) for n in rng.integers(0, 12288 - SIDE, 2))
            for _ in range(regions)
        ]
        yield from measure(str(path), places, nodes, rounds)


if __name__ == "__main__":
    harness.run(main)
