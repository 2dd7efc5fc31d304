"""How often a row may kill its process, and which deaths count against no row.

Ray Data repeats a task whose process died without end, and does not say at which row:
so the row that each process works on is recorded before it is touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

# A row is given up after 3 process deaths on live nodes, or 20 deaths overall, should
# no node ever seem to live on.
_TRIES, _MOST_TRIES = 3, 20
# So many deaths without a result between them are no row's fault: of rows of different
# groups, and all deaths.
_DEATHS, _MOST_DEATHS = 10, 100


@dataclass(frozen=True)
class Verdict:
    """Whether a row may begin.

    Attributes:
        kind: `go`; `wait`: another row of its group is tried first; `lost`: it is given
            up; `stop`: the run ends; `leave`: the node is being drained; `hopeless`:
            processes die, whichever rows they get.
        why: In words.
    """

    kind: Literal["go", "wait", "lost", "stop", "leave", "hopeless"]
    why: str = ""


@dataclass
class _AtHand:
    node: str
    group: str
    since: float  # when it was begun, or last said that it goes on; seconds


@dataclass
class Tries:
    """Which rows are in progress, and how often each ended its process."""

    _at_hand: dict[int, _AtHand] = field(default_factory=dict)
    _lost_on: dict[int, list[str]] = field(default_factory=dict)
    _given_up: dict[int, str] = field(default_factory=dict)
    _lost_groups: dict[str, str] = field(default_factory=dict)
    # Groups of which a row ended a process, and none was done since.
    _suspects: set[str] = field(default_factory=set)
    # Groups (or rows that have none) that ended processes on nodes that live on, and
    # how often, since the last row was done.
    _killers: set[str | int] = field(default_factory=set)
    _deaths: int = 0
    how: str = ""
    """How the last process ended."""

    def begin(
        self,
        row: int,
        *,
        group: str = "",
        node: str,
        now: float,
        timeout: float,
        trace: str | None = None,
        how: str = "",
        is_gone: Callable[[str], bool],
    ) -> Verdict:
        """Record that a row is begun, or return why it is not.

        A row that is begun while in progress ended the process that had it. Of a
        group whose rows end processes one row is tried at a time, the first of those at
        hand, so that a slide costs few processes however many there are.

        Args:
            row: Its number.
            group: That it belongs to, "": none. Of a row that is given up, no other
                begins.
            node: Where it is begun.
            now: Seconds.
            timeout: That the row may take, seconds.
            trace: What the process that ended wrote at its end; None: it is not known,
                as on another node.
            how: How that process ended, where it is known without.
            is_gone: Whether a node is dead or being drained: then it was not the row.
        """
        if why := self._given_up.get(row) or self._lost_groups.get(group):
            return Verdict("lost", why)
        if before := self._at_hand.pop(row, None):
            hung = node != before.node and now - before.since >= timeout
            self.how = how or how_it_ended(trace, timeout, hung=hung)
            self._die(row, before, self.how, is_gone)
            if why := self._given_up.get(row):
                if group:
                    self._lost_groups[group] = why
                return Verdict("lost", why)
        if group in self._suspects and any(
            other < row and one.group == group for other, one in self._at_hand.items()
        ):
            return Verdict("wait")
        self._at_hand[row] = _AtHand(node, group, now)
        return Verdict("go")

    def suspects(self, row: int) -> set[str]:
        """Return the nodes on which a row that is begun again ended processes."""
        before = self._at_hand.get(row)
        return {before.node, *self._lost_on.get(row, ())} if before else set()

    def _die(
        self, row: int, had: _AtHand, how: str, is_gone: Callable[[str], bool]
    ) -> None:
        lost_on = self._lost_on.setdefault(row, [])
        lost_on.append(had.node)
        gone = {node: is_gone(node) for node in set(lost_on)}
        if not gone[had.node]:
            self._deaths += 1
            self._killers.add(had.group or row)
            self._suspects |= {had.group} - {""}
        # That an earlier one had gone may be known by now.
        if (
            sum(not gone[node] for node in lost_on) >= _TRIES
            or len(lost_on) >= _MOST_TRIES
        ):
            times = "three" if len(lost_on) == _TRIES else f"{len(lost_on)}"
            self._given_up[row] = f"{how}, {times} times"

    def goes_on(self, row: int, now: float) -> None:
        """Record that a row in progress waits for something, and does not hang."""
        if row in self._at_hand:
            self._at_hand[row].since = now

    def end(self, row: int) -> None:
        """Record that a row in progress is done."""
        if had := self._at_hand.pop(row, None):
            self._lost_on.pop(row, None)
            self._suspects.discard(had.group)
            self._killers.clear()
            self._deaths = 0

    @property
    def nodes(self) -> set[str]:
        """Nodes on which rows are in progress."""
        return {one.node for one in self._at_hand.values()}

    def let_go(self) -> None:
        """Record that processes are ended for no fault of their rows."""
        self._at_hand.clear()

    def forget(self, row: int) -> None:
        """Forget a row whose result has arrived."""
        self._at_hand.pop(row, None)
        self._lost_on.pop(row, None)
        self._given_up.pop(row, None)

    @property
    def hopeless(self) -> bool:
        """Whether processes die, whichever rows they get."""
        return len(self._killers) >= _DEATHS or self._deaths >= _MOST_DEATHS


def how_it_ended(trace: str | None, timeout: float, *, hung: bool = False) -> str:
    """Return how a process ended, from what Python's `faulthandler` wrote.

    Args:
        trace: Empty where it could not write; None where that is not known.
        timeout: That its row might take, seconds.
        hung: Whether it hung, if nothing is written.
    """
    if (trace or "").startswith("Timeout (") or (hung and trace is None):
        return f"no answer for {timeout:.0f} s"
    if found := re.match(r"Fatal Python error: ([^\n]+)", trace or ""):
        return f"the process died ({found[1]})"
    if trace == "":
        return "the process died (it was killed, as when a node's memory runs short)"
    return "the process died"
