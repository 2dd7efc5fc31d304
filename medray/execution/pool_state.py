"""Rules of a pool of actors, without Ray: who works on which row, what a death means.

`PoolState.decide` takes an event (what happened) and returns decisions (what to do).
Actors and calls are numbers; the time and what is known of nodes come with the events.
So `tests/unit/execution/test_pool_state.py` runs the rules on a simulated cluster;
`medray.execution.actor_pool` runs them on Ray. The rules:

- A call takes rows to the least busy actor. The actor answers with a result for each
  row, in their order. `HandedBack` gives a row back: another actor does it. An answer
  without results says that the next row takes long: its time starts again.
- When an actor dies, the rows that it had in hand are suspects. A suspect is done again
  alone, with an actor to itself: a row that kills costs no other row.
- A suspect is given up after `TRIES` deaths on nodes that live on, or `MOST_TRIES` in
  all. A death with its node, or on a draining node, speaks against no row.
- An actor that gives no answer for longer than a row may take is killed. That is a
  death like any other, and the row's error says that it hung.
- An actor whose node is being drained gets nothing more, finishes what it has, and
  another takes its place. So does one for each actor that dies.
- `DEATHS` deaths without a result between them are no row's fault and end the run. Of
  a suspect only the first counts, however many actors die at the same time; but
  `MOST_DEATHS` deaths, with those, end it too.

One file, because the events and decisions are the words of the rules.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from medray.errors import LostError, MedrayError
from medray.execution.tasks import HandedBack

log = logging.getLogger(__name__)

TRIES, MOST_TRIES = 3, 20
DEATHS, MOST_DEATHS = 10, 100
# Seconds without an actor after which a warning is logged.
STUCK_S = 60.0


# Events: what happened.


@dataclass(frozen=True)
class Grow:
    """One more actor is wanted."""


@dataclass(frozen=True)
class Give:
    """Rows are sent to whichever actor can take them next."""

    rows: tuple[Any, ...]


@dataclass(frozen=True)
class Started:
    """An actor is there, on this node."""

    actor: int
    node: str


@dataclass(frozen=True)
class NotStarted:
    """An actor died before it was there, with its node or not."""

    actor: int
    why: str
    with_node: bool


@dataclass(frozen=True)
class Answered:
    """A call returned results for its next rows."""

    call: int
    results: tuple[Any, ...]


@dataclass(frozen=True)
class Ended:
    """A call has returned all its results."""

    call: int


@dataclass(frozen=True)
class Lost:
    """The actor of a call has died; `gone` are those of `nodes_of(call)` that went."""

    call: int
    why: str
    gone: frozenset[str]


@dataclass(frozen=True)
class Looked:
    """Some time has passed; these nodes are being drained."""

    leaving: frozenset[str]


Event = Grow | Give | Started | NotStarted | Answered | Ended | Lost | Looked


# Decisions: what to do.


@dataclass(frozen=True)
class Start:
    """Start an actor."""

    actor: int


@dataclass(frozen=True)
class Call:
    """Send these rows to an actor."""

    call: int
    actor: int
    rows: tuple[Any, ...]


@dataclass(frozen=True)
class Kill:
    """End an actor that died, hangs or is out of reach."""

    actor: int


@dataclass(frozen=True)
class Dismiss:
    """End an actor that has nothing to do."""

    actor: int


@dataclass(frozen=True)
class Finish:
    """Return a row with its result, a LostError if it is given up."""

    row: Any
    result: Any


@dataclass(frozen=True)
class WarnStuck:
    """Warn that no actor is there, or stop if no node is."""


Decision = Start | Call | Kill | Dismiss | Finish | WarnStuck


@dataclass(eq=False)
class _Actor:
    number: int
    asked_at: float
    node: str = ""
    calls: int = 0
    alone: bool = False  # with a suspect
    ended: str = ""  # why it died or was killed


@dataclass(eq=False)
class _Call:
    actor: _Actor
    rows: tuple[Any, ...]  # that have no result yet
    lost_on: tuple[str, ...]  # nodes of the actors that died with its row
    since: float  # of the last answer


class PoolState:
    """Who works on which row, who waits, and what is to be done next.

    Attributes:
        start_s: Seconds from asking for an actor until it was there, of the slowest;
            0: none is there yet.
        there_s: Seconds that actors have been there, all together.
        looked_at: Time of the last `Looked`.
    """

    def __init__(
        self,
        name: str,
        most: int,
        calls: int,
        timeout: Callable[[Any], float] | None,
        now: float,
    ) -> None:
        """Start without an actor.

        Args:
            name: Of what the actors do, for messages.
            most: Largest number of actors, those on leaving nodes not counted.
            calls: How many calls an actor has at once.
            timeout: Seconds that a row may take. None: any time.
            now: Seconds of the clock of `decide`.
        """
        self._name, self._most, self._limit = name, most, calls
        self._timeout = timeout
        self._numbers = itertools.count()
        self._starting: dict[int, _Actor] = {}
        self._there: dict[int, _Actor] = {}
        self._leaving: dict[int, _Actor] = {}
        self._leaving_nodes: frozenset[str] = frozenset()
        self._queue: deque[tuple[Any, ...]] = deque()
        self._suspects: deque[tuple[Any, tuple[str, ...]]] = deque()
        self._calls: dict[int, _Call] = {}
        self._deaths = self._suspect_deaths = 0  # since the last result
        self._decisions: list[Decision] = []
        self.start_s = self.there_s = 0.0
        self.looked_at = self._stuck_since = now

    @property
    def size(self) -> int:
        """Number of actors that are there or starting."""
        return len(self._there) + len(self._starting)

    @property
    def busy(self) -> bool:
        """Whether a row has no result yet."""
        return bool(self._calls or self._queue or self._suspects)

    @property
    def room(self) -> int:
        """Number of further calls that could be under way now."""
        there = len(self._there) * self._limit
        return there - len(self._calls) - len(self._queue) - len(self._suspects)

    def nodes_of(self, call: int) -> frozenset[str]:
        """Return the nodes of a call's actor, and of those that died with its row."""
        return frozenset((*self._calls[call].lost_on, self._calls[call].actor.node))

    def decide(self, event: Event, now: float) -> list[Decision]:
        """Return what is to be done after an event, in this order.

        Raises:
            MedrayError: The actors die whichever rows they get, or one omits rows.
        """
        self._decisions = []
        match event:
            case Grow():
                if self.size < self._most:
                    self._start(now)
            case Give(rows):
                self._queue.append(rows)
            case Started():
                self._started(event, now)
            case NotStarted():
                self._decisions.append(Kill(event.actor))
                del self._starting[event.actor]
                self._replace(event.why, event.with_node, now)
            case Answered():
                self._answered(event, now)
            case Ended():
                if rows := self._end(event.call).rows:
                    raise MedrayError(
                        f"{self._name}: ended without a result for {len(rows)} rows; "
                        f"it has to yield one for each row that it is given"
                    )
            case Lost():
                self._lost(event, now)
            case Looked():
                self._looked(event, now)
        self._send_rows(now)
        return self._decisions

    def _send_rows(self, now: float) -> None:
        """Call the actors that can take something: suspects first, each alone."""
        while self._suspects and (idle := self._least_busy(0)):
            row, lost_on = self._suspects.popleft()
            idle.alone = True
            self._call(idle, (row,), lost_on, now)
        while self._queue and (actor := self._least_busy(self._limit - 1)):
            self._call(actor, self._queue.popleft(), (), now)

    def _least_busy(self, most: int) -> _Actor | None:
        can = [
            actor
            for actor in self._there.values()
            if actor.calls <= most and not actor.alone and not actor.ended
        ]
        return min(can, key=lambda actor: actor.calls, default=None)

    def _call(
        self, actor: _Actor, rows: tuple[Any, ...], lost_on: tuple[str, ...], now: float
    ) -> None:
        call = next(self._numbers)
        self._calls[call] = _Call(actor, rows, lost_on, now)
        self._decisions.append(Call(call, actor.number, rows))
        actor.calls += 1

    def _answered(self, event: Answered, now: float) -> None:
        call = self._calls[event.call]
        back = []
        for row, result in zip(call.rows, event.results, strict=False):
            if isinstance(result, HandedBack):
                back.append(row)
            else:
                self._decisions.append(Finish(row, result))
                self._deaths = self._suspect_deaths = 0
        if call.lost_on:  # it is no less suspect for it
            self._suspects.extendleft((row, call.lost_on) for row in back)
        elif back:
            self._queue.appendleft(tuple(back))
        call.rows = call.rows[len(event.results) :]
        call.since = now

    def _lost(self, event: Lost, now: float) -> None:
        """Replace the actor; retry its rows in hand, or give them up."""
        call = self._calls[event.call]
        actor = call.actor
        if not actor.ended:
            actor.ended = event.why
            self._decisions.append(Kill(actor.number))  # it may only be out of reach
        self._end(event.call)
        if self._there.pop(actor.number, None):  # the first of its calls to show it
            with_node = actor.node in event.gone
            self._replace(actor.ended, with_node, now, suspect=bool(call.lost_on))
        lost_on = (*call.lost_on, actor.node)
        on_live_nodes = sum(node not in event.gone for node in lost_on)
        if on_live_nodes >= TRIES or len(lost_on) >= MOST_TRIES:
            times = "three" if on_live_nodes >= TRIES else len(lost_on)
            error = LostError(f"{actor.ended}, {times} times")
            self._decisions.extend(Finish(row, error) for row in call.rows)
        else:
            self._suspects.extend((row, lost_on) for row in call.rows)

    def _replace(
        self, why: str, with_node: bool, now: float, suspect: bool = False
    ) -> None:
        """Start an actor for one that died, unless too many do."""
        log.info("a process of %s was lost: %s", self._name, why)
        if not with_node:
            self._deaths += not suspect
            self._suspect_deaths += suspect
        deaths = self._deaths + self._suspect_deaths
        if self._deaths >= DEATHS or deaths >= MOST_DEATHS:
            raise MedrayError(
                f"{self._name}: {deaths} processes died one after the other, the "
                f"last: {why}; Ray's logs on its node may say more"
            )
        self._start(now)

    def _looked(self, event: Looked, now: float) -> None:
        self.there_s += len(self._there) * (now - self.looked_at)
        self.looked_at = now
        self._kill_hanging(now)
        self._leaving_nodes = event.leaving
        for actor in [*self._there.values()]:
            self._leave_node(actor, now)
        if self._there:
            self._stuck_since = now
        elif now - self._stuck_since > STUCK_S:
            self._stuck_since = now
            self._decisions.append(WarnStuck())

    def _kill_hanging(self, now: float) -> None:
        for call in self._calls.values():
            if self._timeout is None or not call.rows or call.actor.ended:
                continue
            seconds = self._timeout(call.rows[0])
            if now - call.since > seconds:
                call.actor.ended = f"no answer for {seconds:.0f} s"
                self._decisions.append(Kill(call.actor.number))

    def _started(self, event: Started, now: float) -> None:
        actor = self._starting.pop(event.actor)
        actor.node = event.node
        self.start_s = max(self.start_s, now - actor.asked_at)
        self._there[actor.number] = actor
        self._leave_node(actor, now)

    def _leave_node(self, actor: _Actor, now: float) -> None:
        """Replace an actor whose node is being drained; it may finish what it has."""
        if actor.node in self._leaving_nodes:
            log.info("a process of %s leaves its node, which goes", self._name)
            self._leaving[actor.number] = self._there.pop(actor.number)
            self._dismiss_idle(actor)
            self._start(now)

    def _dismiss_idle(self, actor: _Actor) -> None:
        if actor.number in self._leaving and not actor.calls:
            del self._leaving[actor.number]
            if not actor.ended:
                self._decisions.append(Dismiss(actor.number))

    def _start(self, now: float) -> None:
        # It is given rows only once it is there: it may have to wait for a node.
        actor = _Actor(next(self._numbers), now)
        self._starting[actor.number] = actor
        self._decisions.append(Start(actor.number))

    def _end(self, number: int) -> _Call:
        call = self._calls.pop(number)
        call.actor.calls, call.actor.alone = call.actor.calls - 1, False
        self._dismiss_idle(call.actor)
        return call
