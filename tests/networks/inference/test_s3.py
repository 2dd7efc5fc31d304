"""Object storage: a real S3 server process, with faults between it and medray."""

import json
import logging
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import s3
import serial

import medray
from medray.datasets.synthetic import write_slide, write_svg
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import ConfigError, StoreError
from medray.inference.leftovers import collect
from medray.inference.run import Options
from medray.inference.verify_run import verify
from medray.models.config import Prediction
from medray.models.predict import Predictor
from medray.slides.discovery import find_slides
from medray.slides.fingerprint import slide_digest, slide_fingerprint
from medray.slides.opening import open_slide
from medray.storage import files, lock, object_store


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[s3.Proxy, dict[str, str]]]:
    with s3.serving() as (proxy, environment):
        yield proxy, environment


@pytest.fixture
def bucket(
    served: tuple[s3.Proxy, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Iterator[tuple[str, s3.Proxy]]:
    proxy, environment = served
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(object_store._RETRY, "max_retries", 6)
    object_store._bucket.cache_clear()
    proxy.heal()
    yield f"s3://bucket/{request.node.name}", proxy
    proxy.heal()
    object_store._bucket.cache_clear()


def upload(folder: Path, address: str) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files.write_bytes(files.join(address, name), path.read_bytes())


def download(address: str) -> dict[str, bytes]:
    names = files.list_files(address)
    return {name: files.read_bytes(files.join(address, name)) for name in names}


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for seed in range(2):
        scene = draw_scene(seed, height=700, width=1100)
        write_slide(folder / "in", f"s{seed}", scene, layout="pyramid")
        write_svg(folder / "annotations", f"s{seed}", scene)
    return folder


def test_objects_are_files(bucket: tuple[str, s3.Proxy]) -> None:
    place, _ = bucket
    names = ["a.txt", "b c/ü <script>.txt", "b c/d/e#1?.txt"]
    for name in names:
        assert not files.exists(files.join(place, name))
        files.write_bytes(files.join(place, name), name.encode())
        assert files.exists(files.join(place, name))
    assert download(place) == {name: name.encode() for name in names}
    assert files.list_folder(place) == ["a.txt", "b c"]
    assert files.exists(files.join(place, "b c"))
    assert not files.exists(files.join(place, "b"))
    with pytest.raises(FileExistsError):
        files.write_bytes(files.join(place, "a.txt"), b"", new=True)
    assert files.read_ranges(files.join(place, "a.txt"), [0, 2], [1, 3]) == [
        b"a",
        b"txt",
    ]
    with pytest.raises(FileNotFoundError):
        files.read_bytes(files.join(place, "absent"))
    files.remove(files.join(place, "b c"))
    assert list(download(place)) == ["a.txt"]
    with pytest.raises(StoreError, match=r"no parts \. or \.\."):
        files.read_bytes(files.join(place, "../other"))
    with pytest.raises(StoreError, match="s3://"):
        files.exists("ftp://bucket/x")


def test_objects_that_stand_for_folders_are_no_files(
    bucket: tuple[str, s3.Proxy],
) -> None:
    place, proxy = bucket
    files.write_bytes(files.join(place, "a", "b", "c"), b"c")
    files.write_bytes(files.join(place, "empty"), b"")
    for folder in ("", "a/", "a/b/"):
        url = f"{proxy.endpoint}/{place.removeprefix('s3://')}/{folder}"
        request = urllib.request.Request(url, data=b"", method="PUT")
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
    assert files.list_files(place) == {"a/b/c": 1, "empty": 0}
    assert files.list_folder(place) == ["a", "empty"]


def test_slides_are_found_below_a_prefix(
    bucket: tuple[str, s3.Proxy], slides: Path
) -> None:
    place, _ = bucket
    upload(slides, place)
    for name in ("x.ome.zarr/zarr.json", "x.ome.zarr/0/c/0", "notes.txt"):
        files.write_bytes(files.join(place, "in", name), b"{}")
    found = find_slides([files.join(place, "in")])
    assert [slide.slide for slide in found] == ["s0", "s1", "x"]
    assert found[2].uri == files.join(place, "in", "x.ome.zarr")
    globbed = find_slides([files.join(place, "*", "s?.tif")])
    assert [slide.slide for slide in globbed] == ["in__s0", "in__s1"]
    assert [s.uri for s in globbed] == [s.uri for s in found[:2]]
    deep = find_slides([files.join(place, "**", "s1.tif")])
    assert [slide.uri for slide in deep] == [found[1].uri]
    with pytest.raises(ConfigError, match="no slides"):
        find_slides([files.join(place, "nothing")])


def test_a_slide_is_the_same_file_anywhere(
    bucket: tuple[str, s3.Proxy], slides: Path
) -> None:
    place, _ = bucket
    upload(slides, place)
    remote = files.join(place, "in", "s0.tif")
    assert slide_digest(remote) == slide_digest(str(slides / "in" / "s0.tif"))
    before = slide_fingerprint(remote)
    files.write_bytes(remote, b"another")
    assert slide_fingerprint(remote) != before


@pytest.mark.parametrize("real", ["CMU-1-Small-Region.svs", "generated"])
def test_only_the_bytes_of_a_region_are_fetched(
    bucket: tuple[str, s3.Proxy], slides: Path, real: str, shared_data: Path
) -> None:
    place, proxy = bucket
    local = slides / "in" / "s0.tif"
    if real != "generated":
        local = next(shared_data.rglob(real))
    remote = files.join(place, local.name)
    files.write_bytes(remote, local.read_bytes())
    rng = np.random.default_rng(0)
    with open_slide(remote) as ours, open_slide(local) as theirs:
        assert ours.levels == theirs.levels
        page = ours._pages[0][0]
        for _ in range(10):
            side = int(rng.integers(200, 600))
            level = ours.levels[0]
            y, x = rng.integers(0, (level.height - side, level.width - side))
            before = proxy.fetched
            pixels = ours.read(int(y), int(x), side, side)
            fetched = proxy.fetched - before
            np.testing.assert_array_equal(
                pixels, theirs.read(int(y), int(x), side, side)
            )
            touched = _touched(page, int(y), int(x), side)
            needed = sum(page.databytecounts[i] for i in touched)
            assert needed <= fetched <= 1.5 * needed


def _touched(page, y: int, x: int, side: int) -> list[int]:
    frame = page.keyframe
    across = -(-frame.imagewidth // frame.tilewidth)
    rows = range(y // frame.tilelength, (y + side - 1) // frame.tilelength + 1)
    columns = range(x // frame.tilewidth, (x + side - 1) // frame.tilewidth + 1)
    return [row * across + column for row in rows for column in columns]


def test_a_large_slide_is_opened_by_a_small_part_of_it(
    bucket: tuple[str, s3.Proxy], tmp_path: Path
) -> None:
    place, proxy = bucket
    scene = draw_scene(1, height=4096, width=4096)
    path = write_slide(tmp_path, "large", scene, layout="pyramid", compression="lzw")
    remote = files.join(place, "large.tif")
    files.write_bytes(remote, path.read_bytes())
    before = proxy.fetched
    with open_slide(remote):
        assert proxy.fetched - before < 500_000 < path.stat().st_size / 10


OPTIONS = Options(
    region=512, prediction=Prediction(precision="float32", quality=True), outlines=True
)


def test_slides_in_a_bucket_are_checked_as_on_a_disk(
    bucket: tuple[str, s3.Proxy], slides: Path
) -> None:
    place, _ = bucket
    upload(slides, place)
    files.write_bytes(files.join(place, "in", "text.svs"), b"no slide")
    out = files.join(place, "checked")
    found = medray.check(
        [files.join(place, "in")],
        annotations=files.join(place, "annotations"),
        out=out,
    )
    local = medray.check([f"{slides}/in"], annotations=f"{slides}/annotations").slides
    assert {*found.failed} == {"text"}
    addresses = dict.fromkeys(("uri", "annotation"))
    assert [row | addresses for row in found.slides if row["slide"] != "text"] == [
        row | addresses for row in local
    ]
    assert {*download(out)} == {"check.html", "slides.csv"}


@pytest.fixture(scope="module")
def local_run(slides: Path, model: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("local") / "run"
    predictor = Predictor.from_folders([str(model)], OPTIONS.prediction)
    commit = serial.infer(slides / "in", predictor, model, out, OPTIONS)
    assert (commit.done, commit.failed) == (2, {})
    return out, predictor


def outputs(files_: dict[str, bytes]) -> dict[str, bytes]:
    return {k: v for k, v in files_.items() if k.startswith(("masks/", "outlines/"))}


def test_a_run_in_a_bucket_is_the_run_on_a_disk(
    bucket: tuple[str, s3.Proxy], slides: Path, model: Path, local_run
) -> None:
    place, proxy = bucket
    out, predictor = local_run
    upload(slides, place)
    remote_model = files.join(place, model.name)
    upload(model, remote_model)
    proxy.busy = 0.1  # of the requests, which are then sent again
    run, source = files.join(place, "run"), files.join(place, "in")
    with pytest.raises(serial.CrashError):
        serial.infer(source, predictor, remote_model, run, OPTIONS, crash_after=3)
    commit = serial.infer(source, predictor, remote_model, run, OPTIONS)
    assert commit.failed == {}
    proxy.heal()
    theirs = {
        p.relative_to(out).as_posix(): p.read_bytes()
        for p in out.rglob("*")
        if p.is_file()
    }
    assert outputs(download(run)) == outputs(theirs)
    assert verify(run).failed == {}
    # Nothing that opens the bucket is written down anywhere.
    for data in download(run).values():
        assert s3.SECRET.encode() not in data
        assert s3.KEY.encode() not in data
    damaged = "masks/s0.ome.zarr/0/c/0/0"
    files.write_bytes(files.join(run, damaged), b"damage")
    assert damaged in verify(run).failed["s0"]
    again = serial.infer(source, predictor, remote_model, run, OPTIONS)
    assert (again.done, again.regions) == (1, 1)
    assert outputs(download(run)) == outputs(theirs)
    files.write_bytes(files.join(run, "masks/gone.ome.zarr/zarr.json"), b"{")
    assert collect(run).removed == ["masks/gone.ome.zarr"]


def test_a_store_that_does_not_answer_is_said(
    bucket: tuple[str, s3.Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, proxy = bucket
    files.write_bytes(files.join(place, "x"), b"x")
    proxy.busy = 1.0
    before = proxy.requests
    with pytest.raises(StoreError, match="run the same command again") as told:
        files.read_bytes(files.join(place, "x"))
    assert proxy.requests - before == 7  # once, and six times again
    assert "503" in f"{told.value}"
    with pytest.raises(StoreError, match="cannot be written"):
        files.write_bytes(files.join(place, "y"), b"x")
    proxy.heal()
    assert files.read_bytes(files.join(place, "x")) == b"x"
    # A store that is slow is waited for, but not for ever.
    proxy.delay = 0.5
    assert files.read_bytes(files.join(place, "x")) == b"x"
    proxy.delay = 5.0
    monkeypatch.setitem(object_store._CLIENT, "timeout", timedelta(seconds=1))
    monkeypatch.setitem(object_store._RETRY, "max_retries", 1)
    object_store._bucket.cache_clear()
    with pytest.raises(StoreError, match="reached"):
        files.read_bytes(files.join(place, "x"))


def test_expired_credentials_are_said_and_never_shown(
    bucket: tuple[str, s3.Proxy], caplog: pytest.LogCaptureFixture
) -> None:
    place, proxy = bucket
    caplog.set_level(logging.DEBUG)
    proxy.expired = True
    before = proxy.requests
    for attempt in (
        lambda: files.read_bytes(files.join(place, "x")),
        lambda: files.write_bytes(files.join(place, "x"), b"x"),
        lambda: files.list_files(place),
    ):
        with pytest.raises(StoreError, match="check the credentials") as told:
            attempt()
        assert s3.SECRET not in f"{told.value}"
    assert proxy.requests - before == 3  # trying again would not help
    assert s3.SECRET not in caplog.text


def test_one_writer_at_a_time_in_a_bucket(
    bucket: tuple[str, s3.Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _ = bucket
    monkeypatch.setattr(lock, "_BEAT_S", 0.2)  # the lease stays at half a minute
    with lock.locked(place, "infer") as check:
        with pytest.raises(ConfigError, match=r"in use by `medray infer`, process \d+"):
            with lock.locked(place, "verify"):
                pass
        check()
    assert download(place) == {}
    # The lock of a process that died: it is not renewed.
    monkeypatch.setattr(lock, "_LEASE_S", 1.5)
    dead = {"what": "infer", "host": "gone", "process": 1, "since": "yesterday"}
    files.write_json(files.join(place, "lock.json"), dead)
    with lock.locked(place, "infer") as check:
        check()
        assert json.loads(download(place)["lock.json"])["host"] != "gone"
        # One that was taken for dead finds out.
        files.write_json(files.join(place, "lock.json"), dead)
        with pytest.raises(lock.MedrayError, match="lock was lost"):
            check_for_a_minute(check)
    assert "gone" in download(place)["lock.json"].decode()


def check_for_a_minute(check: Callable[[], None]) -> None:
    """The thread that renews the lock comes late on a busy machine."""
    for _ in range(600):
        check()
        time.sleep(0.1)


@pytest.mark.timeout(1200)
def test_every_stage_works_in_a_bucket_that_is_often_busy(
    served: tuple[s3.Proxy, dict[str, str]],
    bucket: tuple[str, s3.Proxy],
    slides: Path,
) -> None:
    place, proxy = bucket
    upload(slides, place)
    recipe = slides / "recipe.yaml"
    recipe.write_text(
        "model: {encoder: tu-mobilenetv3_small_050}\nwindow: {size: 128, stride: 96}\n"
        "data: {crop: 64, samples: 16}\nbatch: 4\nschedule: {epochs: 1}\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}

    proxy.busy = 0.03
    data, model, run = (files.join(place, name) for name in ("data", "model", "run"))
    report = files.join(place, "report")
    source, truth = files.join(place, "in"), files.join(place, "annotations")
    fractions = ("--fractions", "0.5,0.5,0")
    commands = [
        ["ingest", source, "--annotations", truth, "--out", data, *fractions],
        ["train", str(recipe), "--data", data, "--out", model],
        ["infer", source, "--model", model, "--out", run],
        ["evaluate", run, "--truth", data, "--out", report],
        ["verify", run],
    ]
    # One process, so that Ray starts once.
    each = "import sys, json; from medray.cli import main\n"
    each += "for c in json.loads(sys.argv[1]): assert main([*c, '--json']) == 0, c"
    done = subprocess.run(
        [sys.executable, "-c", each, json.dumps(commands)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert s3.SECRET not in done.stdout + done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
    assert [result["exit_code"] for result in results] == [0] * 5
    assert (results[2]["done"], results[2]["failed"]) == (2, {})
    assert results[4]["verified"] == 2
    assert "report.html" in files.list_folder(report)
    proxy.heal()
    for stored in (data, model, run, report):
        for name, content in download(stored).items():
            assert s3.SECRET.encode() not in content, name
            assert s3.KEY.encode() not in content, name
