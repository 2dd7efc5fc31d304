"""medray beside TIAToolbox, MONAI and ratiopath: same slides, weights and windows.

Interleaved runs in one go, each system in a process of its own. Start-up (imports, the
model, Ray) is not in `seconds`; for medray these are from the first read to the last
commit, and `stage` is the whole stage with its workers' start.

Run: python benchmarks/peers/compare.py --peers PEERS/bin/python --model MODEL
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, "benchmarks")

from infer import bare, loop
from run_memory import MARK, run_watched

from medray.datasets.synthetic import generate
from medray.inference.run import mask_uri
from medray.models.config import Prediction
from medray.models.predict import Predictor
from medray.storage import ome_zarr
from medray.storage.files import read_table

PEERS = ("tiatoolbox", "monai", "ratiopath")


def run_peer(
    python: str, name: str, model: str, slides: list[Path], out: Path
) -> dict[str, Any]:
    command = [python, "benchmarks/peers/run.py", name, "--model", model]
    command += ["--out", str(out), *map(str, slides)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": ".", MARK: "1"},
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", required=True, help="python of their environment")
    parser.add_argument("--model", required=True)
    parser.add_argument("--slides", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--systems", nargs="+", default=PEERS)
    args = parser.parse_args()
    precisions = {"medray float32": "float32", "medray": "auto"}
    rounds: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as name:
        slides = generate(Path(name) / "data", slides=args.slides, seed=11)
        predictors = {
            f"bare forward, {key}": Predictor.from_folders(
                [args.model], Prediction(precision=value)
            )
            for key, value in precisions.items()
        }
        for index in range(args.rounds):
            out = Path(name) / f"round{index}"
            for key, predictor in predictors.items():
                seconds = bare(predictor, slides, 10**6)
                figures: dict[str, Any] = {"seconds": seconds}
                rounds.setdefault(key, []).append(figures)
                folder = out / f"loop {key}"
                figures = {"seconds": loop(predictor, slides, folder)}
                figures["overhead"] = figures["seconds"] - seconds
                rounds.setdefault(f"plain loop, {key[14:]}", []).append(figures)
            for system in args.systems:
                figures = run_peer(args.peers, system, args.model, slides, out / system)
                figures["overhead"] = figures["seconds"] - figures["forward"]
                rounds.setdefault(system, []).append(figures)
            for key, precision in precisions.items():
                figures = run_medray(precision, args.model, slides, out / precision)
                forward = rounds[f"bare forward, {key}"][-1]["seconds"]
                figures["overhead"] = figures["seconds"] - forward
                rounds.setdefault(key, []).append(figures)
            truth = rounds["medray float32"][-1]["masks"]
            for key, runs in rounds.items():
                masks = runs[-1].pop("masks", {})
                if masks and key != "medray float32":
                    same = [(masks[s] == truth[s]).mean() for s in truth]
                    runs[-1]["equal to medray float32"] = float(np.mean(same))
                print(f"{time.strftime('%T')} {key} {json.dumps(runs[-1])}", flush=True)
            shutil.rmtree(out)
    print()
    columns = ("seconds", "windows", "overhead", "stage", "peak MiB")
    print("| system |", " | ".join(columns), "| x medray | equal |")
    print("|---|" + "---|" * (len(columns) + 2))
    base = [run["seconds"] for run in rounds["medray"]]
    for key, runs in rounds.items():
        cells = []
        for column in columns:
            values = [run[column] for run in runs if column in run]
            cells.append(f"{statistics.median(values):.1f}" if values else "")
        ratio = statistics.median(
            run["seconds"] / one for run, one in zip(runs, base, strict=True)
        )
        equal = runs[-1].get("equal to medray float32")
        cells += [f"{ratio:.2f}", f"{equal:.4%}" if equal else ""]
        print(f"| {key} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main()
