"""One function over rows: what it returns, raises, and which rows cost a process."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from medray.errors import LostError, SlideError
from medray.execution.rows import map_rows
from medray.types import Executor


def work(row: int) -> Any:
    if row == 3:
        raise SlideError("three is no slide")
    if row == 4:
        raise FileNotFoundError("four")
    if row == 10:
        raise MemoryError
    return None if row % 2 else row * row


def die(row: int) -> int:
    if row == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if row == 5:
        time.sleep(600)
    return row


@pytest.mark.parametrize("executor", ["local", "processes", "ray"])
def test_each_row_comes_back_with_its_result(cluster: None, executor: Executor) -> None:
    found = dict(map_rows(work, range(9), executor=executor))
    errors = {row: found.pop(row) for row in (3, 4)}
    assert isinstance(errors[3], SlideError)
    assert isinstance(errors[4], FileNotFoundError)
    assert found == {0: 0, 1: None, 2: 4, 5: None, 6: 36, 7: None, 8: 64}


@pytest.mark.parametrize("executor", ["local", "processes", "ray"])
def test_no_rows_no_processes(executor: Executor) -> None:
    assert list(map_rows(work, [], executor=executor)) == []


@pytest.mark.parametrize("executor", ["local", "processes", "ray"])
def test_other_errors_end_it(cluster: None, executor: Executor) -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_rows((1).__floordiv__, [1, 0], executor=executor))


@pytest.mark.parametrize("executor", ["local", "processes", "ray"])
def test_want_of_memory_costs_a_row(cluster: None, executor: Executor) -> None:
    found = dict(map_rows(work, [10, 2], executor=executor))
    assert isinstance(found[10], SlideError)
    assert found[2] == 4


def test_check_may_end_it() -> None:
    def check() -> None:
        raise SlideError("enough")

    with pytest.raises(SlideError, match="enough"):
        list(map_rows(work, [1], executor="local", check=check))


@pytest.mark.parametrize("executor", ["processes", "ray"])
def test_a_row_that_kills_or_hangs_is_lost_alone(
    cluster: None, executor: Executor
) -> None:
    found = dict(map_rows(die, range(7), executor=executor, timeout=3))
    assert isinstance(found.pop(2), LostError)
    assert isinstance(found.pop(5), LostError)
    assert found == {row: row for row in (0, 1, 3, 4, 6)}
