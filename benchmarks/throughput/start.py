"""How long a command takes before it works, and in all, as a user starts it.

Each time a new process of the installed command, with nothing running before:

    infer, ingest   one slide of 2048 px by each executor: `whole, s` of the command, of
                    it `to the first read, s` (of a region) and `from then on, s`
    imports         what commands import, as `python -X importtime` sums it up, and
                    whether torch is among it

Run: python -m benchmarks.throughput.start infer --rounds 5
     python -m benchmarks.throughput.start ingest --rounds 5
     python -m benchmarks.throughput.start imports --rounds 5
"""

import functools
import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import harness
from medray.datasets.synthetic import generate
from medray.storage.files import read_table

MEDRAY = Path(sys.executable).with_name("medray")
# Nothing of the caller's decides where a command runs.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}


def timed(words: list[str], out: Path, first_at: str) -> dict[str, float]:
    """Run a command; return its seconds, by the first read that its table has."""
    start, began = time.perf_counter(), time.time()
    run([str(MEDRAY), *words, "--out", str(out)])
    whole = time.perf_counter() - start
    rows = read_table(str(out / "slides.parquet")).to_pylist()
    first = min(row[first_at] for row in rows) - began
    return {
        "whole, s": whole,
        "to the first read, s": first,
        "from then on, s": whole - first,
    }


def run(command: list[str]) -> str:
    """Run a command and return what it writes to standard error."""
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}")
    return done.stderr


def by_executor(
    words: list[str], first_at: str, executors: tuple[str, ...], rounds: int, out: Path
) -> harness.Rounds:
    number = itertools.count()

    def once(executor: str) -> dict[str, float]:
        more = ["--executor", executor]
        return timed([*words, *more], out / f"{executor}{next(number)}", first_at)

    variants = {name: functools.partial(once, name) for name in executors}
    return harness.interleaved(variants, rounds, slide="2048 x 2048 px")


def infer(
    rounds: int = 5, executors: tuple[str, ...] = ("auto", "ray"), model: str = ""
) -> Iterator[harness.Result]:
    """Measure `medray infer` of one slide.

    Args:
        rounds: Number of rounds.
        executors: Values of --executor; the first is the baseline.
        model: Model folder; without one a U-Net of random weights.
    """
    with tempfile.TemporaryDirectory() as name:
        (slide,) = generate(Path(name) / "data", slides=1, seed=1)
        folder = model or str(random_weights(Path(name)))
        words = ["infer", str(slide), "--model", folder, "--everywhere"]
        yield by_executor(words, "first_read_at", executors, rounds, Path(name))


def ingest(
    rounds: int = 5, executors: tuple[str, ...] = ("auto", "ray")
) -> Iterator[harness.Result]:
    """Measure `medray ingest` of one slide.

    Args:
        rounds: Number of rounds.
        executors: Values of --executor; the first is the baseline.
    """
    with tempfile.TemporaryDirectory() as name:
        (slide,) = generate(Path(name) / "data", slides=1, seed=1)
        words = ["ingest", str(slide), "--annotations"]
        words.append(str(Path(name) / "data" / "annotations"))
        yield by_executor(words, "first_cut_at", executors, rounds, Path(name))


def random_weights(folder: Path) -> Path:
    from benchmarks.random_model import random_model  # torch

    return Path(random_model(folder / "model"))


def imports(rounds: int = 5) -> Iterator[harness.Result]:
    """Measure what `--help`, `evaluate`, `verify`, `view` and `doctor` import.

    Args:
        rounds: Number of rounds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), itertools.count()
        (slide,) = generate(folder / "data", slides=1, seed=1)
        done = str(folder / "run")
        model = str(random_weights(folder))
        words = ["infer", str(slide), "--model", model, "--executor", "local"]
        run([str(MEDRAY), *words, "--out", done])
        truth = str(folder / "data" / "annotations")

        def report() -> list[str]:
            out = str(folder / f"report{next(count)}")
            return ["evaluate", done, "--truth", truth, "--out", out]

        variants = {
            "--help": lambda: imported(["--help"]),
            "evaluate": lambda: imported(report()),
            "verify": lambda: imported(["verify", done]),
            "view": lambda: imported(["view", done, "--port", "0"], ends=False),
            "doctor": lambda: imported(["doctor"], codes=(0, 1)),
        }
        yield harness.interleaved(variants, rounds)


def imported(
    words: list[str], ends: bool = True, codes: tuple[int, ...] = (0,)
) -> dict[str, float]:
    """Run a command; return its imports' seconds and number, and those of torch.

    Args:
        words: Of medray's command line.
        ends: Whether it ends by itself; else it is interrupted once it answers.
        codes: Its exit codes.
    """
    command = [sys.executable, "-X", "importtime", "-m", "medray.cli", *words]
    start = time.perf_counter()
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=said, text=True
        ) as process,
    ):
        assert process.stdout
        if ends:
            process.stdout.read()
        else:
            for line in process.stdout:
                if "http://" in line:
                    break
        whole = time.perf_counter() - start
        if not ends:
            process.send_signal(signal.SIGINT)
            process.communicate()
            codes = (130,)
        code = process.wait()
        said.seek(0)
        told = said.read()
    if code not in codes:
        sys.exit(f"medray {' '.join(words)}: exit code {code}\n{told[-2000:]}")
    found = re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", told, re.MULTILINE)
    names = [name for _, name in found]
    return {
        "imports, s": sum(int(own) for own, _ in found) / 1e6,
        "whole, s": whole,
        "modules": len(names),
        "of torch": sum(name.split(".")[0] == "torch" for name in names),
    }


if __name__ == "__main__":
    harness.run(infer, ingest, imports)
