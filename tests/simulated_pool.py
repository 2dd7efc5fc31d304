"""A simulated cluster for the rules of a pool: nodes, actors, rows that kill or hang."""

from collections import Counter, deque
from dataclasses import dataclass, field

from medray.errors import LostError
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
    """A call as its actor sees it: rows to be done, answers that were not received."""

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
        self.told: set[str] = set()  # leaving nodes that the state has been given
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
        """Hand an event to the state, and do what it decides."""
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
        """Let time pass, in which calls that can end do, and every death is reported."""
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
