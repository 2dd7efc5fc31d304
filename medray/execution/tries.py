"""How often a row may end the process that works on it, and when that blames no row.

Ray Data repeats a task whose process died without end, and does not say at which row:
so what each process has at hand is noted before it is touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

# A row at which this many processes died is given up: of those whose nodes live on, and
# of all, should no node ever seem to.
_TRIES, _MOST_TRIES = 3, 20
# So many deaths without a result between them are no row's fault: first deaths of rows,
# and all deaths.
_DEATHS, _MOST_DEATHS = 10, 100


@dataclass
class _AtHand:
    node: str
    since: float  # when it was begun, or last said that it goes on; seconds


@dataclass
class Tries:
    """Which rows are at hand, and how often each ended its process."""

    _at_hand: dict[int, _AtHand] = field(default_factory=dict)
    _lost_on: dict[int, list[str]] = field(default_factory=dict)
    _given_up: dict[int, str] = field(default_factory=dict)
    _lost_groups: dict[str, str] = field(default_factory=dict)
    _deaths: int = 0  # first ones of rows, on nodes that live on
    _repeats: int = 0  # later ones
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
        is_gone: Callable[[str], bool],
    ) -> str:
        """Note that a row is begun, or return why it is given up.

        A row that is begun while it is at hand ended the process that had it.

        Args:
            row: Its number.
            group: That it belongs to: of a row that is given up, no other begins.
            node: Where it is begun.
            now: Seconds.
            timeout: That the row may take, seconds.
            trace: What the process that ended wrote at its end; None: it is not known,
                as on another node.
            is_gone: Whether a node is dead, or told to go: then it was not the row.
        """
        if why := self._given_up.get(row) or self._lost_groups.get(group):
            return why
        if before := self._at_hand.pop(row, None):
            hung = node != before.node and now - before.since >= timeout
            self.how = how_it_ended(trace, timeout, hung=hung)
            self._die(row, before.node, self.how, is_gone)
            if why := self._given_up.get(row):
                if group:
                    self._lost_groups[group] = why
                return why
        self._at_hand[row] = _AtHand(node, now)
        return ""

    def suspects(self, row: int) -> set[str]:
        """Return the nodes on which a row that is begun again ended processes."""
        before = self._at_hand.get(row)
        return {before.node, *self._lost_on.get(row, ())} if before else set()

    def _die(
        self, row: int, node: str, how: str, is_gone: Callable[[str], bool]
    ) -> None:
        lost_on = self._lost_on.setdefault(row, [])
        lost_on.append(node)
        gone = {node: is_gone(node) for node in set(lost_on)}
        if not gone[node]:
            first = sum(not gone[one] for one in lost_on) == 1
            self._deaths += first
            self._repeats += not first
        # That an earlier one had gone may be known by now.
        if (
            sum(not gone[node] for node in lost_on) >= _TRIES
            or len(lost_on) >= _MOST_TRIES
        ):
            times = "three" if len(lost_on) == _TRIES else f"{len(lost_on)}"
            self._given_up[row] = f"{how}, {times} times"

    def goes_on(self, row: int, now: float) -> None:
        """Note that a row at hand waits for something, and does not hang."""
        if row in self._at_hand:
            self._at_hand[row].since = now

    def end(self, row: int) -> None:
        """Note that a row at hand is done."""
        if self._at_hand.pop(row, None):
            self._lost_on.pop(row, None)
            self._deaths = self._repeats = 0

    def forget(self, row: int) -> None:
        """Forget a row whose result has arrived."""
        self._at_hand.pop(row, None)
        self._lost_on.pop(row, None)
        self._given_up.pop(row, None)

    @property
    def hopeless(self) -> bool:
        """Whether processes die whatever they are given."""
        return self._deaths >= _DEATHS or self._repeats >= _MOST_DEATHS


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
