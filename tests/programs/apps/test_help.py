"""`medray --help` is quick: nothing that takes its time is imported for it."""

import glob
import re
import subprocess
import sys

import pytest

HEAVY = ["torch", "ray", "pandas", "matplotlib"]


@pytest.mark.parametrize(
    ("words", "unwanted"),
    [
        (["--help"], [*HEAVY, "numpy", "yaml"]),
        (["--version"], [*HEAVY, "numpy", "yaml"]),
        (["train", "--help"], HEAVY),
        (["tune", "--help"], HEAVY),
        (["serve", "--help"], HEAVY),
        (["infer", "--help"], HEAVY),
        (["evaluate", "--help"], HEAVY),
        (["nightly", "--help"], HEAVY),
    ],
)
def test_help_imports_nothing_heavy(words: list[str], unwanted: list[str]) -> None:
    code = (
        "import sys\n"
        "from medray.cli import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "except SystemExit as ended:\n"
        "    assert ended.code == 0\n"
        "print(*sys.modules, file=sys.stderr)\n"
    )
    command = [sys.executable, "-c", code, *words]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "medray" in ran.stdout
    assert set(unwanted) & {*ran.stderr.split()} == set()


@pytest.mark.skipif(
    bool(glob.glob("/dev/nvidia*")), reason="doctor asks torch for GPUs"
)
def test_doctor_does_without_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "medray.cli", "doctor"]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode in (0, 1)
    assert "GPUs" in ran.stdout
    assert not re.search(r"\| +torch$", ran.stderr, re.MULTILINE)
