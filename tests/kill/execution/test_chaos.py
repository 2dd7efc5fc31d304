"""Promise 2, with processes really killed: some rounds of benchmarks/robustness/chaos.py.

Which kinds of kill they are differs from time to time; all of them, many times, are in
benchmarks/records.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.timeout(1800)
def test_whatever_is_killed_the_masks_are_the_same_bytes(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    seed = str(int(time.time()))
    command = [sys.executable, "-m", "benchmarks.robustness.chaos"]
    command += [
        "--rounds",
        "2",
        "--slides",
        "3",
        "--seed",
        seed,
        "--record",
        str(record),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    *_, certificate = json.loads(record.read_text())["results"]
    assert certificate["rounds"] == certificate["identical"] == 2, certificate
    assert len(certificate["kills"]) == 2
    assert certificate["committed_computed_again"] == 0
    assert certificate["strays"] == 0
