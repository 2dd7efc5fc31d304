"""Faults of files, disks and people, in runs of their own processes.

Everything is real but the bugs of the decoder, which come from tests/faulty.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import serial
import tifffile

from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import StoreError
from medray.execution.commit import Summary
from medray.inference.infer_run import infer
from medray.inference.run import Options
from medray.models.config import Prediction
from medray.models.predict import Predictor

pytestmark = pytest.mark.timeout(900)
FAULTY = Path(__file__).parents[2] / "faulty"


@pytest.fixture(scope="session")
def model(slow_model: Path) -> Path:
    return slow_model


def start(
    slides: Path,
    model: Path,
    out: Path,
    *more: str,
    faulty: bool = False,
    executor: str = "ray",
) -> subprocess.Popen[str]:
    """Run `medray infer` with a Ray of its own, in a process group of its own."""
    command = [sys.executable, "-m", "medray.cli", "infer", str(slides), "--json"]
    command += ["--model", str(model), "--out", str(out), "--region", "512"]
    command += ["--precision", "float32", "--executor", executor, *more]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    if faulty:
        path = [os.environ.get("PYTHONPATH", ""), str(FAULTY)]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def answer(process: subprocess.Popen[str], timeout: float = 400) -> dict:
    stdout, stderr = process.communicate(timeout=timeout)
    assert stdout, stderr[-3000:]
    return json.loads(stdout.splitlines()[-1])


def finish(slides: Path, model: Path, out: Path) -> Summary:
    """Do what is missing by a plain loop in this process.

    That `medray infer` goes on by itself is shown for a run that was killed here, and
    for anything that dies in test_chaos.py; each time it costs half a minute.
    """
    options = Options(region=512, prediction=Prediction(precision="float32"))
    predictor = Predictor.from_folders([str(model)], options.prediction)
    commit = serial.infer(slides, predictor, model, out, options)
    assert commit.failed == {}
    return commit


def masks(out: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(out.glob("masks/**/*")) if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


def committed(out: Path) -> int:
    return sum(p.read_text().count("\n") for p in out.glob("journal/*.jsonl"))


def wait_for_commits(process: subprocess.Popen[str], out: Path, regions: int) -> None:
    for _ in range(1200):
        if committed(out) >= regions:
            return
        assert process.poll() is None, "it ended before anything was committed"
        time.sleep(0.1)
    raise AssertionError("nothing is committed")


def write_marked(folder: Path, name: str, mark: bytes, level: int) -> None:
    """Write a pyramid of raw tiles, one of which holds a mark."""
    pixels = draw_scene(3, height=2048, width=2048).pixels.copy()
    coarse = pixels[::2, ::2].copy()
    row = np.frombuffer(mark.ljust(9, b"."), np.uint8).reshape(3, 3)
    (coarse if level else pixels)[200, 200:203] = row
    options = {
        "photometric": "rgb",
        "tile": (256, 256),
        "resolution": (2e4, 2e4),
        "resolutionunit": "CENTIMETER",
        "metadata": None,
    }
    with tifffile.TiffWriter(folder / f"{name}.tif") as tiff:
        tiff.write(pixels, subifds=1, **options)
        tiff.write(coarse, subfiletype=1, **options)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for seed in range(3):
        scene = draw_scene(seed, height=1100, width=1400)
        write_slide(folder, f"s{seed}", scene, layout="pyramid")
    return folder


@pytest.fixture(scope="module")
def whole(slides: Path, model: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("whole") / "run"
    commit = finish(slides, model, out)
    assert commit.done == 3
    return masks(out), commit.regions


@pytest.mark.parametrize("executor", ["ray", "processes"])
def test_slides_that_end_hang_or_bloat_their_reader_are_quarantined(
    executor: str, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    for seed in range(2):
        scene = draw_scene(seed, height=700, width=900)
        write_slide(folder, f"good{seed}", scene, layout="pyramid")
    write_marked(folder, "crashes", b"<CRASH>", 0)
    write_marked(folder, "crashes_opened", b"<CRASH>", 1)
    write_marked(folder, "hangs", b"<HANG>", 0)
    write_marked(folder, "hangs_opened", b"<HANG>", 1)
    write_marked(folder, "eats", b"<EAT>", 0)
    out = tmp_path / "run"
    limit = ("--timeout", "20")
    process = start(folder, model, out, *limit, faulty=True, executor=executor)
    summary = answer(process, 600)
    assert process.returncode == 3
    assert summary["done"] == 2
    failed = summary["failed"]
    assert set(failed) == {"crashes", "crashes_opened", "hangs", "hangs_opened", "eats"}
    rows = {r["slide"]: r for r in pq.read_table(out / "slides.parquet").to_pylist()}
    for name, why in failed.items():
        assert f"{name}.tif" in why
        assert rows[name]["message"] == why
        if name != "eats":
            assert "quarantined" in why
    assert "no answer" in failed["hangs"]
    assert "no answer" in failed["hangs_opened"]
    assert "died" in failed["crashes"]
    # What is good is what it is without the others.
    for name in failed:
        (folder / f"{name}.tif").unlink()
    assert finish(folder, model, tmp_path / "alone").done == 2
    good = {k: v for k, v in masks(out).items() if "good" in k}
    assert good == masks(tmp_path / "alone")


def test_a_model_that_gives_no_numbers_is_said(
    cluster: None, slides: Path, tmp_path: Path, model: Path
) -> None:
    import safetensors.torch

    broken = tmp_path / "model"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    state = safetensors.torch.load_file(broken / "weights.safetensors")
    first = next(name for name, weights in state.items() if weights.ndim == 4)
    state[first] *= 1e38
    safetensors.torch.save_file(state, broken / "weights.safetensors")
    how = Options(region=512, prediction=Prediction(precision="float32"))
    out = str(tmp_path / "run")
    summary = infer([str(slides)], model=str(broken), out=out, options=how)
    assert set(summary.failed) == {"s0", "s1", "s2"}
    assert all("NaN or infinity" in why for why in summary.failed.values())


def test_a_ray_that_is_slow_to_start_is_started_again(
    slides: Path, model: Path, tmp_path: Path
) -> None:
    """On a machine that is overloaded; here its raylet stands still."""
    process = start(slides / "s0.tif", model, tmp_path / "run")
    stopped = None
    while stopped is None:
        assert process.poll() is None
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.name() == "raylet":
                    child.suspend()
                    stopped = child
        time.sleep(0.05)
    assert answer(process)["done"] == 1


@pytest.mark.parametrize(
    ("number", "group", "executor"),
    [
        (signal.SIGTERM, False, "ray"),
        (signal.SIGINT, True, "ray"),
        (signal.SIGTERM, False, "processes"),
        (signal.SIGINT, True, "processes"),
    ],
)
def test_a_signal_stops_it_soon_and_nothing_is_lost(
    slides: Path,
    model: Path,
    tmp_path: Path,
    whole,
    number: int,
    group: bool,
    executor: str,
) -> None:
    out = tmp_path / "run"
    process = start(slides, model, out, executor=executor)
    wait_for_commits(process, out, 1)
    sent = time.monotonic()
    if group:  # Ctrl-C reaches every process of the terminal
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    stopped = answer(process)
    assert time.monotonic() - sent < 30
    assert process.returncode == 128 + number
    assert "run the same command again" in stopped["error"]
    assert not (out / "lock.json").exists()
    kept = committed(out)
    assert kept >= 1
    assert finish(slides, model, out).regions == whole[1] - kept
    assert masks(out) == whole[0]


def test_the_second_run_is_refused_and_a_dead_one_does_not_block(
    slides: Path, model: Path, tmp_path: Path, whole
) -> None:
    out = tmp_path / "run"
    first = start(slides, model, out)
    while not (out / "lock.json").exists():
        time.sleep(0.05)
    second = start(slides, model, out)
    refused = answer(second)
    assert second.returncode == 2
    assert f"process {first.pid} on" in refused["error"]
    wait_for_commits(first, out, 1)
    assert first.poll() is None
    first.kill()
    first.communicate()
    assert (out / "lock.json").exists()
    kept = committed(out)
    summary = answer(start(slides, model, out))
    assert (summary["done"] + summary["skipped"], summary["failed"]) == (3, {})
    assert summary["regions"] == whole[1] - kept
    assert masks(out) == whole[0]
    assert not (out / "lock.json").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of little room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount file systems")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_said_and_gone_on_from(
    slides: Path, model: Path, whole, small_disk: Path
) -> None:
    out = small_disk / "run"
    process = start(slides, model, out)
    stopped = answer(process)
    assert process.returncode == 1
    assert "No space left" in stopped["error"]
    assert "free space" in stopped["error"]
    assert not list(out.rglob(".partial-*"))
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    finish(slides, model, out)
    assert masks(out) == whole[0]


def test_a_disk_that_becomes_read_only_is_said_and_gone_on_from(
    slides: Path, model: Path, tmp_path: Path, whole
) -> None:
    out = tmp_path / "run"
    process = start(slides, model, out)
    wait_for_commits(process, out, 1)
    folder = str(out / "journal")
    if subprocess.run(["mount", "--bind", folder, folder]).returncode:
        process.kill()
        process.communicate()
        pytest.skip("this user may not mount file systems")
    try:
        remount = ["mount", "-o", "remount,bind,ro", folder]
        subprocess.run(remount, check=True)
        stopped = answer(process)
        assert process.returncode == 1
        assert "Read-only file system" in stopped["error"]
        with pytest.raises(StoreError, match="Read-only"):
            finish(slides, model, out)
    finally:
        subprocess.run(["umount", folder], check=True)
    finish(slides, model, out)
    assert masks(out) == whole[0]


def test_a_permission_that_is_lost_is_said_and_gone_on_from(
    slides: Path, model: Path, tmp_path: Path, whole
) -> None:
    """By the plain loop; that a run on Ray then ends is shown by the disk above."""
    out = tmp_path / "run"
    options = Options(region=512, prediction=Prediction(precision="float32"))
    predictor = Predictor.from_folders([str(model)], options.prediction)
    with pytest.raises(serial.CrashError):
        serial.infer(slides, predictor, model, out, options, crash_after=2)
    folder = str(out / "journal")
    if subprocess.run(["chattr", "+i", folder], capture_output=True).returncode:
        pytest.skip("this user or disk cannot forbid writing to root")
    try:
        with pytest.raises(StoreError, match=r"not permitted.*permission"):
            finish(slides, model, out)
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)
    finish(slides, model, out)
    assert masks(out) == whole[0]
