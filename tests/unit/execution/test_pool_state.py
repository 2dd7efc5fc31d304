"""The rules of a pool on a simulated cluster: whoever dies, each row ends as it should.

A state machine gives rows, some of which kill or hang, lets nodes come, leave and die in
any order, and lets every answer be late. Real deaths are in
tests/cluster/execution/test_pool.py and tests/kill/execution/.
"""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from simulated_pool import INNOCENT, POISON, TIMEOUT, World, check, check_results

from medray.errors import LostError, MedrayError
from medray.execution.pool_state import Answered, Ended, Grow


class History(RuleBasedStateMachine):
    """Anything that may happen to a pool, in any order."""

    @initialize(
        actors=st.integers(1, 3), more=st.integers(0, 2), calls=st.integers(1, 2)
    )
    def start(self, actors: int, more: int, calls: int) -> None:
        self.world = World(actors, actors + more, calls)
        self.poison = 6  # rows that may be given; more could end the run
        self.strikes = 1  # processes that may be killed from outside

    @rule(kinds=st.lists(st.sampled_from(INNOCENT + POISON), min_size=1, max_size=4))
    def give(self, kinds: list[str]) -> None:
        for i, kind in enumerate(kinds):
            if kind in POISON:
                self.poison -= 1
                if self.poison < 0:
                    kinds[i] = "good"
        self.world.give(kinds)

    @rule()
    def grow(self) -> None:
        self.world.wanted = min(self.world.wanted + 1, self.world.most)
        self.world.happen(Grow())

    @precondition(lambda self: self.world.starting())
    @rule(pick=st.integers(0, 9), times=st.integers(1, 2))
    def actor_starts(self, pick: int, times: int) -> None:
        number = picked(self.world.starting(), pick)
        for _ in range(times):
            if number in self.world.starting():
                self.world.starts(number)

    @precondition(lambda self: self.world.working())
    @rule(pick=st.integers(0, 9))
    def row_is_done(self, pick: int) -> None:
        self.world.work(picked(self.world.working(), pick))

    @precondition(lambda self: self.world.heard())
    @rule(pick=st.integers(0, 9))
    def something_is_heard(self, pick: int) -> None:
        self.world.hear(picked(self.world.heard(), pick))

    @rule(seconds=st.floats(1, TIMEOUT / 2))
    def time_passes(self, seconds: float) -> None:
        self.world.look(seconds)

    @precondition(lambda self: self.strikes and self.world.actors)
    @rule(pick=st.integers(0, 9))
    def process_is_killed(self, pick: int) -> None:
        self.strikes = 0
        self.world.dies(picked([*self.world.actors], pick), "killed from outside")

    @precondition(lambda self: len(self.world.nodes) < 30)
    @rule()
    def node_comes(self) -> None:
        self.world.nodes[f"n{len(self.world.nodes)}"] = "alive"

    @precondition(lambda self: len(self.world.alive()) > 1)
    @rule(pick=st.integers(0, 9))
    def node_is_told_to_go(self, pick: int) -> None:
        self.world.nodes[picked(self.world.alive(), pick)] = "leaving"

    @precondition(lambda self: len(self.world.alive()) > 1)
    @rule(pick=st.integers(0, 9))
    def node_dies(self, pick: int) -> None:
        self.world.node_dies(picked(self.world.alive(), pick))

    @precondition(lambda self: "leaving" in self.world.nodes.values())
    @rule(pick=st.integers(0, 9))
    def leaving_node_dies(self, pick: int) -> None:
        leaving = [n for n, how in self.world.nodes.items() if how == "leaving"]
        self.world.node_dies(picked(leaving, pick))

    @invariant()
    def holds(self) -> None:
        check(self.world)

    def teardown(self) -> None:
        self.world.run()
        check(self.world)
        check_results(self.world)


def picked[T](things: list[T], pick: int) -> T:
    return things[pick % len(things)]


def test_whatever_happens_each_row_ends_as_it_should() -> None:
    run_state_machine_as_test(
        History,
        settings=settings(
            max_examples=200,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize="CI" in os.environ,
        ),
    )


@given(
    actors=st.integers(1, 12),
    calls=st.integers(1, 2),
    batch=st.sampled_from([1, 4, 16]),
)
def test_actors_that_die_whatever_they_are_given_end_the_run(
    actors: int, calls: int, batch: int
) -> None:
    world = World(actors, calls=calls)
    for _ in range(20 * calls):
        world.give(["kills"] * batch)
    with pytest.raises(MedrayError, match="processes died one after the other"):
        world.run()
    deaths = sum(map(len, world.killed.values()))
    assert 10 <= deaths <= 100 + actors * calls
    assert all(isinstance(result, LostError) for result in world.results.values())


@pytest.mark.parametrize("actors", [1, 4, 9, 20])
def test_rows_that_kill_cost_themselves_on_any_number_of_actors(actors: int) -> None:
    world = World(actors)
    for _ in range(9):
        world.give(["kills"])
    world.run()
    check_results(world)


def test_deaths_with_results_between_them_end_nothing() -> None:
    world = World()
    for _ in range(40):
        world.give(["kills"])
        world.give(["good"])
        world.run()
    check_results(world)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_node_that_dies_with_its_actors_ends_nothing(steps: int) -> None:
    """They start, or have rows."""
    world = World(20, nodes=1)
    for _ in range(20):
        world.give(["good"])
    for number in steps * world.starting():
        world.starts(number)
    assert len(world.calls) == (20 if steps == 2 else 0)
    world.nodes["n1"] = "alive"
    world.node_dies("n0")
    world.run()
    check_results(world)


@pytest.mark.parametrize("lost", [10, 19, 20])
def test_nodes_that_die_speak_against_no_row_within_reason(lost: int) -> None:
    world = World(nodes=1)
    world.give(["good"])
    for i in range(lost):
        while not world.calls:
            world.starts(world.starting()[0])
        world.nodes[f"n{i + 1}"] = "alive"
        world.node_dies(f"n{i}")
        world.hear(next(iter(world.calls)))
    world.run()
    if lost < 20:
        check_results(world)
    else:
        assert f"{world.results[0]}" == "node died, 20 times"


def test_an_actor_that_hangs_is_killed_after_the_timeout_and_gets_nothing_more() -> (
    None
):
    world = World(calls=2)
    world.give(["hangs"])
    for _ in range(2):
        world.starts(0)
    world.look(TIMEOUT)
    assert world.actors[0].calls  # it is not late yet
    world.look(1)
    assert not world.actors
    world.give(["good"])
    assert len(world.calls) == 1
    world.run()
    check_results(world)


def test_an_actor_that_starts_on_a_node_that_leaves_is_given_nothing() -> None:
    world = World(nodes=1)
    world.give(["good"])
    world.starts(0)
    world.nodes = {"n0": "leaving", "n1": "alive"}
    world.look(1)
    world.starts(0)
    assert not world.calls
    world.run()
    check_results(world)


def test_the_least_busy_actor_is_called() -> None:
    world = World(3, calls=2)
    for number in 2 * world.starting():
        world.starts(number)
    for calls in range(1, 7):
        world.give(["good"])
        busy = [len(actor.calls) for actor in world.actors.values()]
        assert (sum(busy), max(busy) - min(busy)) == (calls, calls % 3 != 0)


def test_it_is_said_once_a_while_that_no_actor_starts() -> None:
    world = World()
    for minutes in range(1, 4):
        world.look(61)
        assert world.warnings == minutes
        world.look(30)
        assert world.warnings == minutes


def test_rows_that_are_left_out_are_an_error() -> None:
    world = World()
    world.give(["good", "good"])
    for _ in range(2):
        world.starts(0)
    (call,) = world.calls
    world.state.decide(Answered(call, ("did",)), 0.0)
    with pytest.raises(MedrayError, match="without a result for 1 rows"):
        world.state.decide(Ended(call), 0.0)


def test_how_long_actors_took_to_come_and_were_there() -> None:
    world = World(2, calls=3)
    assert (world.state.room, world.state.start_s, world.state.there_s) == (0, 0, 0)
    world.now = 30
    for _ in range(2):
        world.starts(0)
    world.look(10)
    assert (world.state.room, world.state.start_s) == (3, 30)
    world.now = 100
    for _ in range(2):
        world.starts(1)
    world.look(10)
    assert (world.state.room, world.state.start_s) == (6, 100)
    there_s = world.state.there_s
    world.look(10)
    assert world.state.there_s == there_s + 2 * 10
    world.give(["good"])
    world.give(["good"])
    assert (world.state.room, world.state.busy) == (4, True)
