"""When one more process, or machine, is asked for: by the work that waits."""

from hypothesis import given
from hypothesis import strategies as st

from medray.execution.backlog import is_worth_another

COUNTS = st.integers(0, 10_000)
SECONDS = st.floats(0, 1e5)


def test_machines_come_for_hours_of_work_and_not_for_minutes() -> None:
    # A machine takes 300 s to come; the one that is there did 600 regions in 60 s.
    def wanted(waiting: float, machines: int = 1) -> bool:
        return is_worth_another(waiting, 600, 60.0, machines, 300.0)

    assert not wanted(4)  # four fields
    assert not wanted(2_900)
    assert wanted(3_100)
    assert not wanted(3_100, machines=2)  # it is on its way
    machines = 1
    while wanted(40_000, machines):
        machines += 1
    assert machines == 14  # 40,000 regions take 14 machines 286 s


def test_nothing_is_known_before_the_first_has_come_and_done_something() -> None:
    assert not is_worth_another(1e9, 15, 60.0, 1, 300.0)
    assert not is_worth_another(1e9, 16, 60.0, 1, 0.0)
    assert is_worth_another(1e9, 16, 60.0, 1, 300.0)


@given(
    waiting=COUNTS,
    more=COUNTS,
    done=COUNTS,
    there=SECONDS,
    processes=st.integers(1, 100),
    start=SECONDS,
)
def test_more_work_never_asks_for_less_and_more_machines_never_for_more(
    waiting: int, more: int, done: int, there: float, processes: int, start: float
) -> None:
    now = is_worth_another(waiting, done, there, processes, start)
    assert is_worth_another(waiting + more, done, there, processes, start) >= now
    assert is_worth_another(waiting, done, there, processes + 1, start) <= now
