"""Pools of actors on Ray: all results come, whoever dies.

Which row is done again, given up or blamed: tests/unit/execution/test_pool_state.py.
"""

import functools
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from medray.errors import LostError, MedrayError
from medray.execution.actor_pool import Pool, poll

# The workers cannot import this file.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = pytest.mark.usefixtures("cluster")


class Worker:
    def __init__(self, folder: str, seconds: float = 0.0) -> None:
        self.folder, self.seconds = Path(folder), seconds

    def work(self, rows):
        for row in rows:
            with (self.folder / f"{row['i']}").open("a") as log:
                log.write(f"{os.getpid()}\n")
            if row.get("raises"):
                raise MedrayError("told to")
            for _ in range(12 if row.get("copies") else 0):
                time.sleep(0.5)
                yield []
            time.sleep(99 if row.get("hangs") else self.seconds)
            yield [2 * row["i"]]

    def pid(self) -> int:
        return os.getpid()


def start(
    folder: Path,
    actors: int,
    *,
    most: int = 0,
    seconds: float = 0.0,
    calls: int = 2,
    timeout: float | None = None,
) -> Pool:
    actor = ray.remote(Worker).options(num_cpus=0, max_concurrency=calls + 1)
    begin = functools.partial(actor.remote, str(folder), seconds)
    allowed = None if timeout is None else lambda _: timeout
    return Pool(begin, "work", actors, most=most, calls=calls, timeout=allowed)


def run(pool: Pool, batches: list) -> list:
    """Submit all batches as there is room; return all results."""
    todo, found = list(batches), []
    while todo or pool.busy:
        while todo and pool.room > 0:
            pool.give(todo.pop(0))
        found += [(row["i"], result) for _, row, result in poll(pool)]
    return found


def batches(count: int, size: int, **kinds: set) -> list:
    rows = [{"i": i} | {k: i in of for k, of in kinds.items()} for i in range(count)]
    return [rows[first : first + size] for first in range(0, count, size)]


def pids(folder: Path, i: int) -> list[str]:
    return (folder / f"{i}").read_text().split()


def test_each_row_has_its_result_and_every_actor_works(tmp_path: Path) -> None:
    with start(tmp_path, 2, most=3, seconds=0.05) as pool:
        pool.grow()
        pool.grow()
        assert (pool.size, pool.start_s) == (3, 0)
        while pool.room < 6:
            poll(pool)
        assert pool.start_s > 0
        found = run(pool, batches(40, 4))
    assert sorted(found) == [(i, 2 * i) for i in range(40)]
    assert len({pids(tmp_path, i)[0] for i in range(40)}) == 3


def test_an_actor_killed_from_outside_is_replaced(tmp_path: Path) -> None:
    with start(tmp_path, 2, seconds=0.1) as pool:
        while not pool.room:
            poll(pool)
        (handle, *_) = pool._handles.values()
        victim = ray.get(handle.pid.remote())
        threading.Timer(1.0, os.kill, (victim, signal.SIGKILL)).start()
        found = run(pool, batches(60, 6))
    assert sorted(found) == [(i, 2 * i) for i in range(60)]
    assert any(str(victim) in pids(tmp_path, i) for i in range(60))


def test_who_says_that_a_row_takes_long_is_not_taken_to_hang(tmp_path: Path) -> None:
    with start(tmp_path, 2, calls=1, timeout=3) as pool:
        found = dict(run(pool, batches(4, 2, copies={1, 2}, hangs={3})))
    assert [found[i] for i in range(3)] == [0, 2, 4]
    assert [len(pids(tmp_path, i)) for i in (1, 2)] == [1, 1]
    assert isinstance(found[3], LostError)


def test_an_error_is_raised_as_it_is(tmp_path: Path) -> None:
    with start(tmp_path, 1) as pool, pytest.raises(MedrayError, match="told to"):
        run(pool, batches(4, 2, raises={3}))


def test_a_cluster_without_a_node_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("medray.execution.pool_state.STUCK_S", 1.0)
    actor = ray.remote(Worker).options(resources={"no such thing": 1})
    begin = functools.partial(actor.remote, str(tmp_path))
    with Pool(begin, "work", 1) as pool:
        pool.give([{"i": 0}])
        # A node that can never take it may yet be joined by one that can.
        end = time.monotonic() + 5
        while time.monotonic() < end:
            assert not list(poll(pool))
        assert "no node has room" in caplog.text
        nodes = [node | {"Alive": False} for node in ray.nodes()]
        monkeypatch.setattr("ray.nodes", lambda: nodes)
        with pytest.raises(MedrayError, match="no node of the Ray cluster is alive"):
            wait_for_ever(pool)


def wait_for_ever(pool: Pool) -> None:
    while True:
        list(poll(pool))
