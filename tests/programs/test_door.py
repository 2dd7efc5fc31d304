"""What comes to the door of a command: readers that go, disks that are full, surprises."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

BIN = Path(sys.executable).parent
MEDRAY = str(BIN / "medray")


def run(
    command: list[str], stdout: int = subprocess.PIPE, **variables: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | variables,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("words", ["--help", "--version", "recipes", "recipes --json"])
def test_a_reader_that_has_gone_is_no_failure(words: str) -> None:
    read, write = os.pipe()
    os.close(read)
    done = run([MEDRAY, *words.split()], write)
    assert (done.returncode, done.stderr) == (0, "")
    done = subprocess.run([MEDRAY, *words.split()], stdout=write, stderr=write)
    assert done.returncode == 0
    wrong = subprocess.run([MEDRAY, "infer"], stdout=write, stderr=write)
    assert wrong.returncode == 2
    os.close(write)


@pytest.mark.parametrize("words", ["--help", "recipes", "recipes --json"])
def test_what_cannot_be_printed_is_told(words: str) -> None:
    with open("/dev/full", "w") as full:
        done = run([MEDRAY, *words.split()], full.fileno())
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "medray: what it has to say cannot be written (No space left on device)"
    ]


def test_closed_streams_are_as_good_as_none(tmp_path: Path) -> None:
    for words, code in (("recipes", 0), (f"check {tmp_path}/none", 2)):
        command = f'"{MEDRAY}" {words} >&- 2>&-'
        assert run(["bash", "-c", command]).returncode == code


def test_names_are_printed_where_the_locale_knows_ascii_only(tmp_path: Path) -> None:
    how = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    pixels = np.random.default_rng(1).integers(0, 200, (64, 64, 3), dtype=np.uint8)
    (tmp_path / "slides").mkdir()
    tifffile.imwrite(tmp_path / "slides" / "прóба.tif", pixels, photometric="rgb")
    done = run([MEDRAY, "check", str(tmp_path / "slides"), "--json"], **how)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)
    assert "LC_ALL=C.UTF-8" in done.stderr
    for name in ("a", "b"):
        for number in range(4):
            place = tmp_path / "cells" / name / f"zelle-ö{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (number, ord(name), 0)).save(place)
    words = ["ingest", str(tmp_path / "cells"), "--side", "32", "--executor", "local"]
    done = run([MEDRAY, *words, "--out", str(tmp_path / "data")], **how)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "PYTHONUTF8=1" in done.stderr.splitlines()[-1]


RAISING = """
import sys
from dataclasses import replace
from medray.apps.commands.table import COMMANDS
from medray.cli import script

def run(given):
    {statement}

COMMANDS["recipes"] = replace(COMMANDS["recipes"], run=run)
script(["recipes", *sys.argv[1:]])
"""


def raising(
    statement: str, *words: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    code = RAISING.format(statement=statement)
    return run([sys.executable, "-c", code, *words], **variables)


def test_a_surprise_is_kept_in_a_file(tmp_path: Path) -> None:
    """One line for users; the traceback is there for developers."""
    state = tmp_path / "state"
    done = raising("{}['no such\\nkey']", XDG_STATE_HOME=str(state))
    assert done.returncode == 1
    found = re.fullmatch(
        r"medray recipes: unexpected: KeyError: .*; the trace is in (\S+); "
        r"please report it\n",
        done.stderr,
    )
    assert found
    trace = Path(found[1])
    assert trace.parent == state / "medray"
    assert "Traceback" in trace.read_text()
    assert "in run" in trace.read_text()
    done = raising("{}[1]", "--json", TMPDIR=str(tmp_path), XDG_STATE_HOME="")
    said = json.loads(done.stdout)
    assert said["exit_code"] == done.returncode == 1
    assert f"the trace is in {tmp_path}/medray-recipes-" in said["error"]
    done = raising("{}[1]", "-v", XDG_STATE_HOME=str(state))
    assert "Traceback" in done.stderr
    # With no place for it, it is printed.
    done = raising("{}[1]", XDG_STATE_HOME="/proc")
    assert "Traceback" in done.stderr
    assert done.stderr.endswith("the trace is above; please report it\n")


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        ("bytearray(1 << 60)", "not enough memory"),
        ("import no_such_package", "No module named 'no_such_package'"),
        ("open('/dev/full', 'w', buffering=1).write('x' * 9999)", "No space left"),
        ("raise PermissionError(13, 'Permission denied', '/a')", "/a: Permission"),
        (
            "import ray; raise ray.exceptions.RaySystemError('the store is gone')",
            "Ray failed .*the store is gone",
        ),
    ],
)
def test_what_a_machine_lacks_is_told_in_words(
    statement: str, said: str, tmp_path: Path
) -> None:
    done = raising(statement, XDG_STATE_HOME=str(tmp_path))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search(said, line)
    assert "unexpected" not in line
    assert [*tmp_path.iterdir()] == []


SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)


def signalled(
    command: list[str], *there: Path, number: signal.Signals, **variables: str
) -> tuple[int, str]:
    """Send a process a signal for each file that it makes; give its code and stderr."""
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | variables,
        # A shell has its background jobs ignore SIGINT, and they their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    for path in there:
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
    _, said = process.communicate(timeout=30)
    return process.returncode, said


def stopped_by(number: signal.Signals, command: str) -> str:
    return (
        f"{command}: stopped by {number.name}: what was finished is kept; run the same "
        f"command again to go on\n"
    )


@SIGNALS
def test_a_command_that_sees_to_no_signals_ends_by_them(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    waits = "open({!r}, 'w').close(); import time; time.sleep(60)"
    first = f"try: {waits.format(str(one))}"
    then = f"finally: {waits.format(str(two))}"
    code_of = RAISING.format(statement=f"{first}\n    {then}")
    command = [sys.executable, "-c", code_of]
    # The second one while it tidies up after the first.
    found = signalled(command, one, two, number=number)
    assert found == (code, stopped_by(number, "medray recipes"))


@SIGNALS
def test_a_signal_while_packages_are_imported_is_answered(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    (tmp_path / "cyclopts.py").write_text(
        f"open({str(there)!r}, 'w').close()\nimport time\ntime.sleep(60)\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    found = signalled([MEDRAY, "recipes"], there, number=number, PYTHONPATH=path)
    assert found == (code, stopped_by(number, "medray"))
