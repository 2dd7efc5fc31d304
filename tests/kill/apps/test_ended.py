"""A command on Ray that a signal ends in the middle: its code, its words, what is left."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.scaling.autoscale import processes

pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_ends_a_command_and_its_ray(
    number: signal.Signals, code: int, layered: Path, tmp_path: Path
) -> None:
    """To all of its processes, as a terminal sends Ctrl-C, or to the driver alone."""
    words = [sys.executable, "-m", "medray.cli", "evaluate", str(layered / "run")]
    words += ["--truth", str(layered / "truth"), "--out", str(tmp_path / "report")]
    mark = secrets.token_hex(8)
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [*words, "--executor", "ray"],
        env=environment | {"ENDED_MARK": mark},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell has its background jobs ignore SIGINT, and they their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

    def its() -> list[int]:
        return processes(f"ENDED_MARK={mark}\0".encode(), "environ")

    deadline = time.monotonic() + 120
    while not any(_is_worker(pid) for pid in its()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    started = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode == code, said
    *_, last = said.splitlines()
    assert last == (
        f"medray evaluate: stopped by {number.name}: what was finished is kept; run "
        f"the same command again to go on"
    )
    for noise in ("Traceback", "received at", "Stack", "Fatal"):
        assert noise not in said
    deadline = time.monotonic() + 20
    while its() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert its() == []
    again = subprocess.run([*words, "--executor", "local"], timeout=120)
    assert again.returncode == 0


def _is_worker(pid: int) -> bool:
    """Return whether a process does what Ray Data gives it."""
    try:
        return psutil.Process(pid).cmdline()[0].startswith("ray::MapWorker")
    except (psutil.Error, IndexError):
        return False
