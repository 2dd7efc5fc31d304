"""The job script of the SLURM page and the DAG of the Airflow page."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT, blocks, blocks_of

from medray.apps import parse

# What the DAG takes of Airflow, which is no dependency: a task runs when it is called.
AIRFLOW = {
    "airflow/__init__.py": "",
    "airflow/sdk/__init__.py": (
        "def dag(**options):\n    return lambda make: make\n\n"
        "def task(function):\n    return function\n"
    ),
    "airflow/sdk/exceptions.py": "class AirflowFailException(Exception):\n    pass\n",
}


@pytest.mark.parametrize("language", ["sh", "bash"])
def test_blocks_of_shell_have_no_syntax_error(language: str) -> None:
    found = [*blocks(language)]
    assert found
    for page, text in found:
        done = subprocess.run(
            ["bash", "-n"], input=text, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{page}: {done.stderr}\n{text}"


def test_the_job_script_runs_a_command_of_medray() -> None:
    (script, *_) = blocks_of(ROOT / "docs" / "slurm.md", "bash")
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    lines = script.replace("\\\n", " ")
    commands = re.findall(r"\bmedray ([a-z]+ .*)", lines)
    assert commands
    for command in commands:
        assert parse(shlex.split(command)).command == command.split()[0]


def run_dag(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run the DAG once, with another command."""
    for name, text in AIRFLOW.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (text,) = blocks_of(ROOT / "docs" / "airflow.md", "py")
    changed, count = re.subn(
        r"^COMMAND = \(.*?^\)$", f"COMMAND = {command!r}", text, flags=re.M | re.S
    )
    assert count == 1
    (folder / "night.py").write_text(changed)
    return subprocess.run(
        [sys.executable, "night.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (0, ""),
        (3, ""),
        (2, "AirflowFailException"),
        (1, "RuntimeError: exit code 1"),
        (143, "RuntimeError: exit code 143"),
    ],
)
def test_the_dag_makes_of_exit_codes_what_its_page_says(
    code: int, error: str, tmp_path: Path
) -> None:
    result = {"failed": {"slide_7": "it is damaged"} if code == 3 else {}}
    script = tmp_path / "medray.sh"
    script.write_text(f"echo '{json.dumps(result)}'\nexit {code}\n")
    done = run_dag(tmp_path, f"sh {script}")
    if error:
        assert done.returncode == 1
        assert error in done.stderr
    else:
        assert done.returncode == 0, done.stderr
        assert done.stdout == ("slide_7: it is damaged\n" if code == 3 else "")


def test_a_wrong_request_fails_the_dag_with_medrays_words(tmp_path: Path) -> None:
    medray = Path(sys.executable).parent / "medray"
    done = run_dag(tmp_path, f"{medray} infer no --model none --out run --json")
    assert "AirflowFailException" in done.stderr
    assert "exit_code" in done.stderr
    assert "medray train" in done.stderr, "what to do"


def test_the_command_of_the_dag_is_accepted() -> None:
    (text,) = blocks_of(ROOT / "docs" / "airflow.md", "py")
    (block,) = re.findall(r"^COMMAND = \((.*?)^\)$", text, re.M | re.S)
    words = "".join(re.findall(r'"(.*?)"', block)).split()
    assert parse(words[1:]).command == "infer"
