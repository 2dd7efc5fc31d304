"""Benchmarks: every one has a command line, the documented ones fit, records are whole."""

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import PAGES, ROOT

from benchmarks import harness

FOLDERS = ("throughput", "scaling", "robustness", "quality", "viewers", "peers")
HELPERS = {
    "benchmarks.peers.engines",
    "benchmarks.quality.folds",
    "benchmarks.viewers.shown",
}
WEIGHTS = "results/lite0.safetensors"
# Benchmarks import torch, so this is run in a process of its own; the last line tells
# the exit code of each command line.
PARSE = """
import contextlib, io, json, runpy, sys
from benchmarks import harness

given = {}
harness.run = lambda *functions: given.update({name: functions})
found = {}
for name, commands in json.loads(sys.argv[1]).items():
    runpy.run_module(name, run_name="__main__")
    parser = harness.build_parser(*given[name], program=name)
    for words in commands:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                parser.parse_args(words)
            code = 0
        except SystemExit as error:
            code = error.code
        found[" ".join([name, *words])] = [code, said.getvalue()]
print(json.dumps(found))
"""


def documented() -> Iterator[tuple[str, list[str]]]:
    """Yield the benchmarks that pages and modules run, each with its words."""
    texts = {}
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"^```.*?^```", text, re.DOTALL | re.MULTILINE)
        spans = re.findall(
            r"`([^`]+)`",
            re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE),
        )
        texts[page] = "\n".join([*blocks, *(" ".join(s.split()) for s in spans)])
    for folder in FOLDERS:
        for module in (ROOT / "benchmarks" / folder).glob("*.py"):
            texts[module] = str(ast.get_docstring(ast.parse(module.read_text())))
    for text in texts.values():
        for command in re.findall(
            r"python -m (benchmarks\..*)", text.replace("\\\n", " ")
        ):
            name, *words = shlex.split(re.sub(r"[\[\]]", " ", command), comments=True)
            yield name, words
    for recipe in ("cervical", "malaria", "pneumonia", "nuclei"):
        yield from made(recipe)


def made(recipe: str) -> list[tuple[str, list[str]]]:
    """Return the benchmarks that `make results` runs, each with its words."""
    there = [f"--old-file={file}" for file in (".venv/.complete", WEIGHTS)]
    done = subprocess.run(
        ["make", "--dry-run", *there, "results", f"NAME={recipe}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.replace("\\\n", " ")
    found = re.findall(r"python -m (benchmarks\.quality\..*)", text)
    return [(words[0], words[1:]) for words in map(shlex.split, found)]


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[int, str]]:
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): [["--help"]]
        for folder in FOLDERS
        for path in sorted((ROOT / "benchmarks" / folder).glob("*.py"))
    }
    commands = {name: words for name, words in found.items() if name not in HELPERS}
    for name, words in documented():
        commands[name].append(words)
    done = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(commands)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, tuple[int, str]] = json.loads(done.stdout.splitlines()[-1])
    return answers


def test_every_benchmark_answers_help(answers: dict[str, tuple[int, str]]) -> None:
    helps = {k: v for k, v in answers.items() if k.endswith("--help")}
    assert len(helps) > 20
    assert {name.split(".")[1] for name in helps} == {*FOLDERS}
    assert {name: code for name, (code, _) in helps.items() if code} == {}
    for name, (_, said) in helps.items():
        assert "--record" in said or "subcommand" in said, name


def test_documented_command_lines_are_accepted(
    answers: dict[str, tuple[int, str]],
) -> None:
    others = {k: v for k, v in answers.items() if not k.endswith("--help")}
    assert len(others) > 30
    assert {k: said for k, (code, said) in others.items() if code} == {}


def test_results_are_made_by_splits_and_a_model_of_all_from_the_same_weights() -> None:
    for recipe in ("cervical", "malaria", "pneumonia", "nuclei"):
        splits, (whole, words) = made(recipe)
        assert whole == "benchmarks.quality.whole"
        assert words[:2] == ["--recipe", recipe]
        assert f"weights={WEIGHTS}" in splits[1]
        assert words[words.index("--weights") + 1] == WEIGHTS
        encoders = [
            {word for word in line if word.startswith("model.encoder=")}
            for line in (splits[1], words)
        ]
        assert encoders[0] == encoders[1], "of another network than was tested"


def test_results_of_an_unknown_name_are_refused() -> None:
    done = subprocess.run(
        ["make", "--dry-run", f"--old-file={WEIGHTS}", "results", "NAME=lung"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert "lung is none of cervical, malaria, pneumonia, nuclei" in done.stderr


def tiny(rounds: int = 2, sides: tuple[int, ...] = (8,)) -> Iterator[harness.Result]:
    """Count to a number.

    Args:
        rounds: Number of rounds.
        sides: Numbers.
    """
    turns: list[str] = []

    def variant(name: str, seconds: float) -> dict[str, float]:
        turns.append(name)
        return {"seconds": seconds * len(turns)}

    for side in sides:
        yield harness.interleaved(
            {"base": lambda: variant("base", 1), "other": lambda: variant("other", 2)},
            rounds,
            side=side,
        )
    yield {"turns": "".join(name[0] for name in turns)}


def test_a_record_holds_date_machine_versions_and_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "record.json"
    words = ["tiny", "--rounds", "3", "--sides", "8", "--record", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    harness.run(tiny)
    record = json.loads(file.read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}\+00:00", record["date"])
    assert record["machine"]["cpu"]
    assert record["machine"]["cores"] >= 1
    assert {"medray", "python", "numpy", "zarr"} <= record["versions"].keys()
    assert record["arguments"] == {"rounds": 3, "sides": [8]}
    measured, turns = record["results"]
    # One round that warms up, then three; every second one goes backwards.
    assert turns == {"turns": "obboobbo"}
    base, other = [2.0 + 1, 6.0, 7.0], [8.0, 10.0, 16.0]
    assert measured["rounds"] == {
        "base": {"seconds": base},
        "other": {"seconds": other},
    }
    assert measured["medians"]["other"]["seconds"] == 10.0
    assert measured["spread"]["other"]["seconds"] == [9.0, 13.0]
    ratios = sorted(o / b for o, b in zip(other, base, strict=True))
    assert measured["ratios"] == {"other": {"seconds": ratios[1]}}
    low, high = (ratios[0] + ratios[1]) / 2, (ratios[1] + ratios[2]) / 2
    assert measured["spread_of_ratios"]["other"]["seconds"] == [low, high]
    assert measured["side"] == 8
    printed = capsys.readouterr().out
    assert "| other | seconds | 10 [9, 13] |" in printed


def test_a_benchmark_that_is_stopped_leaves_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(rounds: int = 1) -> Iterator[harness.Result]:
        yield {"first": rounds}
        raise KeyboardInterrupt

    file = tmp_path / "record.json"
    monkeypatch.setattr(sys, "argv", ["stopped", "--record", str(file)])
    with pytest.raises(KeyboardInterrupt):
        harness.run(stopped)
    assert json.loads(file.read_text())["results"] == [{"first": 1}]
