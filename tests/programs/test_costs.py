"""What a run of tests costs is printed, and adds up."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import costs
import pytest

TESTS = Path(__file__).parents[1]
SPEND = """
import time

def spend(seconds):
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass

def demo():
    spend(0.3)
"""
# What Python would import if it were alone, as tests/faulty has it.
SITE = "import sys; sys.is_faulty = True"
CHILD = """
import os, signal, sys, timm
assert sys.is_faulty
os.kill(os.getpid(), signal.SIGKILL)
"""
TEXT = f"""
import os, signal, subprocess, sys, time
import pytest
import costs
{SPEND}
@pytest.fixture(scope="module")
def outer():
    spend(0.4)

@pytest.fixture(scope="module")
def inner(request):
    request.getfixturevalue("outer")
    spend(0.1)

@pytest.fixture
def own():
    spend(0.1)

@pytest.mark.parametrize("number", [1, 2])
def test_waits(inner, own, number):
    pass

def test_imports():
    import timm
    import medray.apps.demo
    medray.apps.demo.demo()
    done = subprocess.run([sys.executable, "-c", {CHILD!r}])
    assert done.returncode == -signal.SIGKILL
    if os.fork() == 0:
        os._exit(0)
    os.wait()

def test_starts_a_shell():
    costs._INTERVAL_S = 0.05  # so that it is seen
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as shell:
        time.sleep(2)
        shell.kill()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The notes of a run of a file of tests, with modules that only have the names."""
    place = tmp_path_factory.mktemp("costed")
    modules, out = place / "modules", place / "out"
    (modules / "medray" / "apps").mkdir(parents=True)
    for package in ("medray", "medray/apps"):
        (modules / package / "__init__.py").touch()
    (modules / "medray" / "apps" / "demo.py").write_text(SPEND)
    (modules / "timm.py").write_text(f"{SPEND}\ndemo()")
    (modules / "sitecustomize.py").write_text(SITE)
    (place / "test_it.py").write_text(TEXT)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "costs", "-c", os.devnull]
    command += ["--rootdir", str(place), str(place), "--costs", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "MEDRAY_COSTS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(modules), str(TESTS)])
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(
        command, env=environment, cwd=modules, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
    return out


def rows(text: str, table: int) -> dict[str, list[Any]]:
    lines = text.split("\n\n")[1 + table].splitlines()[2:]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {name: values for name, *values in cells}


def test_costs_are_told_once_where_they_arise(folder: Path) -> None:
    """By CPU seconds, which do not depend on what else the machine does."""
    notes = costs.read_notes(folder)
    (session,) = (row for row in notes if row["kind"] == "session")
    spans = [row for row in notes if row["key"] == session["key"] and "wall" in row]
    spent = {(row["kind"], row["name"]): row["cpu"] for row in spans}
    assert 0.4 <= spent["fixture", "test_it.outer"] < 0.6
    assert 0.1 <= spent["fixture", "test_it.inner"] < 0.3
    assert 0.3 <= spent["import", "timm"] < 0.5
    assert 0.3 <= spent["demo", "without its trainings"] < 0.5
    assert spent["test", "test_it.py::test_imports"] < 0.3
    assert sum(row["wall"] for row in spans) <= session["seconds"]


def test_tables_have_all_processes(folder: Path) -> None:
    text = costs.tables(costs.read_notes(folder))
    assert text.startswith("4 tests: ")
    assert "2 of them Python's" in text
    processes = rows(text, 0)
    assert processes["tests"][0] == "1"
    assert processes["other Python"][0] == "1"  # it killed itself
    assert processes["forks of Python"][0] == "1"
    assert processes["other programs"][0] == "1"
    assert float(processes["other programs"][-1]) > 0
    times, here, there, cpu = rows(text, 1)["import: timm"]
    assert times == "2"
    assert float(here) >= 0.3
    assert float(there) >= 0.3  # of the process that killed itself
    assert float(cpu) >= 0.6
    assert sum(int(values[1]) for values in rows(text, 2).values()) == 2
    assert [values[0] for values in rows(text, 3).values()] == ["4"]


def test_tables_are_put_into_a_page(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{costs.BEGIN}\nold\n{costs.END}\n\nafter\n")
    command = [sys.executable, str(TESTS / "costs.py"), str(folder)]
    subprocess.run([*command, "--into", str(page)], check=True)
    text = costs.tables(costs.read_notes(folder))
    between = f"{costs.BEGIN}\n\n{text}\n\n{costs.END}"
    assert page.read_text() == f"before\n\n{between}\n\nafter\n"


def test_notes_are_taken_only_when_asked_for() -> None:
    assert ("cost_notes" in sys.modules) == ("MEDRAY_COSTS" in os.environ)
