"""CI's long tests: what a change touches, what is essential, what the budget leaves."""

import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import selection
from dependencies import dependencies, touches
from selection import ROOT, Test, fault_commands, find_essential, ordered, select, shows

SERVED = "test_a_served_mask_is_a_runs_to_the_byte"
TRAINED = "test_a_training_outlives_a_node"
KILLED = "test_whatever_is_killed_the_masks_are_the_same_bytes"
SIGNALLED = "test_a_signal_stops_it_soon_and_nothing_is_lost"
README = "test_the_first_commands_end_in_a_report"
JOBS = "test_all_four_jobs_in_order"
VIEWED = "test_a_page_of_a_run"
CONVERTED = "test_a_converted_mask"
X_RAYS = "test_x_rays"
EMBEDDED = "test_features_of_slides"  # takes what README makes, and does not use it


@functools.cache
def functions() -> dict[str, Path]:
    """Every test by name, with its file; nothing is imported."""
    return {
        node.name: path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


@functools.cache
def depends(name: str) -> frozenset[str]:
    return dependencies(functions()[name], name)


@pytest.mark.parametrize(
    ("changed", "touched", "others"),
    [
        (
            "medray/apps/serve/deployment.py",
            {SERVED},
            {TRAINED, KILLED, SIGNALLED, README},
        ),
        (
            "medray/training/train_model.py",
            {TRAINED, README},
            {SERVED, KILLED, SIGNALLED, CONVERTED},
        ),
        ("medray/geometry.py", {SERVED, TRAINED, KILLED, SIGNALLED, README}, set()),
        ("medray/apps/convert.py", {CONVERTED}, {SERVED, TRAINED, README, SIGNALLED}),
        ("medray/apps/viewer/server.py", {VIEWED}, {SERVED, README, SIGNALLED}),
        ("medray/cli.py", {README, SIGNALLED, TRAINED}, {SERVED, CONVERTED}),
        (
            "medray/apps/commands/table.py",
            {README, SIGNALLED, TRAINED},
            {SERVED, CONVERTED},
        ),
        (
            "medray/evaluation/templates/night.html.jinja",
            {"test_a_week"},
            {SERVED, README},
        ),
        ("medray/apps/viewer/static/slide.js", {VIEWED}, {SERVED, README}),
        ("medray/__init__.py", {SERVED, TRAINED, SIGNALLED, README}, set()),
        ("tests/hostile.py", {"test_hostile_tiffs"}, {SERVED, README}),
        ("tests/lost_nodes.py", {"test_nodes_that_go_speak_against_no_row"}, {TRAINED}),
        ("benchmarks/robustness/chaos.py", {KILLED}, {SIGNALLED, TRAINED}),
        ("jobs/infer.py", {JOBS}, {SERVED, README}),
        ("medray/evaluation/evaluate_run.py", {JOBS, README}, {SERVED, KILLED}),
        (
            "medray/apps/doctor/doctor.py",
            {"test_doctor_tells_a_wrong_token"},
            {JOBS, README},
        ),
        (
            "medray/training/recipes/unet.yaml",
            {README, "test_every_recipe_trains"},
            {SERVED, KILLED, CONVERTED},
        ),
        ("k8s/new.yaml", {"test_a_few_small_slides_bring_one_gpu"}, {SERVED, README}),
        ("tests/serial.py", {X_RAYS, SIGNALLED}, {KILLED}),  # X_RAYS by `usefixtures`
        ("README.md", {README, VIEWED, EMBEDDED}, {X_RAYS, SERVED, SIGNALLED}),
        ("docs/training.md", {X_RAYS}, {README, VIEWED, SERVED}),
        ("docs/view.md", {VIEWED}, {README, X_RAYS, SERVED}),
        ("CHANGELOG.md", set(), {README, VIEWED, SERVED, SIGNALLED}),
    ],
)
def test_a_change_touches_what_depends_on_it(
    changed: str, touched: set[str], others: set[str]
) -> None:
    found = {name for name in touched | others if touches(changed, depends(name))}
    assert found == touched


def test_every_module_is_depended_on_by_a_test() -> None:
    needed = frozenset().union(*map(depends, functions()))
    modules = {p.relative_to(ROOT).as_posix() for p in ROOT.glob("medray/**/*.py")}
    assert modules - needed == set()


def test_every_fault_has_a_test_that_its_command_collects() -> None:
    faults = fault_commands()
    assert len(faults) > 20
    files = {name: path.relative_to(ROOT) for name, path in functions().items()}
    for fault, commands in faults.items():
        assert commands, f"{fault}: names no pytest command"
        for command in commands:
            found = [n for n, f in files.items() if shows([command], str(f), n)]
            assert found, f"{fault}: pytest {command[0]} -k {command[1]!r} has no test"


def long_tests() -> list[Test]:
    """Tests of several files, one of them by itself, each on a module of its own."""
    return [
        Test(
            file=f"tests/test_{number % 5}.py",
            name=f"test_{number}",
            seconds=5.0 + number,
            alone=number % 5 == 0,
            depends=frozenset({f"medray/{number}.py", "medray/geometry.py"}),
        )
        for number in range(30)
    ]


def test_the_budget_is_kept_and_the_essential_are_always_there() -> None:
    tests = long_tests()
    for budget in (0, 60, 150, 250, 400):
        chosen = select(tests, tests[:3], {"medray/geometry.py"}, budget, "seed")
        run = [*chosen.essential, *chosen.touched]
        assert chosen.essential == tests[:3]
        assert not chosen.touched or selection.wall_seconds(run) <= budget
        for test in chosen.left_out:
            assert selection.wall_seconds([*run, test]) > budget
        assert {*run, *chosen.left_out} == {*tests}


def test_a_file_is_run_by_one_worker_and_some_tests_alone() -> None:
    a, b = Test("a", "", 10, False, frozenset()), Test("b", "", 4, False, frozenset())
    assert selection.wall_seconds([]) == 0
    assert selection.wall_seconds([a, b]) == 10
    assert selection.wall_seconds([b, Test("c", "", 4, False, frozenset())]) == 4
    assert selection.wall_seconds([a, b, Test("c", "", 7, True, frozenset())]) == 17


def test_what_is_left_out_is_run_with_another_commit() -> None:
    tests = long_tests()
    run: set[Test] = set()
    for commit in range(40):
        chosen = select(tests, [], {"medray/geometry.py"}, 100, f"{commit}")
        assert chosen.left_out
        run |= {*chosen.touched}
    assert run == {*tests}


def test_the_tests_of_what_few_depend_on_come_early() -> None:
    tests = long_tests()
    places = [
        ordered(tests, {"medray/geometry.py", "medray/7.py"}, f"{n}").index(tests[7])
        for n in range(40)
    ]
    assert sum(places) / 40 < 1
    assert ordered(tests, {"medray/7.py"}, "") == [tests[7]]
    assert ordered(tests, {"medray/none.py"}, "") == []


@pytest.mark.parametrize(
    "changed", [None, {"pyproject.toml"}, {"tests/conftest.py"}, {"constraints.txt"}]
)
def test_some_changes_touch_everything(changed: set[str] | None) -> None:
    assert {*ordered(long_tests(), changed, "")} == {*long_tests()}


def test_one_test_of_each_fault_and_page_is_essential(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def test(name: str, seconds: float, *pages: str, alone: bool = False) -> Test:
        return Test("tests/test_a.py", name, seconds, alone, frozenset(pages))

    tests = [
        test("test_disk_slow", 90),
        test("test_disk_soon", 20),
        test("test_node_alone", 50, alone=True),
        test("test_node_beside", 70),
        test("test_pages", 30, "docs/a.md", "docs/b.md"),
        test("test_page", 10, "docs/b.md"),
        test("test_other", 5, "medray/geometry.py"),
    ]
    faults = {
        "disk": [("tests/test_a.py", "disk")],
        "node": [("tests/test_a.py", "node and not lost")],
        "shown by a quick test of the same file": [("tests/test_a.py", "other")],
        "shown by a file of quick tests": [
            ("tests/test_a.py", "slow"),
            ("tests/test_b.py", ""),
        ],
    }
    monkeypatch.setattr(selection, "fault_commands", lambda: faults)
    found = find_essential(tests, [("tests/test_a.py", "test_other_quick")])
    names = {one.name for one in found}
    assert names == {"test_disk_soon", "test_node_beside", "test_pages"}


def test_a_selection_without_a_test_is_no_failure() -> None:
    """The kills are essential, and left out by the mark."""
    command = [sys.executable, "-m", "pytest", str(functions()[KILLED]), "-q"]
    command += ["--touched-since", "HEAD", "--budget", "0", "-m", "unit"]
    environment = {k: v for k, v in os.environ.items() if "XDIST" not in k}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"essential tests/.*::{KILLED}", done.stdout)
    assert "1 deselected" in done.stdout


def test_the_revision_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(folder: Path, *words: str) -> str:
        done = subprocess.run(
            ["git", "-c", "user.name=A", "-c", "user.email=a@b", *words],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    (origin := tmp_path / "origin").mkdir()
    monkeypatch.setattr(selection, "ROOT", origin)
    assert selection.base_of("recent") is None  # no repository
    git(origin, "init", "--quiet")
    commits = []
    for number, hour in enumerate(("08", "09", "12", "14")):
        (origin / f"{number}.txt").write_text(hour)
        monkeypatch.setenv("GIT_COMMITTER_DATE", f"2026-01-02T{hour}:30:00+00:00")
        git(origin, "add", ".")
        git(origin, "commit", "--quiet", "--message", hour)
        commits.append(git(origin, "rev-parse", "HEAD"))
    assert selection.base_of("recent") == commits[1]
    assert selection.base_of(commits[2]) == commits[2]
    assert selection.base_of("unknown") is None
    (origin / "0.txt").write_text("changed")
    (origin / "new.txt").write_text("new")
    assert selection.changed_since(commits[2]) == {"0.txt", "3.txt", "new.txt"}
    git(origin, "checkout", "--quiet", "--force", commits[2])
    assert selection.base_of("recent") == commits[0]  # the root: none is 4 hours older
    git(tmp_path, "clone", "--quiet", "--depth", "1", origin.as_uri(), "shallow")
    monkeypatch.setattr(selection, "ROOT", tmp_path / "shallow")
    assert selection.base_of("recent") is None


def test_durations_are_read_from_reports(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.long.test_a" name="test_x[1-b]" '
        'time="12.345"/><testcase classname="tests.test_b" name="test_y" time="0.1">'
        '<skipped message="no GPU"/></testcase></testsuite></testsuites>'
    )
    assert selection.durations_of([report]) == {"test_a.py::test_x[1-b]": 12.3}
