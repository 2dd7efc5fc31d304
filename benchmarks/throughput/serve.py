"""What a request costs beside the bare model: latency and requests a second under load.

Interleaved, on the same images, in memory as PNG or TIFF:

    bare    one process, one thread of requests: decode, predict, compress, no HTTP
    serve   `medray serve` on Ray Serve: N clients, each asks again when it is answered

Run: python benchmarks/serve.py --clients 1 4 16 --rounds 3 [--kind classify]
"""

import argparse
import asyncio
import io
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from PIL import Image
from ray import serve as ray_serve

from medray.apps import serve
from medray.apps.serve import ServeSettings
from medray.apps.served import Served
from medray.classes import Classes
from medray.datasets.synthetic import generate
from medray.execution import cluster
from medray.geometry import Windows
from medray.models.classifiers import build_classifier
from medray.models.config import Architecture, ModelConfig
from medray.models.folder import save_model
from medray.models.segmenters import build_segmenter
from medray.slides import open_slide


def make_model(folder: Path, kind: str) -> str:
    torch.manual_seed(0)
    if kind == "segment":
        architecture = Architecture("unet", "resnet18")
        network: Any = build_segmenter(architecture, 2)
        windows, mpp = Windows(512, 384), 0.5
    else:
        architecture = Architecture("classifier", "resnet18")
        network = build_classifier(architecture, 2)
        windows, mpp = Windows(224, 224), None
    config = ModelConfig(
        architecture=architecture, classes=Classes(), window=windows, mpp=mpp
    )
    save_model(str(folder), config, network, {"f1": None})
    return str(folder)


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
    return {"p50_s": p50, "p95_s": p95, "p99_s": p99, "requests_a_s": rate}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=("segment", "classify"), default="segment")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--requests", type=int, default=48, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", type=int, default=0, help="of an image, pixels")
    args = parser.parse_args()
    side = args.side or (1024 if args.kind == "segment" else 224)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", args.kind)
        images = make_images(folder / "images", side, 8)
        paths = []
        for number, data in enumerate(images):
            paths.append(str(folder / f"{number}.png"))
            Path(paths[-1]).write_bytes(data)
        cores = os.cpu_count() or 1
        bare = Served(model, precision="float32", threads=cores)
        cluster.connect()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = {"host": "127.0.0.1", "port": port}
        ray_serve.start(proxy_location="HeadOnly", http_options=options)
        how = ServeSettings(model=model, precision="float32", cpus=cores)
        ray_serve.run(serve._deploy(how, ""), name=serve.APP, route_prefix="/")
        url = f"http://127.0.0.1:{port}/{args.kind}"
        asyncio.run(run_clients(url, images, 2, 8))
        run_bare(bare, paths, 4)
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            start = time.perf_counter()
            seconds = run_bare(bare, paths, args.requests)
            wall = time.perf_counter() - start
            found.setdefault("bare", []).append(summary(seconds, wall))
            for clients in args.clients:
                start = time.perf_counter()
                seconds = asyncio.run(run_clients(url, images, clients, args.requests))
                wall = time.perf_counter() - start
                found.setdefault(f"{clients} clients", []).append(
                    summary(seconds, wall)
                )
        ray_serve.shutdown()
    medians = {
        who: {key: round(statistics.median(r[key] for r in rows), 4) for key in rows[0]}
        for who, rows in found.items()
    }
    ratios = {
        who: round(
            statistics.median(
                mine["requests_a_s"] / other["requests_a_s"]
                for mine, other in zip(rows, found["bare"], strict=True)
            ),
            3,
        )
        for who, rows in found.items()
    }
    print(
        json.dumps({"side": side, "medians": medians, "rate / bare": ratios}, indent=1)
    )


if __name__ == "__main__":
    main()
