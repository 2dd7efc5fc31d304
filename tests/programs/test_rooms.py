"""The rooms of medray: what stands there, and what each gives to the others."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOP = {"__init__.py", "cli.py", "errors.py", "classes.py", "geometry.py", "types.py"}
ROOMS = sorted(path.name for path in (ROOT / "medray").iterdir() if path.is_dir())
ROOMS = [room for room in ROOMS if not room.startswith("__")]
MOST = {"execution": 21, "training": 9, "mil": 6, "apps": 10}
"""Names that others may take of a room."""
LONG, LONGEST = 300, 500  # lines of a file with a reason at its top, and of any file


def given(room: str) -> set[str]:
    """Names that a room gives on."""
    tree = ast.parse((ROOT / "medray" / room / "__init__.pyi").read_text())
    return {name.name for node in tree.body for name in getattr(node, "names", ())}


def taken(room: str) -> set[str]:
    """Names that modules of other rooms, or jobs, take from a room."""
    found = set()
    paths = [*(ROOT / "medray").rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
    for path in paths:
        if path.is_relative_to(ROOT / "medray" / room):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == f"medray.{room}":
                found |= {name.name for name in node.names}
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                # What a command calls: `medray.room:function`.
                found |= {*re.findall(rf"^medray\.{room}:(\w+)$", node.value)}
    return found


def test_the_package_is_its_rooms() -> None:
    here = {path.name for path in (ROOT / "medray").iterdir()} - {"__pycache__"}
    assert here == TOP | {"py.typed", *ROOMS}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_gives_what_others_take_and_nothing_else(room: str) -> None:
    names = taken(room)
    if room == "apps":  # `medray.check`
        names.add("check")
    assert given(room) == names
    assert len(names) <= MOST.get(room, 100)


def test_each_name_is_there() -> None:
    for room in ROOMS:
        module = importlib.import_module(f"medray.{room}")
        assert set(module.__all__) == given(room)
    # torch and Ray come with some, so in a process of its own.
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, importlib\nfor room in sys.argv[1:]:\n"
            "    module = importlib.import_module(f'medray.{room}')\n"
            "    [getattr(module, name) for name in module.__all__]\n",
            *ROOMS,
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert said.returncode == 0, said.stderr


def test_a_room_costs_nothing_before_it_is_used() -> None:
    code = (
        "import sys, importlib\n"
        "for room in sys.argv[1:]: importlib.import_module(f'medray.{room}')\n"
        "print(*sorted({'ray', 'torch', 'numpy', 'zarr'} & sys.modules.keys()))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, *ROOMS], capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == []


def test_no_file_is_long_without_a_reason() -> None:
    for path in sorted((ROOT / "medray").rglob("*.py")):
        text = path.read_text()
        lines = text.count("\n")
        assert lines <= LONGEST, path
        if lines > LONG:
            assert "One file, " in (ast.get_docstring(ast.parse(text)) or ""), path


@pytest.mark.parametrize(
    ("place", "line", "contract"),
    [
        ("slides/tissue.py", "from medray.inference import infer", "from those below"),
        ("slides/tissue.py", "import torch", "No torch below models"),
        ("evaluation/count.py", "import ray", "No Ray outside"),
        (
            "inference/regions.py",
            "from medray.execution.actor_pool import Pool",
            "of execution",
        ),
    ],
)
def test_a_wrong_import_is_refused(
    place: str, line: str, contract: str, tmp_path: Path
) -> None:
    """In a copy: what `make lint` runs for the rooms finds it."""
    subprocess.run(
        ["cp", "-r", ROOT / "medray", ROOT / "pyproject.toml", tmp_path], check=True
    )
    path = tmp_path / "medray" / place
    path.write_text(path.read_text() + f"\n{line}\n")
    found = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    broken = [one for one in found.stdout.splitlines() if " BROKEN" in one]
    assert found.returncode == 1
    assert len(broken) == 1
    assert contract in broken[0]
