"""Work repeated after a kill: each system is killed half-way and started again.

Counted is what the second run does, against what was missing: slides (regions for
medray) whose masks were not stored when it was killed.

Run: python benchmarks/peers/kill.py --peers PEERS/bin/python --model demo/model
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import PEERS

from medray.datasets.synthetic import generate
from medray.storage.ledger import Ledger


def start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": "."},
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", required=True, help="python of their environment")
    parser.add_argument("--model", required=True)
    parser.add_argument("--slides", type=int, default=4)
    parser.add_argument("--systems", nargs="+", default=[*PEERS, "medray"])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        slides = generate(Path(name) / "data", slides=args.slides, seed=11)
        for system in args.systems:
            out = Path(name) / system
            if system == "medray":
                command = [sys.executable, "-m", "medray.cli", "infer", "--json"]
                command += ["--everywhere", "--region", "512"]
                stored = lambda: regions_of(Ledger(str(out)))  # noqa: B023,E731
                total = 16 * len(slides)
            else:
                command = [args.peers, "benchmarks/peers/run.py", system]
                stored = lambda: len(list(out.glob("*.npy")))  # noqa: B023,E731
                total = len(slides)
            command += ["--model", args.model, "--out", str(out), *map(str, slides)]
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
            print(
                json.dumps(
                    {
                        "system": system,
                        "unit": "regions" if system == "medray" else "slides",
                        "all": total,
                        "stored when killed": before,
                        "done by the second run": done,
                        "repeated": done - (total - before),
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
