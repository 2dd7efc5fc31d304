"""What all benchmarks share: rounds in turn, a record, a command line.

A benchmark is a typed function that yields what it finds, `Rounds` or a row of figures:

    def main(slides: int = 16, rounds: int = 3) -> Iterator[harness.Result]:
        \"\"\"What `--help` says, and Google's `Args:` for the options.\"\"\"
        yield harness.interleaved({"this": this, "that": that}, rounds)

    if __name__ == "__main__":
        harness.run(main)
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("torch", "torchvision", "timm", "segmentation-models-pytorch", "ray", "numpy"),
    *("zarr", "tifffile", "imagecodecs", "openslide-bin", "pyarrow"),
    *("monai", "tiatoolbox", "ratiopath", "cucim-cu13", "fastslide"),
)


# --- rounds ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Rounds:
    """Figures of variants that take turns.

    Attributes:
        baseline: The variant that the others are compared with.
        facts: What was measured, such as the side of a crop.
        figures: One number per round, by variant and name.
    """

    baseline: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    figures: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, variant: str, **figures: float) -> None:
        """Append the figures of one round."""
        for name, value in figures.items():
            named = self.figures.setdefault(variant, {})
            named.setdefault(name, []).append(float(value))

    def summary(self) -> dict[str, Any]:
        """Return the rounds, their medians, quartiles and ratios to the baseline.

        A ratio is taken within a round, so that the machine's drift does not count.
        """
        base = self.figures[self.baseline]
        ratios = {
            variant: {
                name: [a / b for a, b in zip(own[name], base[name], strict=True)]
                for name in own.keys() & base.keys()
                if all(base[name])
            }
            for variant, own in self.figures.items()
            if variant != self.baseline
        }
        return {
            **self.facts,
            "baseline": self.baseline,
            "rounds": self.figures,
            "medians": _each(statistics.median, self.figures),
            "spread": _each(quartiles, self.figures),
            "ratios": _each(statistics.median, ratios),
            "spread_of_ratios": _each(quartiles, ratios),
        }


Result = Rounds | Mapping[str, Any]


def interleaved(
    variants: Mapping[str, Callable[[], Mapping[str, float] | None]],
    rounds: int,
    *,
    warmup: int = 1,
    **facts: Any,
) -> Rounds:
    """Measure variants in turn; the first is the baseline.

    Every second round goes backwards, so that a drift favours none.

    Args:
        variants: Functions by name; each returns its figures, or None: its seconds.
        rounds: Number of rounds that count.
        warmup: Number of rounds before them that do not.
        facts: What is measured.
    """
    found = Rounds(next(iter(variants)), facts, {name: {} for name in variants})
    for number in range(-warmup, rounds):
        for name in list(variants)[:: -1 if number % 2 else 1]:
            start = time.perf_counter()
            figures = variants[name]()
            seconds = time.perf_counter() - start
            if number >= 0:
                found.add(name, **(figures or {"seconds": seconds}))
    return found


def _each(of: Callable[[list[float]], Any], figures: Mapping[str, Any]) -> Any:
    return {v: {k: of(x) for k, x in named.items()} for v, named in figures.items()}


def quartiles(values: list[float]) -> list[float]:
    """Return the lower and the upper quartile."""
    some = values if len(values) > 1 else [*values, *values]
    low, _, high = statistics.quantiles(some, n=4, method="inclusive")
    return [low, high]


def table(summary: Mapping[str, Any]) -> str:
    """Return medians and ratios to the baseline, each with quartiles, as Markdown."""

    def cell(of: str, spread: str, variant: str, name: str) -> str:
        if name not in summary[of].get(variant, {}):
            return ""
        low, high = summary[spread][variant][name]
        return f"{summary[of][variant][name]:.4g} [{low:.4g}, {high:.4g}]"

    lines = [f"| | | median [quartiles] | of {summary['baseline']} |"]
    lines.append("| --- | --- | --- | --- |")
    for variant, figures in summary["medians"].items():
        for name in figures:
            median = cell("medians", "spread", variant, name)
            ratio = cell("ratios", "spread_of_ratios", variant, name)
            lines.append(f"| {variant} | {name} | {median} | {ratio} |")
    return "\n".join(lines)


# --- record ---------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return the processor, cores, memory and GPUs of this machine."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = Path("/proc/meminfo").read_text().split()[1]
    gpus: list[str] = []
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        told = subprocess.run(command, capture_output=True, text=True)
        gpus = told.stdout.splitlines() if told.returncode == 0 else []
    cpu = found[1] if found else platform.machine()
    facts = {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": int(memory) >> 20}
    return facts | {"gpus": gpus}


def versions() -> dict[str, str]:
    """Return medray's commit, and the versions of Python and of packages."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    found = {"medray": commit or "unknown", "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


# --- command line ---------------------------------------------------------------------


def run(*functions: Callable[..., Iterable[Result] | None]) -> None:
    """Run the benchmark that the command line asks for, of several by its name.

    What it yields is printed; with --record it is written too, after each result, so
    that a benchmark that is stopped leaves what it has found.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = spec.name if spec else Path(sys.argv[0]).stem
    arguments = build_parser(*functions, program=program).parse_args().as_dict()
    chosen = functions[0]
    if len(functions) > 1:
        (chosen,) = (f for f in functions if f.__name__ == arguments["what"])
        arguments = arguments[chosen.__name__]
        program += f" {chosen.__name__}"
    file = arguments.pop("record")
    record: dict[str, Any] = {
        "benchmark": program,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "arguments": arguments,
        "results": [],
    }
    for result in chosen(**arguments) or ():
        if isinstance(result, Rounds):
            summary = result.summary()
            print("".join(f"\n{k}: {v}" for k, v in result.facts.items()))
            print(table(summary), flush=True)
        else:
            summary = dict(result)
            print(json.dumps(summary, default=str), flush=True)
        record["results"].append(summary)
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(record, indent=1, default=str) + "\n")


def build_parser(
    *functions: Callable[..., object], program: str = "benchmark"
) -> ArgumentParser:
    """Build a parser from signatures and docstrings: a command each, if several."""
    if len(functions) == 1:
        return _parser_of(functions[0], f"python -m {program}")
    parser = ArgumentParser(prog=f"python -m {program}")
    commands = parser.add_subcommands(dest="what")
    for function in functions:
        said = (function.__doc__ or "").partition("\n")[0]
        commands.add_subcommand(function.__name__, _parser_of(function), help=said)
    return parser


def _parser_of(function: Callable[..., object], program: str = "") -> ArgumentParser:
    said = (function.__doc__ or "").partition("\n\n    Args:")[0]
    parser = ArgumentParser(prog=program, description=said, allow_abbrev=False)
    parser.add_function_arguments(function, as_group=False, fail_untyped=True)
    hints = typing.get_type_hints(function)
    for action in parser._actions:
        # jsonargparse would take `--sides [1,2]` and `--files true`; here it is also
        # `--sides 1 2` and `--files`.
        hint = hints.get(action.dest)
        if typing.get_origin(hint) is tuple:
            action.nargs, action.metavar = "+", action.dest.upper()
            action._typehint = typing.get_args(hint)[0]
            if action.default is not None:
                action.default = list(action.default)
        elif hint is bool:
            action.nargs, action.const = "?", True
    parser.add_argument("--record", type=Path | None, help="file for a JSON record")
    return parser
