"""Rows in processes of this machine: what they cost when they end or hang them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from medray.errors import LostError, MedrayError
from medray.execution.choice import settle_executor
from medray.execution.processes import Processes


def work(row: Any) -> Any:
    """Do as the row says."""
    name, value = row
    if name == "die":
        with Path(value).open("a") as log:
            log.write("died\n")
        os.kill(os.getpid(), signal.SIGKILL)
    if name in ("sleep", "pid"):
        time.sleep(value)
    if name == "divide":
        return 1 / value
    return os.getpid() if name == "pid" else value


def results(stream: Processes, rows: list[Any]) -> list[tuple[Any, Any]]:
    stream.give(rows)
    found = []
    while stream.busy:
        found += stream.take()
    return found


def processes(**options: Any) -> Processes:
    return Processes(work, **{"timeout": lambda _: 60.0} | options)


def test_a_process_is_started_when_a_row_waits_and_stays() -> None:
    with processes(processes=2) as stream:
        first = {result for _, result in results(stream, [("pid", 0)])}
        again = {result for _, result in results(stream, [("pid", 0)])}
        assert len(first | again) == 1
        # The second one takes a second or more to start.
        both = {result for _, result in results(stream, [("pid", 0.2)] * 30)}
        assert len(both) == 2
    assert not any(map(psutil.pid_exists, first))


def test_a_row_that_kills_costs_its_group_and_no_other_row(tmp_path: Path) -> None:
    log = str(tmp_path / "log")
    rows = [("die", log), ("die", log), ("ok", 1), ("ok", 2)]

    def group(row: Any) -> str:
        return row[0]

    with processes(processes=1, group=group) as stream:
        found = results(stream, rows)
    lost = [result for (name, _), result in found if name == "die"]
    assert all(isinstance(one, LostError) for one in lost)
    assert all(
        "the process died (ended by signal 9), three times" in f"{one}" for one in lost
    )
    assert sorted(value for (name, _), value in found if name == "ok") == [1, 2]
    assert Path(log).read_text().count("died") == 3


def test_a_row_that_hangs_is_ended_and_told() -> None:
    with processes(timeout=lambda row: 0.5 if row[0] == "sleep" else 60) as stream:
        found = dict(results(stream, [("sleep", 600), ("ok", 3)]))
    assert "no answer for 0.5 s" in f"{found['sleep', 600]}"
    assert found["ok", 3] == 3


def test_processes_that_die_whatever_they_are_given_end_it(tmp_path: Path) -> None:
    rows = [("die", str(tmp_path / f"{number}")) for number in range(30)]
    with processes(group=lambda row: row[1]) as stream:
        with pytest.raises(MedrayError, match="one after the other"):
            results(stream, rows)
    assert len([*tmp_path.iterdir()]) < 30


def test_what_the_function_raises_is_raised_after_what_is_done() -> None:
    with processes(processes=1) as stream:
        stream.give([("ok", 1), ("divide", 0)])
        found = []
        while not found:
            found = stream.take()
        with pytest.raises(ZeroDivisionError):
            results(stream, [])
    assert found == [(("ok", 1), 1)]


def test_a_row_that_cannot_be_sent_is_no_hang() -> None:
    with processes() as stream, pytest.raises((AttributeError, TypeError)):
        results(stream, [("ok", lambda: None)])


def test_what_has_not_begun_can_be_taken_back() -> None:
    with processes(processes=1) as stream:
        stream.give([("sleep", 1)])
        time.sleep(0.5)  # it is at hand
        stream.give([("ok", number) for number in range(5)])
        assert stream.withdraw() == [("ok", number) for number in range(5)]
        assert [row for row, _ in results(stream, [])] == [("sleep", 1)]


def test_when_the_command_is_killed_its_processes_go() -> None:
    code = (
        "from medray.execution.processes import Processes\n"
        "import time\n"
        "with Processes(time.sleep, timeout=lambda _: 600, processes=2) as stream:\n"
        "    stream.give([600, 600])\n"
        "    print('given', flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "given\n"
        children: list[psutil.Process] = []
        while len(children) < 2:
            children = psutil.Process(parent.pid).children()
        parent.kill()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


# --- which executor -------------------------------------------------------------------


@pytest.fixture
def slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file; other tests of this process may have joined a Ray."""
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    path = tmp_path / "slide.tif"
    path.write_bytes(b"1" * 1000)
    return path


def test_little_work_without_a_cluster_goes_without_ray(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    gone = str(tmp_path / "gone.tif")
    folder = tmp_path / "slide.zarr"
    folder.mkdir()
    (folder / "c").write_bytes(b"1" * 1000)
    assert settle_executor("auto", [str(slide), gone, str(folder)]) == "processes"
    assert settle_executor("auto", []) == "processes"


@pytest.mark.parametrize("executor", ["ray", "processes", "local"])
def test_what_is_asked_for_is_done(executor: Any, slide: Path) -> None:
    assert settle_executor(executor, [str(slide)]) == executor


def test_much_work_goes_to_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    large = tmp_path / "large.mrxs"
    large.write_bytes(b"")
    folder = tmp_path / "large"
    folder.mkdir()
    with (folder / "Data0000.dat").open("wb") as file:
        file.truncate((256 << 20) + 1)
    assert settle_executor("auto", [str(large)]) == "ray"


def test_where_a_cluster_is_named_it_is_taken(
    slide: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert settle_executor("auto", [str(slide)]) == "ray"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert settle_executor("auto", [str(slide)]) == "processes"
