"""medray beside TIAToolbox, MONAI and ratiopath: same slides, weights and windows.

Interleaved runs in one go, each system in a process of its own. Start-up (imports, the
model, Ray) is not in `seconds`; for medray these are from the first read to the last
commit, and `stage` is the whole stage with its workers' start.

Run: python -m benchmarks.peers.compare --peers PEERS/bin/python --model MODEL
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import harness
from benchmarks.peak_memory import MARK, run_watched
from benchmarks.throughput.infer import bare, loop
from medray.datasets.synthetic import generate
from medray.inference.run import mask_uri
from medray.models.config import Precision, Prediction
from medray.models.predict import Predictor
from medray.storage import ome_zarr
from medray.storage.files import read_table

PEERS = ("tiatoolbox", "monai", "ratiopath")


def run_peer(
    python: str, name: str, model: str, slides: list[Path], out: Path
) -> dict[str, Any]:
    command = [python, "-m", "benchmarks.peers.run", "--system", name]
    command += ["--model", model, "--out", str(out), "--slides", *map(str, slides)]
    done = subprocess.run(
        command,
        cwd=harness.ROOT,
        env=os.environ | {MARK: "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    figures["masks"] = {p.stem: np.load(out / f"{p.stem}.npy") for p in slides}
    return figures


def run_medray(
    precision: str, model: str, slides: list[Path], out: Path
) -> dict[str, Any]:
    command = [sys.executable, "-m", "medray.cli", "infer", *map(str, slides)]
    command += ["--model", model, "--out", str(out), "--precision", precision]
    command += ["--everywhere", "--json"]
    summary, peak = run_watched(command)
    rows = read_table(str(out / "slides.parquet")).to_pylist()
    first = min(row["first_read_at"] for row in rows)
    last = max(row["committed_at"] for row in rows)
    return {
        "seconds": last - first,
        "stage": summary["seconds"],
        "windows": sum(row["windows"] for row in rows),
        "peak MiB": peak.mib,
        "masks": {
            path.stem: np.asarray(ome_zarr.open_level(mask_uri(str(out), path.stem))[:])
            for path in slides
        },
    }


def main(
    peers: str,
    model: Path,
    slides: int = 4,
    rounds: int = 2,
    systems: tuple[str, ...] = PEERS,
) -> Iterator[harness.Result]:
    """Compare medray with other systems in seconds, memory and masks.

    Args:
        peers: The python of their environment.
        model: Model folder.
        slides: Number of generated slides of 2048 px.
        rounds: Number of rounds.
        systems: Which of the others.
    """
    peers, uri = os.path.abspath(peers), str(model.absolute())
    precisions: dict[str, Precision] = {"medray float32": "float32", "medray": "auto"}
    found = harness.Rounds("medray", {"slides": slides})
    with tempfile.TemporaryDirectory() as name:
        paths = generate(Path(name) / "data", slides=slides, seed=11)
        predictors = {
            key: Predictor.from_folders([uri], Prediction(precision=value))
            for key, value in precisions.items()
        }
        for index in range(rounds):
            out = Path(name) / f"round{index}"
            forward: dict[str, float] = {}
            for key, predictor in predictors.items():
                forward[key] = bare(predictor, paths, 10**6)
                found.add(f"bare forward, {key}", seconds=forward[key])
                seconds = loop(predictor, paths, out / f"loop {key}")
                overhead = seconds - forward[key]
                found.add(f"plain loop, {key}", seconds=seconds, overhead=overhead)
            runs = {
                key: run_medray(precision, uri, paths, out / precision)
                for key, precision in precisions.items()
            }
            for key, figures in runs.items():
                figures["overhead"] = figures["seconds"] - forward[key]
            for system in systems:
                figures = run_peer(peers, system, uri, paths, out / system)
                figures["overhead"] = figures["seconds"] - figures.pop("forward")
                runs[system] = figures
            truth = runs["medray float32"]["masks"]
            for key, figures in runs.items():
                masks = figures.pop("masks")
                same = [float((masks[s] == truth[s]).mean()) for s in truth]
                figures["equal to medray float32"] = float(np.mean(same))
                found.add(key, **figures)
                print(f"round {index + 1}: {key}: {figures}", file=sys.stderr)
            shutil.rmtree(out)
    yield found


if __name__ == "__main__":
    harness.run(main)
