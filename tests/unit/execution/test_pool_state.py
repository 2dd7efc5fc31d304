"""The rules of a pool on a simulated cluster: whoever dies, each row ends as it should.

A state machine gives rows, some of which kill or hang, lets nodes come, leave and die in
any order, and lets every answer be late. Real deaths are in
tests/cluster/execution/test_pool.py and tests/kill/execution/.
"""

import os
from collections import Counter, deque
from dataclasses import dataclass, field

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

from medray.errors import LostError, MedrayError
from medray.execution.pool_state import (
    Answered,
    Call,
    Dismiss,
    Ended,
    Finish,
    Give,
    Grow,
    Kill,
    Looked,
    Lost,
    NotStarted,
    PoolState,
    Start,
    Started,
    WarnStuck,
)
from medray.execution.tasks import HandedBack

TIMEOUT = 100.0
# What a row does to its actor; of two words the first is for the first two times.
INNOCENT = ("good", "slow good", "back good")
POISON = ("kills", "hangs", "slow hangs", "back kills")


@dataclass
class Actor:
    node: str = ""  # that it runs or starts on; none: it waits for one
    there: bool = False
    why: str = ""  # it died
    calls: list[int] = field(default_factory=list)


@dataclass
class Work:
    """A call as its actor sees it: rows to be done, answers that nobody has heard."""

    actor: int
    node: str
    rows: list[int]
    todo: deque[int]
    said: deque[tuple] = field(default_factory=deque)
    stuck: bool = False


class World:
    """Nodes, actors and rows; does what a state decides, and checks that it may be."""

    def __init__(self, actors: int = 1, most: int = 0, calls: int = 1, nodes: int = 2):
        self.now = 0.0
        self.most, self.limit, self.wanted = max(actors, most), calls, actors
        self.state = PoolState("work", self.most, calls, lambda _: TIMEOUT, 0.0)
        self.nodes = {f"n{i}": "alive" for i in range(nodes)}
        self.told: set[str] = set()  # leaving nodes that the state has been told of
        self.actors: dict[int, Actor] = {}
        self.calls: dict[int, Work] = {}
        self.kinds: dict[int, str] = {}  # of rows
        self.times: Counter[int] = (
            Counter()
        )  # that a row was answered by none or nothing
        self.results: dict[int, object] = {}
        self.lost_on: dict[int, list[str]] = {}  # nodes of actors that died with a row
        self.killed: dict[int, list[str]] = {}  # by each row: nodes of actors
        self.struck: set[int] = (
            set()
        )  # rows that an actor had which was killed from outside
        self.warnings = 0
        for _ in range(actors):
            self.happen(Grow())

    def happen(self, event: object) -> None:
        """Tell the state, and do what it decides."""
        for decision in self.state.decide(event, self.now):
            match decision:
                case Start(actor):
                    assert actor not in self.actors
                    self.actors[actor] = Actor()
                case Call(call, number, rows):
                    self.call(call, self.actors[number], number, rows)
                case Kill(actor):
                    killed = self.actors[actor]
                    assert killed.why or any(self.calls[c].stuck for c in killed.calls)
                    self.dies(actor, "killed by the pool")
                    del self.actors[actor]
                case Dismiss(actor):
                    assert not self.actors.pop(actor).calls
                case Finish(row, result):
                    assert row not in self.results
                    if isinstance(result, LostError):
                        live = [
                            n for n in self.lost_on[row] if self.nodes[n] == "alive"
                        ]
                        assert len(live) == 3 or len(self.lost_on[row]) == 20
                    self.results[row] = result
                case WarnStuck():
                    self.warnings += 1

    def call(self, call: int, actor: Actor, number: int, rows: tuple[int, ...]) -> None:
        assert actor.there
        assert actor.node not in self.told
        assert len(actor.calls) < self.limit
        busy_with = [row for c in actor.calls for row in self.calls[c].rows]
        if self.lost_on.keys() & {*rows, *busy_with}:
            assert (len(rows), busy_with) == (1, [])
        actor.calls.append(call)
        self.calls[call] = Work(number, actor.node, list(rows), deque(rows))

    def give(self, kinds: list[str]) -> None:
        first = len(self.kinds)
        rows = tuple(range(first, first + len(kinds)))
        self.kinds.update(zip(rows, kinds, strict=True))
        self.happen(Give(rows))

    def alive(self) -> list[str]:
        return [node for node, how in self.nodes.items() if how == "alive"]

    def gone(self, nodes: frozenset[str]) -> frozenset[str]:
        return frozenset(node for node in nodes if self.nodes[node] != "alive")

    def dies(self, number: int, why: str) -> None:
        actor = self.actors[number]
        actor.why = actor.why or why

    def node_dies(self, node: str) -> None:
        self.nodes[node] = "dead"
        for number, actor in self.actors.items():
            if actor.node == node:
                self.dies(number, "node died")

    def starts(self, number: int) -> None:
        """Go on with a start: a node is found; the actor is there, or died before."""
        actor = self.actors[number]
        if not actor.node:
            actor.node = self.alive()[number % len(self.alive())]
        elif actor.why:
            with_node = self.nodes[actor.node] != "alive"
            self.happen(NotStarted(number, actor.why, with_node))
        else:
            actor.there = True
            self.happen(Started(number, actor.node))

    def starting(self) -> list[int]:
        return [n for n, actor in self.actors.items() if not actor.there]

    def working(self) -> list[int]:
        """Calls of which a row can be done now."""
        return [
            c for c, work in self.calls.items() if work.todo and self.can_work(work)
        ]

    def can_work(self, work: Work) -> bool:
        actor = self.actors.get(work.actor)
        return actor is not None and not actor.why and not work.stuck

    def work(self, call: int) -> None:
        """Do the next row of a call; what comes of it waits to be heard."""
        work = self.calls[call]
        row = work.todo[0]
        first, kind = self.kinds[row].split()[0], self.kinds[row].split()[-1]
        if first in ("slow", "back") and self.times[row] < 2:
            self.times[row] += 1
            work.said.append(() if first == "slow" else (HandedBack(),))
            if first == "back":
                work.todo.popleft()
        elif kind == "hangs":
            work.stuck = True
        elif kind == "kills":
            node = self.actors[work.actor].node
            self.killed.setdefault(row, []).append(node)
            live = [n for n in self.killed[row] if self.nodes[n] == "alive"]
            assert len(live) <= 3
            self.dies(work.actor, "killed by its row")
        else:
            work.said.append((("did", row),))
            work.todo.popleft()

    def heard(self) -> list[int]:
        """Calls of which there is something to hear: an answer, the end, a death."""
        return [
            call
            for call, work in self.calls.items()
            if work.said or not work.todo or self.is_dead(work)
        ]

    def is_dead(self, work: Work) -> bool:
        actor = self.actors.get(work.actor)
        return actor is None or bool(actor.why)

    def hear(self, call: int) -> None:
        work = self.calls[call]
        if work.said:
            results = work.said.popleft()
            del work.rows[: len(results)]
            self.happen(Answered(call, results))
            return
        del self.calls[call]
        actor = self.actors.get(work.actor)
        if actor is not None:
            actor.calls.remove(call)
        if work.todo or self.is_dead(work):
            for row in work.rows:
                self.lost_on.setdefault(row, []).append(work.node)
            if actor is not None and "outside" in actor.why:
                self.struck.update(work.rows)
            why = actor.why if actor is not None else "killed by the pool"
            self.happen(Lost(call, why, self.gone(self.state.nodes_of(call))))
            assert work.actor not in self.actors  # it may only have been out of reach
        else:
            self.happen(Ended(call))

    def look(self, seconds: float) -> None:
        """Let time pass, in which whoever can answer does, and every death is told."""
        for call in self.working():
            if self.can_work(self.calls[call]):
                self.work(call)
        heard = self.heard()
        while heard:
            self.hear(heard[0])
            heard = [call for call in self.heard() if call in heard]
        self.now += seconds
        self.told = {node for node, how in self.nodes.items() if how == "leaving"}
        self.happen(Looked(frozenset(self.told)))

    def run(self) -> None:
        """Let everything take its course until no row is left."""
        rounds = 0
        while self.state.busy:
            for number in self.starting():
                self.starts(number)
            self.look(TIMEOUT / 2)
            rounds += 1
            assert rounds < 100 + 30 * len(self.kinds), "no progress"


def check(world: World) -> None:
    """What holds at any time."""
    assert world.state.size == world.wanted
    alive = [actor for actor in world.actors.values() if not actor.why]
    staying = [actor for actor in alive if actor.node not in world.told]
    assert len(staying) <= world.most
    for actor in alive:
        assert actor in staying or actor.calls or not actor.there
    left = world.kinds.keys() - world.results.keys()
    assert world.state.busy == bool(left or world.calls)
    if left:
        assert world.calls or world.starting(), "nothing is awaited"


def check_results(world: World) -> None:
    """What each row has come to in the end."""
    assert world.results.keys() == world.kinds.keys()
    for row, kind in world.kinds.items():
        result = world.results[row]
        if kind in INNOCENT:
            assert result == ("did", row)
            continue
        assert isinstance(result, LostError)
        if row not in world.struck:
            why = "no answer for 100 s" if "hangs" in kind else "killed by its row"
            assert f"{result}" == f"{why}, three times"


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
