"""medray next to a plain loop, TIAToolbox, MONAI, ratiopath, LazySlide.

The same slides, weights, windows and precision.

Interleaved runs in one go, each system in a process of its own, with nothing else
running:

    seconds          without the start (imports, the model, Ray); of medray, by its
                     default executor, from the first read to the last commit (without
                     Ray slides are read while torch is still imported)
    whole, s         of the command, with its start and end
    peak PSS, MiB    of all its processes together
    overhead         seconds beyond those of the model's forward alone
    F1               of tumour, all pixels of all slides together
    pixels equal     to medray's in float32, of all pixels

Without --peers only medray, the loop and the bare forward are compared: a whole job of
12 slides is `--slides 12 --precisions auto`.

Run: python -m benchmarks.peers.compare --peers PEERS/bin/python --model MODEL
     python -m benchmarks.peers.compare --slides 12 --precisions auto
"""

import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import harness
from benchmarks.peak_memory import run_watched
from benchmarks.random_model import random_model
from benchmarks.throughput.infer import bare
from medray.datasets.synthetic import generate
from medray.datasets.synthetic_scene import draw_scene
from medray.evaluation.metrics import class_scores, confusion
from medray.inference.run import mask_uri
from medray.models.config import Precision, Prediction
from medray.models.network import choose_precision
from medray.models.predict import Predictor
from medray.storage import ome_zarr
from medray.storage.files import read_table

PEERS = ("tiatoolbox", "monai", "ratiopath", "lazyslide")
SEED = 11
Masks = Mapping[str, np.ndarray]


def run_command(command: list[str], model: str, out: Path) -> dict[str, Any]:
    start = time.perf_counter()
    told, peak = run_watched([*command, "--model", model, "--out", str(out)])
    return told | {"whole, s": time.perf_counter() - start, "peak PSS, MiB": peak.mib}


def run_peer(
    python: str, name: str, precision: str, model: str, slides: list[Path], out: Path
) -> tuple[dict[str, float], Masks]:
    command = [python, "-m", "benchmarks.peers.run", "--system", name]
    command += ["--precision", precision]
    figures = run_command([*command, "--slides", *map(str, slides)], model, out)
    figures["overhead"] = figures["seconds"] - figures.pop("forward")
    return figures, {p.stem: np.load(out / f"{p.stem}.npy") for p in slides}


def run_loop(
    precision: str, model: str, slides: list[Path], out: Path
) -> tuple[dict[str, float], Masks]:
    command = [sys.executable, "-m", "benchmarks.peers.loop", "--precision", precision]
    figures = run_command([*command, "--slides", *map(str, slides)], model, out)
    return figures, {p.stem: _read(str(out / f"{p.stem}.ome.zarr")) for p in slides}


def run_medray(
    precision: str, model: str, slides: list[Path], out: Path
) -> tuple[dict[str, float], Masks]:
    command = [sys.executable, "-m", "medray.cli", "infer", *map(str, slides)]
    command += ["--precision", precision, "--everywhere", "--json"]
    told = run_command(command, model, out)
    rows = read_table(str(out / "slides.parquet")).to_pylist()
    first = min(row["first_read_at"] for row in rows)
    last = max(row["committed_at"] for row in rows)
    figures = {k: told[k] for k in ("whole, s", "peak PSS, MiB")}
    figures |= {"seconds": last - first, "windows": sum(r["windows"] for r in rows)}
    return figures, {p.stem: _read(mask_uri(str(out), p.stem)) for p in slides}


def _read(uri: str) -> np.ndarray:
    return np.asarray(ome_zarr.open_level(uri)[:])


def f1(truth: Masks, masks: Masks) -> float:
    counts = sum(confusion(truth[s], masks[s], 2) for s in truth)
    _, tumour = class_scores(np.asarray(counts), ["background", "tumour"])
    return float(tumour["f1"] or 0.0)


def main(
    peers: str = "",
    model: Path | None = None,
    slides: int = 4,
    rounds: int = 2,
    systems: tuple[str, ...] = (),
    precisions: tuple[Precision, ...] = ("auto", "float32"),
) -> Iterator[harness.Result]:
    """Compare medray with other systems in seconds, memory and masks.

    Args:
        peers: The python of their environment; without it they are left out.
        model: Model folder; without one a U-Net of random weights.
        slides: Number of generated slides of 2048 px.
        rounds: Number of rounds.
        systems: Only these of the others; none: all.
        precisions: Of medray and the loop; the others have the first.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = generate(folder / "data", slides=slides, seed=SEED)
        truth = {  # as `generate` draws them
            path.stem: draw_scene(SEED + index, tumour=index % 6 != 5).mask
            for index, path in enumerate(paths)
        }
        uri = str(model.absolute()) if model else random_model(folder / "model")
        forward: dict[str, Callable[[], float]] = {}
        runs: dict[str, Callable[[Path], tuple[dict[str, float], Masks]]] = {}
        for precision in precisions:
            called = "" if precision == "auto" else f", {precision}"
            how = Prediction(precision=precision)
            predictor = Predictor.from_folders([uri], how)
            for key, run in (("medray", run_medray), ("plain loop", run_loop)):
                runs[key + called] = functools.partial(run, precision, uri, paths)
                forward[key + called] = functools.partial(bare, predictor, paths, 10**6)
        python = os.path.abspath(peers)
        dtype = choose_precision(precisions[0], torch.device("cpu"))
        name = str(dtype).removeprefix("torch.")
        for system in (systems or PEERS) if peers else ():
            runs[system] = functools.partial(run_peer, python, system, name, uri, paths)
        found = harness.Rounds(
            next(iter(runs)), {"slides": slides, "precision of the others": name}
        )
        for index in range(rounds):
            masks: dict[str, Masks] = {}
            told: dict[str, dict[str, float]] = {}
            for key in list(runs)[:: -1 if index % 2 else 1]:
                out = folder / f"{index} {key}"
                told[key], masks[key] = runs[key](out)
                told[key]["F1"] = f1(truth, masks[key])
                if key in forward:
                    seconds = forward[key]()
                    told[key]["overhead"] = told[key]["seconds"] - seconds
                    told[key]["bare forward, s"] = seconds
                shutil.rmtree(out)
            for key, figures in told.items():
                if exact := masks.get("medray, float32"):
                    same = [float((masks[key][s] == exact[s]).mean()) for s in exact]
                    figures["pixels equal"] = float(np.mean(same))
                found.add(key, **figures)
                print(f"round {index + 1}: {key}: {figures}", file=sys.stderr)
        yield found


if __name__ == "__main__":
    harness.run(main)
