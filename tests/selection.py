"""The long tests that CI runs: `pytest --touched-since REV --budget SECONDS`.

Essential tests run always: one for each row of docs/reliability.md, if no quick test shows
it, and one for each page whose commands are run. Then come the tests that depend on a file
changed since the revision, until the budget is used up. Their order is drawn from the
commit, so that what is left out today is run another day; tests of what few tests depend on
come early. Quick tests are not selected from.

`python tests/selection.py JUNIT_XML ...` writes durations.json.
"""

import functools
import hashlib
import json
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
from _pytest.mark.expression import Expression  # -k: pytest has no public name for it

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "docs" / "reliability.md"
DURATIONS = Path(__file__).with_name("durations.json")
ALONE = "tests/kill/"
TOUCH_ALL = {"pyproject.toml", "constraints.txt", ".python-version", "Makefile"}
UNKNOWN_S = 60.0
WORKERS = 2
HOURS = 4  # what "recent" is


@dataclass(frozen=True)
class Test:
    """A long test."""

    __test__ = False
    file: str  # from the root
    name: str  # with its parameters
    seconds: float
    alone: bool  # no other test runs at the same time
    depends: frozenset[str]  # files

    @property
    def id(self) -> str:
        return f"{self.file}::{self.name}"


@dataclass(frozen=True)
class Selection:
    """Which tests are run, why, and which are not though they are touched."""

    essential: list[Test]
    touched: list[Test]
    left_out: list[Test]


def select(
    tests: Iterable[Test],
    essential: Iterable[Test],
    changed: set[str] | None,
    budget: float,
    seed: str,
) -> Selection:
    """Select tests; `changed` are files, None stands for all."""
    chosen = list(essential)
    touched, left_out = [], []
    for test in ordered(set(tests) - set(chosen), changed, seed):
        if wall_seconds([*chosen, *touched, test]) <= budget:
            touched.append(test)
        else:
            left_out.append(test)
    return Selection(chosen, touched, left_out)


def ordered(tests: Iterable[Test], changed: set[str] | None, seed: str) -> list[Test]:
    """Return the tests that a change touches, in an order drawn from the seed.

    A test comes the earlier, on average, the fewer tests depend on the same changed file.
    """
    from dependencies import touches  # needs grimp, which only a selection needs

    tests = sorted(tests, key=lambda test: test.id)
    if changed is None or any(
        file in TOUCH_ALL or file.endswith("conftest.py") for file in changed
    ):
        crowds = dict.fromkeys(tests, len(tests))
    else:
        crowds = {}
        for file in sorted(changed):
            touched = [test for test in tests if touches(file, test.depends)]
            for test in touched:
                crowds[test] = min(len(touched), crowds.get(test, len(touched)))

    def place(test: Test) -> float:
        drawn = hashlib.sha256(f"{seed} {test.id}".encode()).digest()[:8]
        return crowds[test] * int.from_bytes(drawn) / 2**64

    return sorted(crowds, key=place)


def wall_seconds(tests: Iterable[Test]) -> float:
    """Return how long tests take: whole files on two workers, then those alone."""
    files: dict[str, float] = defaultdict(float)
    alone = 0.0
    for test in tests:
        if test.alone:
            alone += test.seconds
        else:
            files[test.file] += test.seconds
    shared = sum(files.values()) / WORKERS
    return alone + max([shared, *files.values()])


def find_essential(tests: list[Test], quick: Iterable[tuple[str, str]]) -> list[Test]:
    """Return the cheapest long tests for each row of faults and each page.

    Args:
        tests: All long tests.
        quick: Files and names of the tests that run anyway; what is in no file of `tests`
            is among them too.
    """
    wanted: dict[str, list[Test]] = defaultdict(list)
    for fault, commands in fault_commands().items():
        elsewhere = {file for file, _ in commands} - {test.file for test in tests}
        if elsewhere or any(shows(commands, *one) for one in quick):
            continue
        wanted[fault] = [t for t in tests if shows(commands, t.file, t.name)]
    for test in tests:
        for page in (file for file in test.depends if file.endswith(".md")):
            wanted[page].append(test)
    chosen: list[Test] = []
    for candidates in sorted(wanted.values(), key=len):
        if candidates and not any(test in chosen for test in candidates):
            costs = {t: t.seconds * (WORKERS if t.alone else 1) for t in candidates}
            chosen.append(min(costs, key=lambda test: (costs[test], test.id)))
    return chosen


@functools.cache
def fault_commands() -> dict[str, list[tuple[str, str]]]:
    """Return the file and the -k expression of each pytest command, by fault."""
    table = FAULTS.read_text().partition("\n| --- |")[2].partition("\n\n")[0]
    found = {}
    for line in table.splitlines()[1:]:
        fault, *_, cell = (part.strip() for part in line.strip("|").split("|"))
        commands = [shlex.split(code) for code in re.findall("`([^`]*)`", cell)]
        found[fault] = [
            (words[1], words[3] if words[2:3] == ["-k"] else "")
            for words in commands
            if words[0] == "pytest"
        ]
    return found


def shows(commands: list[tuple[str, str]], file: str, name: str) -> bool:
    """Return whether one of some commands collects a test."""

    def has(word: str, /, **_: object) -> bool:
        return word.lower() in f"{file} {name}".lower()

    return any(
        file == path
        and (not expression or Expression.compile(expression).evaluate(has))
        for path, expression in commands
    )


def base_of(revision: str) -> str | None:
    """Return the commit to compare with, None if this clone does not have it."""
    if revision != "recent":
        return _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    time = _git("log", "-1", "--format=%ct")
    if time is None:
        return None
    before = f"--before={int(time) - HOURS * 3600}"
    found = _git("log", "-1", "--format=%H", before)
    if found is None and _git("rev-parse", "--is-shallow-repository") == "false":
        found = _git("rev-list", "--max-parents=0", "--max-count=1", "HEAD")
    return found


def changed_since(base: str) -> set[str]:
    """Return the files that differ from a commit, from the root; uncommitted ones too."""
    differing = _git("diff", "--name-only", "--no-renames", base) or ""
    new = _git("ls-files", "--others", "--exclude-standard") or ""
    return {*differing.splitlines(), *new.splitlines()}


def _git(*arguments: str) -> str | None:
    """Return what git prints, None if that is nothing or an error."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def read_durations() -> dict[str, float]:
    """Return the recorded seconds by "FILE::NAME", the file without its folder."""
    return json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}


def durations_of(reports: Iterable[Path]) -> dict[str, float]:
    """Return the seconds of each test that was not skipped in reports of `--junitxml`."""
    found: dict[str, float] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            if case.find("skipped") is None:
                parts = case.attrib["classname"].split(".")
                file = [part for part in parts if part.startswith("test_")][-1]
                name = f"{file}.py::{case.attrib['name']}"
                found[name] = round(float(case.attrib["time"]), 1)
    return found


def read_test(item: pytest.Item, durations: dict[str, float]) -> Test:
    """Describe a collected test."""
    from dependencies import dependencies

    path = item.path.relative_to(ROOT)
    function = getattr(item, "originalname", None) or item.name.partition("[")[0]
    return Test(
        file=path.as_posix(),
        name=item.name,
        seconds=durations.get(f"{path.name}::{item.name}", UNKNOWN_S),
        alone=path.as_posix().startswith(ALONE),
        depends=dependencies(item.path, function),
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("selection")
    group.addoption(
        "--touched-since",
        metavar="REV",
        help="of the long tests, only the essential and those that depend on a file "
        f"changed since REV; 'recent' is the newest commit {HOURS} hours before this",
    )
    group.addoption(
        "--budget",
        type=float,
        default=float("inf"),
        metavar="SECONDS",
        help="with --touched-since: how long the selected tests may take, by "
        "tests/durations.json",
    )


# Called before those of pytest itself: -m and -k choose from the selection, not the
# selection from theirs, so that a second call for the other tests completes it.
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    revision, budget = config.getoption("touched_since"), config.getoption("budget")
    if revision is None:
        return
    durations = read_durations()
    tests = {
        item.nodeid: read_test(item, durations)
        for item in items
        if item.get_closest_marker("long")
    }
    quick = [
        (item.path.relative_to(ROOT).as_posix(), item.name)
        for item in items
        if item.nodeid not in tests
    ]
    base = base_of(revision)
    changed = None if base is None else changed_since(base)
    essential = find_essential([*tests.values()], quick)
    seed = _git("rev-parse", "HEAD") or ""
    selection = select(tests.values(), essential, changed, budget, seed)
    kept = {*selection.essential, *selection.touched}
    dropped = [item for item in items if tests.get(item.nodeid) not in {None, *kept}]
    config.hook.pytest_deselected(items=dropped)
    items[:] = [item for item in items if item not in {*dropped}]
    report = describe(selection, base, changed, budget)
    if hasattr(
        config, "workeroutput"
    ):  # with pytest-xdist the main process has no items
        config.workeroutput["selection"] = report
    else:
        _reports.add(report)


_reports: set[str] = set()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    _reports.add(getattr(node, "workeroutput", {}).get("selection", ""))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in sorted(_reports - {""}):
        terminalreporter.section("selection")
        terminalreporter.line(report)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    nothing = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
    if nothing and session.config.getoption("touched_since") is not None:
        session.exitstatus = pytest.ExitCode.OK


def describe(
    selection: Selection, base: str | None, changed: set[str] | None, budget: float
) -> str:
    """Return what is run and what is left out, in words."""
    if changed is None:
        what = "all files (this clone does not have the revision to compare with)"
    else:
        what = f"{len(changed)} files changed since {base[:10] if base else ''}"
    run = [*selection.essential, *selection.touched]
    lines = [
        f"{len(selection.essential)} essential long tests and {len(selection.touched)} "
        f"of those that depend on {what}: about {wall_seconds(run):.0f} s"
    ]
    lines += [f"  essential {test.id}" for test in selection.essential]
    lines += [f"  touched   {test.id}" for test in selection.touched]
    if selection.left_out:
        lines.append("touched too, but left out; `make test-slow` runs them:")
        lines += [f"  {test.id}" for test in selection.left_out]
    never = [
        test.id
        for test in selection.left_out
        if wall_seconds([*selection.essential, test]) > budget
    ]
    if never:
        lines.append(f"too long for this budget on any day: {', '.join(never)}")
    return "\n".join(lines)


if __name__ == "__main__":
    recorded = durations_of(map(Path, sys.argv[1:]))
    DURATIONS.write_text(json.dumps(recorded, indent=0, sort_keys=True) + "\n")
