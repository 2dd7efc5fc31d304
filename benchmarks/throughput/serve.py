"""Serving compared with the bare model: latency and requests per second under load.

Interleaved, on the same images, in memory as PNG or TIFF:

    bare    one process, one thread of requests: decode, predict, compress, no HTTP
    serve   `medray serve` on Ray Serve: N clients, each asks again when it is answered

Run: python -m benchmarks.throughput.serve --clients 1 4 16 --rounds 3 [--kind classify]
"""

import asyncio
import functools
import io
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx2
import numpy as np
from PIL import Image
from ray import serve as ray_serve

from benchmarks import harness
from benchmarks.random_model import random_model
from medray.apps import serve
from medray.apps.serve.model import Served
from medray.apps.serve.settings import ServeSettings
from medray.datasets.synthetic import generate
from medray.execution import cluster
from medray.slides.opening import open_slide


def make_images(folder: Path, side: int, count: int) -> list[bytes]:
    generate(folder, slides=count, seed=1, height=side, width=side)
    images = []
    for path in sorted((folder / "slides").iterdir()):
        with open_slide(path) as slide:
            pixels = slide.read(0, 0, side, side)
        target = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels)).save(target, "PNG")
        images.append(target.getvalue())
    return images


def run_bare(served: Served, paths: list[str], requests: int) -> list[float]:
    seconds = []
    for number in range(requests):
        start = time.perf_counter()
        image = served.read(paths[number % len(paths)])
        served.finish(image, *served.predict([image]))
        seconds.append(time.perf_counter() - start)
    return seconds


async def run_clients(
    url: str, images: list[bytes], clients: int, requests: int
) -> list[float]:
    todo = iter(range(requests))
    seconds: list[float] = []
    headers = {"Content-Type": "image/png"}

    async def client() -> None:
        async with httpx2.AsyncClient(timeout=300) as line:
            for number in todo:
                start = time.perf_counter()
                body = images[number % len(images)]
                answer = await line.post(url, content=body, headers=headers)
                answer.raise_for_status()
                seconds.append(time.perf_counter() - start)

    await asyncio.gather(*(client() for _ in range(clients)))
    return seconds


def summary(seconds: list[float], wall: float) -> dict[str, float]:
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
    rate = len(seconds) / wall
    return {"p50, s": p50, "p95, s": p95, "p99, s": p99, "requests/s": rate}


def main(
    kind: Literal["segment", "classify"] = "segment",
    clients: tuple[int, ...] = (1, 4, 16),
    requests: int = 48,
    rounds: int = 3,
    side: int | None = None,
) -> Iterator[harness.Result]:
    """Compare `medray serve` with the bare model on the same images.

    Args:
        kind: What the model does.
        clients: Numbers of clients that ask at once.
        requests: Number of requests of each measurement.
        rounds: Number of rounds.
        side: Of an image, pixels; without it 1024, of a classifier 224.
    """
    side = side or (1024 if kind == "segment" else 224)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if kind == "segment":
            model = random_model(folder / "model")
        else:
            model = random_model(
                folder / "model", "classifier", window=(224, 224), mpp=None
            )
        images = make_images(folder / "images", side, 8)
        paths = []
        for number, data in enumerate(images):
            paths.append(str(folder / f"{number}.png"))
            Path(paths[-1]).write_bytes(data)
        cores = os.cpu_count() or 1
        served = Served(model, precision="float32", threads=cores)
        cluster.connect()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = {"host": "127.0.0.1", "port": port}
        ray_serve.start(proxy_location="HeadOnly", http_options=options)
        how = ServeSettings(model=model, precision="float32", cpus=cores)
        ray_serve.run(serve._deploy(how, ""), name=serve.APP, route_prefix="/")
        url = f"http://127.0.0.1:{port}/{kind}"
        asyncio.run(run_clients(url, images, 2, 8))
        run_bare(served, paths, 4)

        def bare() -> dict[str, float]:
            start = time.perf_counter()
            seconds = run_bare(served, paths, requests)
            return summary(seconds, time.perf_counter() - start)

        def asked(count: int) -> dict[str, float]:
            start = time.perf_counter()
            seconds = asyncio.run(run_clients(url, images, count, requests))
            return summary(seconds, time.perf_counter() - start)

        variants = {"bare model": bare}
        variants |= {f"{n} clients": functools.partial(asked, n) for n in clients}
        yield harness.interleaved(variants, rounds, warmup=0, kind=kind, side=side)
        ray_serve.shutdown()


if __name__ == "__main__":
    harness.run(main)
