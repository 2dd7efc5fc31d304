"""Rows through Ray Data: all results come, whoever dies, and each row answers for itself."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from medray.errors import LostError, MedrayError, SlideError
from medray.execution.stream import Stream

# The workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.usefixtures("cluster")


class Work:
    """Notes in a folder which process begins a row, then does what the row says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, row: dict) -> Any:
        with (self.folder / f"{row['i']}").open("a") as log:
            log.write(f"{os.getpid()}\n")
        time.sleep(row.get("seconds", 0))
        match row.get("does"):
            case None:
                return 2 * row["i"]
            case "waits":
                return waits(row)
            case "hangs with the lock":  # as a loop in native code does
                ctypes.PyDLL(None).sleep(600)
            case "bloats":
                return len(bytearray(8 << 30))
            case "fails":
                raise SlideError("told to")
            case "is wrong":
                raise ZeroDivisionError("told to")
            case "cannot be sent":
                return threading.Lock()
            case "is killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfaults":
                ctypes.string_at(0)
            case "aborts":
                os.abort()
        return None


def waits(row: dict) -> Iterator[None]:
    for _ in range(6):
        time.sleep(0.7)
        yield
    return 2 * row["i"]


def stream(folder: Path, seconds: float = 60.0, num_cpus: float = 1.0) -> Stream:
    return Stream(
        Work(folder),
        num_cpus=num_cpus,
        timeout=lambda _: seconds,
        bounded=True,
        expected=1,
        group=lambda row: row.get("group", ""),
    )


def run(stream: Stream, rows: list[dict]) -> dict[int, Any]:
    """Submit all rows in one block; return all results, each once."""
    stream.give(rows)
    found: list[tuple[int, Any]] = []
    while stream.busy:
        found += [(row["i"], result) for row, result in stream.take()]
    assert len(found) == len(dict(found))
    return dict(found)


def rows(count: int, **special: dict) -> list[dict]:
    """So many rows, of which some (`_3={...}`) are special."""
    return [{"i": i} | special.get(f"_{i}", {}) for i in range(count)]


def begun(folder: Path, i: int) -> list[str]:
    """The processes that have begun a row."""
    return (folder / f"{i}").read_text().split()


def test_rows_that_end_their_process_are_lost_alone(tmp_path: Path) -> None:
    """Rows of the same block that ended no process are not lost."""
    bad = {
        "_1": {"does": "is killed"},
        "_4": {"does": "segfaults"},
        "_6": {"seconds": 600},
        "_8": {"does": "hangs with the lock"},
    }
    with stream(tmp_path, seconds=2) as work:
        found = run(work, rows(10, **bad))
    lost = {i: f"{found.pop(i)}" for i in (1, 4, 6, 8)}
    assert found == {i: 2 * i for i in (0, 2, 3, 5, 7, 9)}
    assert lost == {
        1: "the process died (it was killed, as when a node's memory runs short), "
        "three times",
        4: "the process died (Segmentation fault), three times",
        6: "no answer for 2 s, three times",
        8: "no answer for 2 s, three times",
    }
    assert [len(begun(tmp_path, i)) for i in (1, 4, 6, 8)] == [3, 3, 3, 3]


def test_a_row_that_is_given_up_ends_its_group(tmp_path: Path) -> None:
    """Not each region of a slide costs three processes."""
    bad = {"does": "is killed", "group": "bad"}
    with stream(tmp_path) as work:
        found = run(work, rows(12, **{f"_{i}": bad for i in range(8)}))
    assert {i: found[i] for i in range(8, 12)} == {i: 2 * i for i in range(8, 12)}
    assert all(isinstance(found[i], LostError) for i in range(8))
    begins = [
        p for i in range(8) if (tmp_path / f"{i}").exists() for p in begun(tmp_path, i)
    ]
    # Those of two places may be at hand at the same time.
    assert 3 <= len(begins) <= 6


def test_errors_and_want_of_memory_are_results(tmp_path: Path) -> None:
    with stream(tmp_path, num_cpus=2) as work:
        found = run(work, rows(4, _1={"does": "fails"}, _2={"does": "bloats"}))
    assert isinstance(found[1], SlideError)
    assert isinstance(found[2], SlideError)
    assert "memory" in f"{found[2]}"
    assert (found[0], found[3]) == (0, 6)
    assert len(set(begun(tmp_path, 0) + begun(tmp_path, 3))) == 1


@pytest.mark.parametrize("does", ["is wrong", "cannot be sent"])
def test_a_bug_is_raised_and_ends_the_rest_at_once(tmp_path: Path, does: str) -> None:
    wrong = {"does": does, "seconds": 3}
    with stream(tmp_path, seconds=600) as work:
        with pytest.raises((ZeroDivisionError, TypeError), match="told to|pickle"):
            # In this order: the second may wait at the first one's process.
            run(work, [{"i": 1} | wrong, {"i": 0, "seconds": 500}])
        began = time.monotonic()
    (pid,) = begun(tmp_path, 0)
    while psutil.pid_exists(int(pid)):
        assert time.monotonic() - began < 10
        time.sleep(0.1)


def test_who_yields_is_not_taken_to_hang(tmp_path: Path) -> None:
    with stream(tmp_path, seconds=2, num_cpus=2) as work:
        assert run(work, rows(2, _0={"does": "waits"})) == {0: 0, 1: 2}
    assert len(begun(tmp_path, 0)) == 1


def test_processes_that_always_die_end_the_run(tmp_path: Path) -> None:
    dies = {"does": "is killed"}
    with pytest.raises(MedrayError, match="died one after the other"):
        with stream(tmp_path) as work:
            run(work, [{"i": i} | dies for i in range(20)])


def test_what_is_under_way_is_bounded_and_given_as_it_is_known(tmp_path: Path) -> None:
    """Each result brings the next row; many tiny ones."""
    todo, found, most = list(range(2000)), [], 0
    with stream(tmp_path) as work:
        work.give([{"i": todo.pop()}])
        while work.busy:
            for _, result in work.take():
                found.append(result)
                while todo and work.room > 0:
                    work.give([{"i": todo.pop()}])
            most = max(most, len(work._rows))
    assert sorted(found) == [2 * i for i in range(2000)]
    # Of two places, each with three blocks under way and four to come, of 64 rows.
    assert most <= 2 * 7 * 64


def test_a_chain_of_single_rows(tmp_path: Path) -> None:
    with stream(tmp_path) as work:
        for i in range(5):
            assert run(work, [{"i": i}]) == {i: 2 * i}


def test_after_stop_only_what_is_at_hand_is_done(tmp_path: Path) -> None:
    with stream(tmp_path, num_cpus=2) as work:
        work.give([{"i": i, "seconds": 2} for i in range(50)])
        while not (tmp_path / "0").exists():
            time.sleep(0.1)
        began, found = time.monotonic(), []
        work.stop()
        while work.busy:
            found += work.take()
        # What it had begun, in whatever order the blocks came to it.
        started = [row["i"] for row, _ in found]
        assert started
        assert len(started) <= 2
        assert sorted(started) == [i for i in range(50) if (tmp_path / f"{i}").exists()]
        assert time.monotonic() - began < 6


def test_a_source_that_dies_reads_on(tmp_path: Path) -> None:
    with stream(tmp_path) as work:
        assert run(work, rows(30)) == {i: 2 * i for i in range(30)}
        readers = [
            process
            for process in psutil.process_iter(["cmdline"])
            if "ray::ReadSource" in f"{process.info['cmdline']}"
        ]
        assert readers
        for reader in readers:
            reader.kill()
        assert run(work, rows(30)) == {i: 2 * i for i in range(30)}


def test_a_lost_process_is_not_waited_for(tmp_path: Path) -> None:
    """A row is lost, with the reason, also where it is the only one."""
    dies = {"does": "aborts"}
    with stream(tmp_path, num_cpus=2) as work:
        found = run(work, [{"i": 0} | dies])
    assert isinstance(found[0], LostError)
    assert "Aborted" in f"{found[0]}"
