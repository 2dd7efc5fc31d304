"""A GPU worker that dies while it compiles: another one does, and the run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene

pytestmark = pytest.mark.timeout(600)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes of GPU workers below a command."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [one for one in below if "GpuWorker" in " ".join(one.cmdline())]


def test_a_gpu_worker_that_is_killed_while_it_compiles(
    model: Path, tmp_path: Path
) -> None:
    scene = draw_scene(0, height=600, width=600)
    write_slide(tmp_path / "slides", "s0", scene, layout="pyramid")
    cache, out = tmp_path / "packages", tmp_path / "run"
    command = [sys.executable, "-m", "medray.cli", "infer", str(tmp_path / "slides")]
    command += ["--model", str(model), "--out", str(out), "--json"]
    command += ["--precision", "float32", "--compile", "on", "--executor", "ray"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["MEDRAY_COMPILE_CACHE"] = str(cache)
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while not list(cache.glob("*.new-*/*/**/*.cpp")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed = workers_of(process)
    assert killed
    for worker in killed:
        worker.send_signal(signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr[-3000:]
    summary = json.loads(stdout.splitlines()[-1])
    assert (summary["done"], summary["failed"]) == (1, {})
    assert {path.suffix for path in cache.iterdir()} == {"", ".lock"}
