"""Which row is given up: the one at hand when three processes ended, and no other."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from medray.execution.tries import _TRIES, Tries, how_it_ended

ROWS, NODES = range(4), ("n1", "n2", "n3")

# A row is begun on a node, and then done, or its process ends (it is begun again).
steps = st.lists(
    st.tuples(
        st.sampled_from(ROWS), st.sampled_from(NODES), st.sampled_from(["done", "dies"])
    ),
    max_size=80,
)


def begin(
    tries: Tries, row: int, node: str = "n1", gone: frozenset = frozenset(), **how
):
    verdict = tries.begin(
        row, node=node, timeout=5.0, is_gone=gone.__contains__, **({"now": 0.0} | how)
    )
    return verdict.why or ("" if verdict.kind == "go" else verdict.kind)


@given(steps, st.frozensets(st.sampled_from(NODES)))
def test_a_row_is_given_up_when_three_processes_ended_that_had_it(
    steps: list, gone: frozenset
) -> None:
    """Deaths with their node do not count, and what is done starts again."""
    tries = Tries()
    ended: dict = {row: [] for row in ROWS}  # the nodes of its processes
    at_hand: dict = {}
    for row, node, what in steps:
        if row in at_hand:
            ended[row].append(at_hand.pop(row))
        lost = [one for one in ended[row] if one not in gone]
        up = len(lost) >= 3 or len(ended[row]) >= 20
        assert bool(begin(tries, row, node, gone)) == up
        if up:
            continue
        if what == "dies":
            at_hand[row] = node
        else:
            tries.end(row)
            ended[row].clear()


def test_a_row_that_is_given_up_takes_its_group_along() -> None:
    tries = Tries()
    assert begin(tries, 7, group="bad") == ""  # at hand elsewhere
    for _ in range(3):
        assert begin(tries, 1, group="bad") == ""
    assert begin(tries, 1, group="bad") == "the process died, three times"
    assert begin(tries, 2, group="bad") == "the process died, three times"
    assert begin(tries, 3, group="good") == ""
    assert begin(tries, 4) == ""


def test_of_a_group_that_kills_one_row_is_tried_at_a_time_until_one_is_done() -> None:
    tries = Tries()
    for row in range(20):  # on twenty processes, which all die
        assert begin(tries, row, group="bad") == ""
    assert begin(tries, 5, group="bad") == "wait"
    assert begin(tries, 5, group="bad") == "wait"
    assert begin(tries, 40, group="bad") == "wait"
    assert begin(tries, 6, group="good") == ""
    assert begin(tries, 0, group="bad") == ""
    assert not tries.hopeless
    tries.end(0)
    assert begin(tries, 5, group="bad") == ""
    assert begin(tries, 40, group="bad") == ""


@given(st.integers(1, 30), st.integers(1, 60), st.randoms())
def test_a_group_that_kills_costs_few_processes(
    places: int, rows: int, random: Any
) -> None:
    """However many processes there are: each has one of its rows, and few a second."""
    tries, waiting, at_hand, deaths = Tries(), list(range(rows)), [], 0
    while waiting:
        # A process whose block waits for another tries the next row.
        row = waiting.pop(0) if len(at_hand) < places else at_hand.pop(0)
        if random.random() < 0.3 and at_hand:
            waiting.insert(0, row)
            row = at_hand.pop(random.randrange(len(at_hand)))
        kind = begin(tries, row, group="bad")
        if kind == "":
            deaths += 1
            at_hand.append(row)
        elif kind == "wait":
            waiting.append(row)
        else:
            break
    assert deaths <= places + 2 * _TRIES
    assert not tries.hopeless


@given(st.integers(0, 30), st.booleans())
def test_deaths_without_a_result_between_them_are_no_rows_fault(
    deaths: int, with_node: bool
) -> None:
    tries = Tries()
    gone = frozenset({"n1"}) if with_node else frozenset()
    for row in range(deaths):
        for _ in range(2):
            begin(tries, row, gone=gone)
    assert tries.hopeless == (deaths >= 10 and not with_node)


def test_a_result_between_them_starts_the_count_of_deaths_anew() -> None:
    tries = Tries()
    for row in range(30):
        for _ in range(2):
            begin(tries, row)
        if row % 5 == 0:
            tries.end(row)
        assert not tries.hopeless


def test_rows_that_are_given_up_count_as_one_death() -> None:
    tries = Tries()
    for row in range(9):
        for _ in range(4):
            begin(tries, row)
        assert not tries.hopeless


def test_rows_that_kill_at_the_same_time_cost_themselves() -> None:
    """On however many processes: of each only its first death counts."""
    tries = Tries()
    rows = range(9)
    for _ in range(3):
        assert [begin(tries, row) for row in rows] == [""] * 9
        assert not tries.hopeless
    assert all(begin(tries, row) for row in rows)
    assert not tries.hopeless


def test_what_has_arrived_is_forgotten() -> None:
    tries = Tries()
    for row in range(100):
        for _ in range(4):
            begin(tries, row)
        tries.forget(row)
        tries.end(row)
    assert not (tries._at_hand)
    assert not (tries._lost_on)
    assert not (tries._given_up)


def test_how_it_ended_is_read_from_the_trace_or_from_the_clock() -> None:
    hang = 'Timeout (0:00:30)!\nThread 0x7f (most recent call first):\n  File "x"\n'
    assert how_it_ended(hang, 30.0) == "no answer for 30 s"
    fault = "Fatal Python error: Segmentation fault\n\nCurrent thread 0x7f\n"
    assert how_it_ended(fault, 30.0) == "the process died (Segmentation fault)"
    assert how_it_ended(None, 30.0) == "the process died"
    assert "it was killed" in how_it_ended("", 30.0)
    # On another node there is no trace of it.
    for node, how in (("n2", "no answer for 5 s"), ("n1", "the process died")):
        tries = Tries()
        for number in range(3):
            begin(tries, 1, now=10.0 * number)
        assert begin(tries, 1, node=node, now=30.0) == f"{how}, three times"


def test_who_goes_on_does_not_hang() -> None:
    tries = Tries()
    for number in range(3):
        begin(tries, 1, node=f"n{number}", now=10.0 * number)
        tries.goes_on(1, now=10.0 * number + 8.0)
    assert begin(tries, 1, node="n9", now=30.0) == "the process died, three times"
