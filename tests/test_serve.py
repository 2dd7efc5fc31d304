"""`medray serve`: its answers are those of runs and reports, and bad requests get help."""

import asyncio
import csv
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import schemathesis
import tifffile
import torch
import yaml
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import ROOT
from PIL import Image
from schemathesis.openapi import media_type

from medray import serve
from medray.classes import Classes
from medray.cli import main
from medray.dataset import read_patches
from medray.errors import ConfigError
from medray.evaluate_images import evaluate_images
from medray.grid import Windows
from medray.infer import infer
from medray.models.classifiers import build_classifier
from medray.models.config import Architecture, ModelConfig, Prediction
from medray.models.folder import save_model
from medray.run import Options
from medray.serve import ServeSettings
from medray.serve_app import Bounds, build_api, token_digest
from medray.served import Answer, Served
from medray.sheets import ingest_images
from medray.store import omezarr
from medray.store.files import read_json

SIDE = 64
TOKEN = "a token that is long enough"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
SMALL = Bounds(max_mpixel=1.0, max_mbyte=1.0, timeout_s=20.0)


class Direct:
    """A model in this process: what a replica is without Ray."""

    def __init__(self, served: Served) -> None:
        self._served = served

    @property
    def kind(self) -> str:
        return self._served.kind

    def describe(self) -> dict[str, Any]:
        return self._served.describe()

    async def ask(self, path: str, mpp: float | None, form: str) -> Answer:
        def work() -> Answer:
            image = self._served.read(path, mpp)
            return self._served.finish(image, *self._served.predict([image]), form)

        return await asyncio.to_thread(work)


def save_classifier(folder: Path, mpp: float | None) -> str:
    torch.manual_seed(3)
    architecture = Architecture("classifier", "test_resnet")
    config = ModelConfig(
        architecture=architecture,
        classes=Classes(("sane", "sick")),
        window=Windows(SIDE, SIDE),
        mpp=mpp,
    )
    save_model(str(folder), config, build_classifier(architecture, 2), {"f1": None})
    return str(folder)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_classifier(tmp_path_factory.mktemp("classifier") / "cells", None)


@pytest.fixture(scope="module")
def segmenter(model: Path) -> Served:
    return Served(str(model), precision="float32", max_pixels=1_000_000, threads=1)


@pytest.fixture(scope="module")
def client(segmenter: Served) -> Iterator[TestClient]:
    with TestClient(build_api(Direct(segmenter), SMALL, token_digest(TOKEN))) as found:
        found.headers.update(AUTH)
        yield found


def as_bytes(pixels: np.ndarray, form: str) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, form)
    return target.getvalue()


def picture(height: int = 150, width: int = 200, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(90, 220, (height // 10 + 1, width // 10 + 1, 3), np.uint8)
    coarse[..., 1] //= 2
    return np.kron(coarse, np.ones((10, 10, 1), np.uint8))[:height, :width]


PNG = as_bytes(picture(), "PNG")


# --- without Ray ----------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of a few hundred bytes whose header says 100 000 x 100 000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        whole = kind + data
        return len(data).to_bytes(4) + whole + zlib.crc32(whole).to_bytes(4)

    size = (100_000).to_bytes(4)
    header = size + size + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(kind, data)
        for kind, data in (
            (b"IHDR", header),
            (b"IDAT", zlib.compress(bytes(100_000))),
            (b"IEND", b""),
        )
    )


def tiff_of(pixels: np.ndarray, **options: Any) -> bytes:
    target = io.BytesIO()
    tifffile.imwrite(target, pixels, photometric="rgb", **options)
    return target.getvalue()


def tiff_bomb() -> bytes:
    """A TIFF of one tile that says it has 80 000 x 80 000 pixels."""
    data = tiff_of(picture(64, 64), tile=(64, 64))
    for tag in (256, 257):  # width and height, one long each
        place = data.index(tag.to_bytes(2, "little") + b"\x04\0\x01\0\0\0")
        data = data[: place + 8] + (80_000).to_bytes(4, "little") + data[place + 12 :]
    return data


TIFF = tiff_of(picture(300, 300), tile=(64, 64), compression="zlib")
BAD = [
    ("text", b"no image at all", "image/png", 422, "no PNG, JPEG, BMP or TIFF"),
    ("nothing", b"", "image/png", 422, "(0 bytes)"),
    ("cut off", PNG[: len(PNG) // 2], "image/png", 422, "expected a PNG"),
    ("cut off TIFF", TIFF[:4000], "image/tiff", 422, "is cut off, copy it again"),
    ("bomb", bomb(), "image/png", 413, "10000.0 megapixels, at most 1 are taken"),
    ("TIFF bomb", tiff_bomb(), "image/tiff", 422, "need 1562500 tiles"),
    (
        "too many pixels",
        as_bytes(np.full((1001, 1000, 3), 255, np.uint8), "PNG"),
        "image/png",
        413,
        "1001 x 1000 are 1.0 megapixels",
    ),
    ("too many bytes", bytes(1_000_001), "image/png", 413, "has 1000001 bytes"),
    ("form", b"a=b", "application/x-www-form-urlencoded", 415, "expected one of"),
    ("wrong type", PNG, "image/jpeg", 415, "says image/jpeg, the body is PNG"),
]


@pytest.mark.parametrize(
    ("body", "stated", "status", "words"),
    [case[1:] for case in BAD],
    ids=[case[0] for case in BAD],
)
def test_a_bad_body_gets_an_answer_that_helps(
    client: TestClient, body: bytes, stated: str, status: int, words: str
) -> None:
    start = time.monotonic()
    tracemalloc.start()
    found = client.post("/segment", content=body, headers={"Content-Type": stated})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.status_code == status, found.text
    assert words in found.json()["detail"]
    assert "/tmp" not in found.text
    assert time.monotonic() - start < 10
    assert peak < 50e6


def test_a_tiff_that_is_damaged_in_one_place_is_refused(client: TestClient) -> None:
    """A run would go on and mark it; whoever asks for one image wants to know."""
    cut = TIFF[:2500] + bytes(200) + TIFF[2700:]
    found = client.post("/segment", content=cut, headers={"Content-Type": "image/tiff"})
    assert found.status_code == 422
    assert "damaged there" in found.json()["detail"]


def test_a_body_without_an_end_is_cut_off_at_the_bound(client: TestClient) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 100_000
            yield bytes(100_000)

    headers = {"Content-Type": "image/png"}
    found = client.post("/segment", content=chunks(), headers=headers)
    assert found.status_code == 413
    assert "more than 1000000 bytes" in found.json()["detail"]


@pytest.mark.parametrize(
    "given",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}],
)
def test_without_the_token_nothing_is_answered(
    client: TestClient, given: dict[str, str]
) -> None:
    with TestClient(client.app) as other:
        found = other.post("/segment", content=PNG, headers=given)
        assert found.status_code == 401
        assert found.headers["www-authenticate"] == "Bearer"
        assert "Authorization: Bearer TOKEN" in found.json()["detail"]
        assert other.get("/model", headers=given).status_code == 401
        for path in ("/healthz", "/readyz"):
            assert other.get(path).json() == {"status": "ok"}


def test_other_requests_are_told_what_is_there(client: TestClient) -> None:
    headers = {"Content-Type": "image/png"}
    found = client.post("/classify", content=PNG, headers=headers)
    assert found.status_code == 409
    assert "POST the image to /segment" in found.json()["detail"]
    for query in ("mpp=nan", "mpp=0", "mpp=x", "format=gif"):
        found = client.post(f"/segment?{query}", content=PNG, headers=headers)
        assert found.status_code == 422, query
        assert query.split("=")[0] in found.json()["detail"]
    found = client.post("/segment?mpp=20", content=PNG, headers=headers)
    assert found.status_code == 422
    assert "less than or equal to 1, found '20'" in found.json()["detail"]
    coarse = tiff_of(picture(), resolution=(500, 500), resolutionunit="CENTIMETER")
    headers = {"Content-Type": "image/tiff"}
    found = client.post("/segment", content=coarse, headers=headers)
    assert found.status_code == 422
    assert "too coarse to enlarge; give ?mpp=" in found.json()["detail"]
    assert "no /nothing" in client.get("/nothing").json()["detail"]
    found = client.get("/segment")
    assert (found.status_code, found.headers["allow"]) == (405, "POST")
    about = client.get("/model").json()
    assert about["endpoint"] == "/segment"
    assert about["classes"] == ["background", "tumour"]
    assert (about["mpp"], about["max_mpixel"]) == (0.5, 1.0)


def test_what_takes_too_long_ends(segmenter: Served) -> None:
    class Slow(Direct):
        async def ask(self, *_: Any) -> Answer:
            await asyncio.sleep(60)
            raise AssertionError

    bounds = replace(SMALL, timeout_s=0.2)
    with TestClient(build_api(Slow(segmenter), bounds)) as client:
        headers = {"Content-Type": "image/png"}
        found = client.post("/segment", content=PNG, headers=headers)
        assert found.status_code == 504
        assert "within 0.2 s" in found.json()["detail"]


def test_what_nobody_foresaw_is_said_without_details(segmenter: Served) -> None:
    class Broken(Direct):
        async def ask(self, *_: Any) -> Answer:
            raise RuntimeError("secret")

    api = build_api(Broken(segmenter), SMALL)
    with TestClient(api, raise_server_exceptions=False) as client:
        headers = {"Content-Type": "image/png"}
        found = client.post("/segment", content=PNG, headers=headers)
        assert found.status_code == 500
        assert "RuntimeError" in found.json()["detail"]
        assert "secret" not in found.text


def test_resolution_is_asked_for_or_assumed_and_the_mask_fits(
    client: TestClient,
) -> None:
    headers = {"Content-Type": "image/png"}
    assumed = client.post("/segment", content=PNG, headers=headers)
    assert assumed.headers["medray-mpp"] == "0.5"
    assert assumed.headers["medray-mpp-from"] == "assumed"
    asked = client.post("/segment?mpp=0.25", content=PNG, headers=headers)
    assert asked.headers["medray-mpp-from"] == "request"
    assert "averaged down" in asked.headers["medray-note"]
    for answer in (assumed, asked):
        mask = Image.open(io.BytesIO(answer.content))
        assert (mask.size, mask.mode) == ((200, 150), "L")
    data = tiff_of(picture(), resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    found = client.post(
        "/segment?mpp=0.9", content=data, headers={"Content-Type": "image/tiff"}
    )
    assert (found.headers["medray-mpp"], found.headers["medray-mpp-from"]) == (
        "0.5",
        "image",
    )


def test_a_classifier_of_windows_gives_mean_probabilities(tmp_path: Path) -> None:
    served = Served(save_classifier(tmp_path / "windows", 0.5), precision="float32")
    with TestClient(build_api(Direct(served), SMALL)) as client:
        headers = {"Content-Type": "image/png"}
        found = client.post("/classify", content=PNG, headers=headers).json()
        assert found["mpp_from"] == "assumed"
        assert sum(found["probabilities"].values()) == pytest.approx(1)
        said = client.post("/segment", content=PNG, headers=headers)
        assert said.status_code == 409


@pytest.mark.parametrize("kind", ["segment", "classify"])
def test_schemathesis_finds_no_fault(
    kind: str, segmenter: Served, classifier: str
) -> None:
    forms = {"png": "PNG", "jpeg": "JPEG", "bmp": "BMP", "tiff": "TIFF"}
    for name, form in (forms | {"octet-stream": "PNG"}).items():
        images = st.integers(0, 5).map(
            lambda seed, form=form: as_bytes(picture(80, 90, seed), form)
        )
        media_type(f"{'image' if name in forms else 'application'}/{name}", images)
    served = segmenter if kind == "segment" else Served(classifier)
    # The other endpoint is there to say which one it is.
    other = "/classify" if kind == "segment" else "/segment"
    api = build_api(Direct(served), SMALL, token_digest(TOKEN))
    schema = schemathesis.openapi.from_asgi("/openapi.json", api)
    tried = set()
    for result in schema.exclude(path=other).get_all_operations():
        operation = result.ok()
        tried.add(operation.path)

        @settings(
            max_examples=10, suppress_health_check=list(HealthCheck), database=None
        )
        @given(case=operation.as_strategy())
        def check(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=AUTH)

        check()
    assert tried == {"/healthz", "/readyz", "/model", f"/{kind}"}


# --- on Ray Serve ---------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    ingest_images(str(write_cells(cells)), out=str(data), side=SIDE)
    evaluate_images(classifier, data=str(data), out=str(report))
    with (report / "images.csv").open() as file:
        said = list(csv.DictReader(file))
    options = Options(prediction=Prediction(precision="float32"), outlines=True)
    infer(
        [str(slides / "slides")],
        model=str(model),
        out=str(folder / "run"),
        options=options,
    )
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


def deploy(address: str, name: str, model: str, report: str = "") -> str:
    """Serve a model under a prefix of its own; the application's name is unique here."""
    from ray import serve as ray_serve

    bounds = Bounds(timeout_s=120.0, max_mbyte=5.0)
    how = ServeSettings(
        model=model, report=report, precision="float32", cpus=1, bounds=bounds
    )
    app = serve._deploy(how, token_digest(TOKEN))
    ray_serve.run(app, name=f"{name}-{os.getpid()}", route_prefix=f"/{name}")
    return f"{address}/{name}"


@pytest.fixture(scope="module")
def segmenter_url(address: str, model: Path) -> str:
    return deploy(address, "segmenter", str(model))


@pytest.fixture(scope="module")
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
        mask = omezarr.open_level(str(truth.run / "masks" / f"{path.stem}.ome.zarr"))
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


def test_a_served_class_is_the_reports(classifier_url: str, truth: Truth) -> None:
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


@pytest.mark.slow
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
    while True:  # while it starts anew requests wait or get 5xx, and none hangs
        answer = post(f"{segmenter_url}/segment", body, "image/tiff")
        if answer.status_code == 200:
            break
        assert answer.status_code >= 500
        assert time.monotonic() < deadline
        time.sleep(1)
    assert answer.content == before.content


# --- the command ----------------------------------------------------------------------


def test_what_cannot_be_served_is_said_before_anything_starts(
    model: Path,
    classifier: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    monkeypatch.delenv(serve.TOKEN, raising=False)

    def refused(*words: str, code: int = 2) -> str:
        assert main(["serve", *words]) == code
        return str(capsys.readouterr().err)

    assert "expected a model folder" in refused(str(tmp_path))
    assert "requests need a token" in refused(str(model), "--host", "0.0.0.0")
    short = tmp_path / "token"
    short.write_text("short\n")
    assert "has 5 characters" in refused(str(model), "--token-file", str(short))
    assert "--token-file" in refused(str(model), "--token-file", str(tmp_path / "none"))
    assert "expected 1 or more" in refused(str(model), "--replicas", "3:2")
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    weights = (damaged / "weights.safetensors").read_bytes()
    (damaged / "weights.safetensors").write_bytes(weights[:100])
    port = str(free_port())
    assert "expected the weights" in refused(str(damaged), "--port", port, code=1)
    report = tmp_path / "report"
    assert "metrics.json" in refused(
        classifier, "--port", port, "--report", str(report)
    )
    report.mkdir()
    (report / "metrics.json").write_text('{"model_digest": "another"}')
    said = refused(classifier, "--port", port, "--report", str(report))
    assert "is of the model another" in said
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert "give another --port" in refused(str(model), "--port", port)


@pytest.mark.slow
def test_the_command_serves_until_it_is_told_to_stop(model: Path, slides: Path) -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "medray.cli", "serve", str(model), "--port", str(port)],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    said = ""
    while "curl" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    assert f"http://127.0.0.1:{port}/segment" in said
    body = next((slides / "slides").iterdir()).read_bytes()
    answer = post(f"http://127.0.0.1:{port}/segment", body, "image/tiff")
    assert answer.status_code == 200
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "stopped by SIGTERM: the requests under way were answered" in said
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"http://127.0.0.1:{port}/healthz")


def test_kubernetes_builds_the_same_app(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.build_app import build_app as built
    from ray.serve.schema import ServeDeploySchema

    path = ROOT / "k8s" / "components" / "serve" / "rayservice.yaml"
    config = yaml.safe_load(yaml.safe_load(path.read_text())["spec"]["serveConfigV2"])
    (app,) = ServeDeploySchema.model_validate(config).applications
    assert app.import_path == "medray.serve:build_app"
    monkeypatch.delenv(serve.TOKEN, raising=False)
    with pytest.raises(ConfigError, match="the environment has no MEDRAY_SERVE_TOKEN"):
        serve.build_app(app.args)
    monkeypatch.setenv(serve.TOKEN, TOKEN)
    monkeypatch.setenv("STORAGE", "s3://bucket/ab")
    (deployment,) = built(serve.build_app(app.args), name=app.name).deployments
    options = deployment._deployment_config.autoscaling_config
    assert (options.min_replicas, options.max_replicas) == (1, 4)
    chosen, digest, cpus = deployment.init_args
    assert chosen.model == "s3://bucket/ab/model"
    assert (chosen.bounds.max_mpixel, cpus) == (64, 3)
    assert (digest, TOKEN in repr(deployment.init_args)) == (token_digest(TOKEN), False)
    with pytest.raises(ConfigError, match="max_pixel"):
        serve.build_app(app.args | {"max_pixel": 3})
