"""Work repeated after a kill: each system is killed half-way and started again.

Counted is what the second run does, against what was missing: slides (regions for
medray) whose masks were not stored when it was killed.

Run: python -m benchmarks.peers.kill --peers PEERS/bin/python --model demo/model
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import harness
from benchmarks.peers.compare import PEERS
from medray.datasets.synthetic import generate
from medray.storage.ledger import Ledger


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=harness.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )


def regions_of(ledger: Ledger) -> int:
    """How many regions are noted, of slides under way and of finished ones."""
    return sum(map(len, ledger.regions.values())) + sum(
        row["regions"] for row in ledger.slides.values()
    )


def kill(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    # Ray's daemons have sessions of their own.
    subprocess.run([sys.executable, "-m", "ray.scripts.scripts", "stop", "--force"])
    time.sleep(5)


def main(
    peers: str,
    model: Path,
    slides: int = 4,
    systems: tuple[str, ...] = (*PEERS, "medray"),
) -> Iterator[harness.Result]:
    """Count the work that a second run repeats after a kill.

    Args:
        peers: The python of the other systems' environment.
        model: Model folder.
        slides: Number of generated slides of 2048 px.
        systems: Which of all.
    """
    peers, uri = os.path.abspath(peers), str(model.absolute())
    with tempfile.TemporaryDirectory() as name:
        paths = generate(Path(name) / "data", slides=slides, seed=11)
        for system in systems:
            out = Path(name) / system
            if system == "medray":
                command = [sys.executable, "-m", "medray.cli", "infer", "--json"]
                command += ["--everywhere", "--region", "512"]
                stored = lambda: regions_of(Ledger(str(out)))  # noqa: B023,E731
                total = 16 * len(paths)
            else:
                command = [peers, "-m", "benchmarks.peers.run", "--system", system]
                stored = lambda: len(list(out.glob("*.npy")))  # noqa: B023,E731
                total = len(paths)
            command += ["--model", uri, "--out", str(out)]
            command += [] if system == "medray" else ["--slides"]
            command += map(str, paths)
            process = start(command)
            while process.poll() is None and stored() < total / 2:
                time.sleep(0.2)
            kill(process)
            before, moment = stored(), time.time()
            again = start(command)
            answer, _ = again.communicate()
            figures = json.loads(answer.splitlines()[-1])
            if system == "medray":
                done = figures["regions"]
            else:
                masks = out.glob("*.npy")
                done = sum(path.stat().st_mtime > moment for path in masks)
            yield {
                "system": system,
                "unit": "regions" if system == "medray" else "slides",
                "all": total,
                "stored when killed": before,
                "done by the second run": done,
                "repeated": done - (total - before),
            }


if __name__ == "__main__":
    harness.run(main)
