"""The wheel holds all that medray needs outside of its checkout."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from documents import ROOT


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which a wheel of this checkout is unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel"]
    built = subprocess.run(
        [*command, "-d", str(folder)], cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the unpacked wheel, outside of the checkout."""
    return subprocess.run(
        [sys.executable, "-m", "medray.cli", *words],
        cwd=installed.parent,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )


def test_recipes_come_with_the_wheel(installed: Path) -> None:
    done = run(installed, "recipes", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["folder"] == str(installed / "medray" / "training" / "recipes")
    here = [p.stem for p in (ROOT / "medray/training/recipes").rglob("*.yaml")]
    assert sorted(row["name"] for row in found["recipes"]) == sorted(here)


def test_every_file_of_the_package_comes_with_the_wheel(installed: Path) -> None:
    """Templates and pages too; what git ignores does not."""
    listed = subprocess.run(
        ["git", "ls-files", "medray"], cwd=ROOT, capture_output=True, text=True
    )
    there = {
        str(path.relative_to(installed))
        for path in (installed / "medray").rglob("*")
        if path.is_file()
    }
    assert set(listed.stdout.splitlines()) <= there


def test_the_version_is_that_of_the_project(installed: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    done = run(installed, "--version")
    assert done.stdout.strip() == f"medray {project['version']}", done.stderr
