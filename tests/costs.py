"""What the tests cost: `pytest ... --costs=FOLDER`, then `python tests/costs.py FOLDER`.

With `--costs` all processes of a run of tests, Ray's as well, write into the folder what
they spend (costing/cost_notes.py); here are the spans that only pytest knows, the CPU
seconds of programs that are not Python, and the tables. Without it nothing is done.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

Row = dict[str, Any]

MARK = "MEDRAY_COSTS"
COSTING = Path(__file__).parent / "costing"
BEGIN, END = "<!-- costs: made by `make costs` -->", "<!-- end of costs -->"
# How often the CPU seconds of all processes are read, s.
_INTERVAL_S = 1.0
# Every so many of these they are noted, for the case that pytest itself is killed.
_NOTED = 30
# Fixtures that took less in all are printed together, s.
_LEAST_S = 1.0
_FILES = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that makes all this active."""
    parser.addoption("--costs", metavar="FOLDER", help="note what the tests cost there")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Watch this process and all that it starts."""
    if config.getoption("--costs") is None:
        return
    is_worker = hasattr(config, "workerinput")  # of pytest-xdist
    if not is_worker:
        folder = Path(config.getoption("--costs")).resolve()
        if folder.is_dir() and any(folder.iterdir()):
            raise pytest.UsageError(f"--costs {folder}: expected a new or empty folder")
        folder.mkdir(parents=True, exist_ok=True)
        os.environ[MARK] = str(folder)
        path = [str(COSTING), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    sys.path.insert(0, str(COSTING))  # it is there in processes that are started
    config.pluginmanager.register(_Costs(is_worker), "medray-costs")


class _Costs:
    """The spans of a process of pytest."""

    def __init__(self, is_worker: bool) -> None:
        import cost_notes

        self._notes = cost_notes
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._since = time.perf_counter()
        self._is_first = not is_worker
        if self._is_first:
            self._sampler.start()

    def pytest_unconfigure(self) -> None:
        if self._is_first:
            seconds = time.perf_counter() - self._since
            self._notes.note("session", "", seconds=seconds)
            self._stop.set()
            self._sampler.join()

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Generator[None, Any, Any]:
        with self._notes.span("collection", ""):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        with self._notes.span("test", item.nodeid):
            return (yield)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, Any, Any]:
        name = f"{fixturedef.func.__module__}.{fixturedef.argname}"
        shared = fixturedef.scope not in ("function", "class")
        file = request.node.nodeid.split("::")[0]
        # The fixtures of single tests are of these tests.
        kind, name = ("fixture", name) if shared else ("setup", file)
        with self._notes.span(kind, name, scope=fixturedef.scope):
            return (yield)

    def _sample(self) -> None:
        """Note the CPU seconds of all marked processes, as they were last seen."""
        seen: dict[str, tuple[str, float]] = {}
        over, trial = False, 0
        while not over:
            over, trial = self._stop.wait(_INTERVAL_S), trial + 1
            now = self._marked(seen)
            if over or trial % _NOTED == 0:
                told = seen | now
            else:
                told = {key: seen[key] for key in seen.keys() - now.keys()}
            for key, (name, cpu) in told.items():
                self._notes.note("seen", name, key=key, cpu=cpu)
            seen = now

    def _marked(self, known: Mapping[str, Any]) -> dict[str, tuple[str, float]]:
        """Return name and CPU seconds of processes with this run's mark, by key.

        Ray's workers write their titles over their environment, so those that have a
        file of notes are taken by that.
        """
        folder, found = Path(os.environ[MARK]), {}
        mark = f"{MARK}={folder}\0".encode()
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                key, name, cpu = self._notes.stat(pid)
                if (
                    key in known
                    or (folder / f"{key}.jsonl").exists()
                    or mark in Path("/proc", pid, "environ").read_bytes()
                ):
                    found[key] = (name, cpu)
            except OSError:  # it is gone, or another's
                continue
        return found


def read_notes(folder: Path) -> list[Row]:
    """Return all processes' notes, each with the key of the process it is about."""
    return [
        {"key": file.stem} | json.loads(line)
        for file in sorted(folder.glob("*.jsonl"))
        for line in file.read_text().splitlines()
    ]


def tables(notes: list[Row]) -> str:
    """Return the tables, as Markdown."""
    kinds = _kinds(notes)
    cpu: dict[str, float] = defaultdict(float)
    for row in notes:
        if row["kind"] in ("end", "seen"):
            cpu[row["key"]] = max(cpu[row["key"]], row["cpu"])
    tests = sum(row["kind"] == "test" for row in notes)
    seconds = sum(row["seconds"] for row in notes if row["kind"] == "session")
    python = {row["key"] for row in notes if row["kind"] == "process"}
    total = (
        f"{tests} tests: {seconds:.0f} s of wall time, {sum(cpu.values()):.0f} CPU "
        f"seconds of all processes, {len(python)} of them Python's."
    )
    parts = [_by_process(notes, kinds, cpu), _by_span(notes, kinds)]
    return "\n\n".join([total, *parts, _by_fixture(notes), _by_file(notes)])


def _kinds(notes: list[Row]) -> dict[str, str]:
    """Return of what kind each process is, by its key."""
    found: dict[str, dict[str, str]] = {
        kind: {row["key"]: row["name"] for row in notes if row["kind"] == kind}
        for kind in ("fork", "seen", "process", "collection", "session")
    }
    kinds = dict.fromkeys(found["fork"], "forks of Python")
    kinds |= {key: _program_kind(name) for key, name in found["seen"].items()}
    kinds |= {key: _python_kind(text.split()) for key, text in found["process"].items()}
    return kinds | dict.fromkeys([*found["collection"], *found["session"]], "tests")


def _python_kind(words: list[str]) -> str:
    names = {Path(word).name for word in words}
    if "default_worker.py" in names:
        return "Ray's workers"
    if any("/ray/" in word for word in words) or "ray" in names:
        return "Ray's other Python"
    if "medray.cli" in names or "medray" in names or any("jobs/" in w for w in words):
        return "commands and jobs of medray"
    return "other Python"


def _program_kind(name: str) -> str:
    if name.startswith("chrom"):
        return "browsers"
    if name.startswith(("python", "pytest", "ray::")):
        return "forks of Python"
    return "Ray's servers" if name in ("raylet", "gcs_server") else "other programs"


def _by_process(
    notes: list[Row], kinds: dict[str, str], cpu: Mapping[str, float]
) -> str:
    """Count processes and their CPU seconds, and what of these is imports."""
    torch = set()
    imports: dict[str, float] = defaultdict(float)
    for row in notes:
        if row["kind"] == "import" and row["name"] != "ray":
            imports[row["key"]] += row["cpu"]
            torch |= {row["key"]} if row["name"] == "torch" else set()
    groups = _grouped(kinds, lambda key: kinds[key])
    rows = [
        [
            kind,
            len(keys),
            len(torch.intersection(keys)),
            sum(imports[key] for key in keys),
            sum(cpu[key] for key in keys),
        ]
        for kind, keys in groups.items()
    ]
    rows.sort(key=lambda row: -row[4])
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    head = ["processes", "number", "with torch", "importing it, CPU s", "all, CPU s"]
    return _table(head, rows)


def _by_span(notes: list[Row], kinds: Mapping[str, str]) -> str:
    """Sum what is watched by its kind and name, in the tests' processes and elsewhere."""
    titles = {
        "fixture": "fixtures of sessions and files",
        "setup": "fixtures of single tests",
        "test": "the tests themselves",
        "collection": "collection of tests",
    }
    spans = [row for row in notes if "wall" in row]
    groups = _grouped(
        spans, lambda row: titles.get(row["kind"], f"{row['kind']}: {row['name']}")
    )
    rows = []
    for title, members in groups.items():
        here = [row["wall"] for row in members if kinds[row["key"]] == "tests"]
        there = sum(row["wall"] for row in members) - sum(here)
        cpu = sum(row["cpu"] for row in members)
        rows.append([title, len(members), sum(here), there, cpu])
    head = ["what", "times", "in tests' processes, s", "in others, s", "CPU s"]
    return _table(head, sorted(rows, key=lambda row: -row[2] - row[3]))


def _by_fixture(notes: list[Row]) -> str:
    """Print how often each fixture of a session or a file was built."""
    built = [row for row in notes if row["kind"] == "fixture"]
    rows, others = [], [0, 0, 0.0]
    for name, members in _grouped(built, lambda row: row["name"]).items():
        seconds = sum(row["wall"] for row in members)
        processes = len({row["key"] for row in members})
        if seconds >= _LEAST_S:
            row = [f"`{name}`", members[0]["scope"], len(members), processes, seconds]
            rows.append(row)
        else:
            others = [others[0] + 1, others[1] + len(members), others[2] + seconds]
    rows.sort(key=lambda row: -row[4])
    rows.append([f"{others[0]} others", "", others[1], "", others[2]])
    return _table(["fixture", "of each", "built", "by processes", "s"], rows)


def _by_file(notes: list[Row]) -> str:
    """Print the rest: the tests of each file, with the fixtures of single tests."""
    kept = [row for row in notes if row["kind"] in ("test", "setup")]
    rows = []
    for file, members in _grouped(kept, lambda r: r["name"].split("::")[0]).items():
        tests = sum(row["kind"] == "test" for row in members)
        rows.append([f"`{file}`", tests, sum(row["wall"] for row in members)])
    rows.sort(key=lambda row: -row[2])
    rows, others = rows[:_FILES], rows[_FILES:]
    if others:
        left = [sum(row[1] for row in others), sum(row[2] for row in others)]
        rows.append([f"{len(others)} others", *left])
    return _table(["the tests themselves", "tests", "s"], rows)


def _grouped(items: Iterable[Any], key: Callable[[Any], Any]) -> dict[Any, list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _table(head: list[str], rows: Iterable[list[Any]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1)]
    lines += [[f"{c:.1f}" if isinstance(c, float) else str(c) for c in r] for r in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Print the tables of a folder, or put them into a page."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("folder", type=Path, help="what --costs named")
    parser.add_argument("--into", type=Path, help="page with the marks of these tables")
    arguments = parser.parse_args()
    text = tables(read_notes(arguments.folder))
    print(text)
    if arguments.into is not None:
        before, rest = arguments.into.read_text().split(BEGIN)
        after = rest.split(END)[1]
        arguments.into.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


if __name__ == "__main__":
    main()
