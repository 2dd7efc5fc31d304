"""`medray serve`: its answers are those of runs and reports, and bad requests get help."""

import asyncio
import io
import shutil
import socket
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
import tifffile
import yaml
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from manifests import ROOT
from PIL import Image
from schemathesis.openapi import media_type
from serving import (
    AUTH,
    PNG,
    SMALL,
    TOKEN,
    as_bytes,
    free_port,
    picture,
    save_classifier,
)

from medray.apps.serve import deployment as serve
from medray.apps.serve.api import build_api, token_digest
from medray.apps.serve.model import Answer, Served
from medray.cli import main
from medray.errors import CompileError, ConfigError
from medray.models import predict


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
    ("text", b"no image at all", "image/png", 422, "no PNG, JPEG, BMP, TIFF"),
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
    headers = {"Content-Type": stated}
    found = client.post("/segment?mpp=0.5", content=body, headers=headers)
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
    headers = {"Content-Type": "image/tiff"}
    found = client.post("/segment?mpp=0.5", content=cut, headers=headers)
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


def test_resolution_is_asked_for_and_the_mask_fits(client: TestClient) -> None:
    headers = {"Content-Type": "image/png"}
    silent = client.post("/segment", content=PNG, headers=headers)
    assert silent.status_code == 422
    assert "works at 0.5; give ?mpp=" in silent.json()["detail"]
    same = client.post("/segment?mpp=0.5", content=PNG, headers=headers)
    assert same.headers["medray-mpp"] == "0.5"
    asked = client.post("/segment?mpp=0.25", content=PNG, headers=headers)
    assert asked.headers["medray-mpp-from"] == "request"
    assert "averaged down" in asked.headers["medray-note"]
    for answer in (same, asked):
        mask = Image.open(io.BytesIO(answer.content))
        assert (mask.size, mask.mode) == ((200, 150), "L")
    data = tiff_of(picture(), resolution=(20_000, 20_000), resolutionunit="CENTIMETER")
    found = client.post(
        "/segment?mpp=0.9", content=data, headers={"Content-Type": "image/tiff"}
    )
    assert found.headers["medray-mpp"] == "0.9"
    assert found.headers["medray-mpp-from"] == "request"
    assert "--mpp" not in found.headers["medray-note"]
    assert "?mpp=0.9 overrules the file's 0.5" in found.headers["medray-note"]
    headers = {"Content-Type": "image/tiff"}
    found = client.post("/segment", content=data, headers=headers)
    assert found.headers["medray-mpp-from"] == "image"


def test_what_cannot_be_compiled_is_served_not_compiled_unless_asked_for(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDRAY_COMPILE_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-compiler")
    # As where there is a GPU: a choice that is left open is to compile.
    monkeypatch.setattr(predict, "chooses_to_compile", lambda how, *_: how != "off")
    assert Served(str(model), precision="float32").kind == "segment"
    with pytest.raises(CompileError, match="no-compiler"):
        Served(str(model), precision="float32", compile="on")


def test_a_classifier_of_windows_gives_mean_probabilities(tmp_path: Path) -> None:
    served = Served(save_classifier(tmp_path / "windows", 0.5), precision="float32")
    with TestClient(build_api(Direct(served), SMALL)) as client:
        headers = {"Content-Type": "image/png"}
        url = "/classify?mpp=0.5"
        found = client.post(url, content=PNG, headers=headers).json()
        assert found["mpp_from"] == "request"
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
            if kind == "segment":  # these images do not say it, the schema cannot know
                case.query = {"mpp": 0.5} | (case.query or {})
            case.call_and_validate(headers=AUTH)

        check()
    assert tried == {"/healthz", "/readyz", "/model", f"/{kind}"}


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


def test_kubernetes_builds_the_same_app(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.build_app import build_app as built
    from ray.serve.schema import ServeDeploySchema

    path = ROOT / "k8s" / "components" / "serve" / "rayservice.yaml"
    config = yaml.safe_load(yaml.safe_load(path.read_text())["spec"]["serveConfigV2"])
    (app,) = ServeDeploySchema.model_validate(config).applications
    assert app.import_path == "medray.apps.serve:build_app"
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
