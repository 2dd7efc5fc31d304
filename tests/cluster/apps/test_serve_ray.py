"""`medray serve` on Ray Serve: its answers are those of runs and reports."""

import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import serial
import tifffile
from documents import lines_of
from PIL import Image
from serving import (
    AUTH,
    PNG,
    SIDE,
    TOKEN,
    as_bytes,
    free_port,
    picture,
    save_classifier,
)

from medray.apps.serve import deployment as serve
from medray.apps.serve.api import token_digest
from medray.apps.serve.requests import Bounds
from medray.apps.serve.settings import ServeSettings
from medray.datasets.dataset import read_patches
from medray.datasets.image_folder import ingest_images
from medray.evaluation.evaluate_image_folder import evaluate_images
from medray.inference.run import Options
from medray.models.config import Prediction
from medray.models.predict import Predictor
from medray.storage import ome_zarr
from medray.storage.files import read_json


@pytest.fixture(scope="session")
def model(slow_model: Path) -> Path:
    return slow_model


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_classifier(tmp_path_factory.mktemp("classifier") / "cells", None)


def write_cells(folder: Path) -> Path:
    """Two classes that differ in colour; what the model says of them is its own."""
    for label, name in enumerate(("sane", "sick")):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = picture(50 + number, 60, 100 * label + number)
            pixels[..., label] //= 2
            Image.fromarray(pixels).save(folder / name / f"c{number}.png")
    return folder


@dataclass(frozen=True)
class Truth:
    """What runs and reports say."""

    report: str
    cells: Path
    said: list[dict[str, str]]
    run: Path


@pytest.fixture(scope="module")
def truth(
    cluster: None,
    classifier: str,
    model: Path,
    slides: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Truth:
    folder = tmp_path_factory.mktemp("truth")
    cells, data, report = (folder / name for name in ("cells", "data", "report"))
    ingest_images(str(write_cells(cells)), out=str(data), side=SIDE, executor="local")
    evaluate_images(classifier, data=str(data), out=str(report), executor="local")
    with (report / "images.csv").open() as file:
        said = list(csv.DictReader(file))
    # A plain loop's run: what every run on Ray equals.
    prediction = Prediction(precision="float32")
    predictor = Predictor.from_folders([str(model)], prediction)
    options = Options(prediction=prediction, outlines=True)
    serial.infer(slides / "slides", predictor, model, folder / "run", options)
    assert read_patches(str(data), "test")
    return Truth(str(report), cells, said, folder / "run")


@pytest.fixture(scope="module")
def address(cluster: None) -> Iterator[str]:
    from ray import serve as ray_serve

    port = free_port()
    ray_serve.start(
        proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port}
    )
    yield f"http://127.0.0.1:{port}"
    ray_serve.shutdown()


def deploy(
    address: str, name: str, model: str, report: str = "", replicas: int = 1
) -> str:
    """Serve a model under a prefix of its own, if it is not served yet.

    The application's name is unique here.
    """
    from ray import serve as ray_serve

    application = f"{name}-{os.getpid()}"
    if application in ray_serve.status().applications:
        return f"{address}/{name}"
    bounds = Bounds(timeout_s=120.0, max_mbyte=5.0)
    how = ServeSettings(
        model=model,
        report=report,
        precision="float32",
        max_replicas=replicas,
        cpus=1,
        bounds=bounds,
    )
    app = serve._deploy(how, token_digest(TOKEN))
    ray_serve.run(app, name=application, route_prefix=f"/{name}")
    return f"{address}/{name}"


# Not of the module: test_replicas_come_with_the_requests takes all others away.
@pytest.fixture
def segmenter_url(address: str, model: Path) -> str:
    return deploy(address, "segmenter", str(model))


@pytest.fixture
def classifier_url(address: str, classifier: str, truth: Truth) -> str:
    return deploy(address, "classifier", classifier, truth.report)


def post(url: str, body: bytes, stated: str = "image/png", **query: Any) -> Any:
    headers = AUTH | {"Content-Type": stated}
    return httpx2.post(url, content=body, headers=headers, params=query, timeout=150)


def test_a_served_mask_is_a_runs_to_the_byte(
    truth: Truth, segmenter_url: str, slides: Path
) -> None:
    paths = sorted((slides / "slides").iterdir())
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda path: post(
                    f"{segmenter_url}/segment", path.read_bytes(), "image/tiff"
                ),
                paths * 3,
            )
        )
    seen = set()
    for path, answer in zip(paths * 3, answers, strict=True):
        assert answer.status_code == 200, answer.text
        mask = ome_zarr.open_level(str(truth.run / "masks" / f"{path.stem}.ome.zarr"))
        expected = np.asarray(mask)
        found = np.asarray(Image.open(io.BytesIO(answer.content)))
        np.testing.assert_array_equal(found, expected)
        seen.add(expected.tobytes())
        assert 0 < expected.mean() < 1
    assert len(seen) == len(paths)  # so each got its own
    body = paths[0].read_bytes()
    answer = post(f"{segmenter_url}/segment", body, "image/tiff", format="geojson")
    outlines = truth.run / "outlines" / f"{paths[0].stem}.geojson"
    assert answer.headers["content-type"] == "application/geo+json"
    assert answer.content == outlines.read_bytes()


def test_a_served_class_is_the_reports(
    classifier_url: str, truth: Truth, tmp_path: Path
) -> None:
    temperature = read_json(f"{truth.report}/metrics.json")["calibration"][
        "temperature"
    ]
    assert len(truth.said) >= 2

    def ask(row: dict[str, str]) -> Any:
        body = (truth.cells / row["image"]).read_bytes()
        return post(f"{classifier_url}/classify", body)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, truth.said * 4))
    for row, answer in zip(truth.said * 4, answers, strict=True):
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["temperature"] == temperature
        assert found["class"] == row["predicted"]
        said = {name: float(row[f"p_{name}"]) for name in ("sane", "sick")}
        # What the report has before its temperature.
        shares = {k: v**temperature for k, v in found["probabilities"].items()}
        total = sum(shares.values())
        assert {k: v / total for k, v in shares.items()} == pytest.approx(
            said, abs=1e-4
        )
    # As docs/serve.md asks for it, at this address.
    (curl,) = (line for line in lines_of("docs/serve.md") if "/classify" in line[-1])
    (tmp_path / "cell.png").symlink_to(truth.cells / truth.said[0]["image"])
    curl[-1] = f"{classifier_url}/classify"
    curl += ["-sSf", "-H", f"Authorization: {AUTH['Authorization']}"]
    told = subprocess.run(curl, cwd=tmp_path, check=True, capture_output=True)
    assert json.loads(told.stdout)["class"] == truth.said[0]["predicted"]


def test_bad_requests_get_help_through_the_proxy_too(segmenter_url: str) -> None:
    found = post(f"{segmenter_url}/segment", PNG[:300])
    assert (found.status_code, "expected a PNG" in found.json()["detail"]) == (
        422,
        True,
    )
    assert post(f"{segmenter_url}/classify", PNG).status_code == 409
    found = httpx2.post(f"{segmenter_url}/segment", content=PNG)
    assert (found.status_code, found.headers["www-authenticate"]) == (401, "Bearer")
    start = time.monotonic()
    with socket.create_connection(
        ("127.0.0.1", int(segmenter_url.split(":")[2].split("/")[0]))
    ) as line:
        line.sendall(
            b"POST /segmenter/segment HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
            b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
            b"Content-Length: 2000000000\r\n\r\n" + bytes(1000)
        )
        line.settimeout(30)
        assert line.recv(100).startswith(b"HTTP/1.1 413")  # without the body
    assert time.monotonic() - start < 20
    assert httpx2.get(f"{segmenter_url}/healthz", timeout=60).json() == {"status": "ok"}


def test_when_a_replica_is_killed_the_next_requests_are_answered(
    segmenter_url: str, slides: Path
) -> None:
    body = next((slides / "slides").iterdir()).read_bytes()
    before = post(f"{segmenter_url}/segment", body, "image/tiff")
    name = f"ServeReplica:segmenter-{os.getpid()}"
    processes = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cmdline")
        if name in path.read_bytes().decode(errors="replace")
    ]
    assert len(processes) == 1
    os.kill(processes[0], signal.SIGKILL)
    deadline = time.monotonic() + 240
    while True:  # while it restarts, requests wait or get 5xx, and none hangs
        answer = post(f"{segmenter_url}/segment", body, "image/tiff")
        if answer.status_code == 200:
            break
        assert answer.status_code >= 500
        assert time.monotonic() < deadline
        time.sleep(1)
    assert answer.content == before.content


def test_replicas_come_with_the_requests(
    address: str, model: Path, slides: Path
) -> None:
    from ray import serve as ray_serve

    for name in ray_serve.status().applications:  # they hold the cores
        ray_serve.delete(name)
    url = f"{deploy(address, 'growing', str(model), replicas=2)}/segment"
    body = next((slides / "slides").iterdir()).read_bytes()
    enough = threading.Event()

    def client(_: int) -> list[Any]:
        answers = []
        while not enough.is_set():
            answers.append(post(url, body, "image/tiff"))
        return answers

    def running() -> int:
        app = ray_serve.status().applications[f"growing-{os.getpid()}"]
        return int(app.deployments["Endpoint"].replica_states.get("RUNNING", 0))

    assert running() == 1
    with ThreadPoolExecutor(12) as pool:
        clients = pool.map(client, range(12))
        deadline = time.monotonic() + 240
        while running() < 2 and time.monotonic() < deadline:
            time.sleep(0.5)
        assert running() == 2
        time.sleep(3)  # of both replicas' answers
        enough.set()
        answers = [answer for those in clients for answer in those]
    ray_serve.delete(f"growing-{os.getpid()}")
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.content for answer in answers}) == 1


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen]]:
    """Processes that a test puts here have ended after it, also where it fails."""
    processes: list[subprocess.Popen] = []
    yield processes
    for process in processes:
        process.terminate()
        process.communicate(timeout=120)


def test_the_command_serves_until_it_is_told_to_stop(
    model: Path, slides: Path, ended: list[subprocess.Popen], tmp_path: Path
) -> None:
    """By docs/serve.md, on another port."""
    port = free_port()
    lines = [
        [word.replace("8000", str(port)) for word in line]
        for line in lines_of("docs/serve.md", "medray serve")
    ]
    (tmp_path / "model").symlink_to(model)
    (command,) = (words for program, *words in lines if program == "medray")
    process = subprocess.Popen(
        [sys.executable, "-m", "medray.cli", *command],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    ended.append(process)
    assert process.stderr is not None
    said = ""
    while "metrics" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    assert f"http://127.0.0.1:{port}/segment" in said
    slide = next((slides / "slides").iterdir())
    (tmp_path / "field.tif").symlink_to(slide)
    Image.fromarray(tifffile.imread(slide)).save(tmp_path / "field.png")
    curls = [line for line in lines if line[0] == "curl" and "segment" in str(line)]
    told = [
        subprocess.run([*line, "-sSf"], cwd=tmp_path, check=True, capture_output=True)
        for line in curls
    ]
    with Image.open(tmp_path / "mask.png") as mask:
        assert mask.size == (640, 768)
    assert json.loads(told[1].stdout)["type"] == "FeatureCollection"
    found = re.search(r"metrics +(http://\S+)", said)
    assert found is not None, said
    # Ray tells counters from time to time: the first answer's may come before the second's.
    answered, deadline = 0.0, time.monotonic() + 60
    while answered < len(curls):
        assert time.monotonic() < deadline, answered
        time.sleep(1)
        answered = sum(
            float(line.split()[-1])
            for line in httpx2.get(found[1]).text.splitlines()
            if line.startswith("ray_medray_serve_requests_total{")
            and 'status="200"' in line
        )
    assert answered == len(curls) == 2
    with ThreadPoolExecutor(6) as pool:
        large = as_bytes(picture(1000, 1000), "PNG")
        url = f"http://127.0.0.1:{port}/segment"
        answers = [pool.submit(post, url, large) for _ in range(6)]
        time.sleep(0.5)  # then all are there and none is done
        assert not any(answer.done() for answer in answers)
        process.send_signal(signal.SIGTERM)
        assert [answer.result().status_code for answer in answers] == [200] * 6
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "stopped by SIGTERM: the requests under way were answered" in said
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/healthz")
