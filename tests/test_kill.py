"""Promise 2: after a kill, the same command finishes what is missing, byte for byte."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from medray.store.ledger import Ledger
from medray.synth import draw_scene, write_slide

pytestmark = pytest.mark.slow


def start(slides: Path, model: Path, out: Path) -> subprocess.Popen[str]:
    """Run `medray infer` in a process group of its own, with a Ray of its own."""
    command = [sys.executable, "-m", "medray.cli", "infer", str(slides)]
    command += ["--model", str(model), "--out", str(out), "--region", "512", "--json"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def ray_processes_of(parent: int) -> list[int]:
    """The process and everything that was started below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [parent]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return found


def contents(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.timeout(900)
def test_a_killed_run_is_completed_to_the_same_bytes(
    model: Path, tmp_path: Path
) -> None:
    slides = tmp_path / "slides"
    for seed in range(3):
        scene = draw_scene(seed, height=1100, width=1400)
        write_slide(slides, f"s{seed}", scene, layout="pyramid")
    undisturbed = start(slides, model, tmp_path / "undisturbed")
    whole = json.loads(undisturbed.communicate(timeout=300)[0])
    assert (whole["done"], whole["failed"]) == (3, {})

    seed = int(time.time())
    print(f"seed of the moment of the kill: {seed}")
    run = tmp_path / "killed"
    process = start(slides, model, run)
    journal = run / "journal"
    for _ in range(1200):  # until the first regions are committed
        if journal.is_dir() and any(journal.glob("*.jsonl")):
            break
        time.sleep(0.1)
        assert process.poll() is None, "it ended before it could be killed"
    time.sleep(random.Random(seed).uniform(0, 1.0))
    for pid in ray_processes_of(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()

    ledger = Ledger(str(run))
    done = {row["slide"] for row in ledger.slides.values()}
    committed = sum(
        len(regions)
        for key, regions in ledger.regions.items()
        if key.split("@")[0] not in done
    )
    skipped = sum(row["regions"] for row in ledger.slides.values())
    assert committed + skipped > 0
    result = json.loads(start(slides, model, run).communicate(timeout=300)[0])
    assert result["failed"] == {}
    assert result["done"] + result["skipped"] == 3
    # No committed region is computed again.
    assert result["regions"] == whole["regions"] - committed - skipped
    masks = contents(tmp_path / "undisturbed" / "masks")
    assert contents(run / "masks") == masks
    assert len(masks) > 3
