"""How long a training takes, and the learning rate of each of its steps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from medray.training.finetuning import Phase
from medray.training.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Schedule:
    """How long, how the learning rate goes after a linear warm-up, and what is saved.

    Attributes:
        name: cosine (down to 0), staircase (times `decay` after every `every` epochs)
            or plateau (times `decay` when `every` epochs brought nothing better).
        epochs: Longest training.
        warmup: Share of the steps in which the learning rate rises.
        decay: Factor of staircase and plateau.
        every: Epochs between two drops of staircase and plateau.
        patience: Epochs without a better validation F1 before it stops early. Where
            validation has no foreground, without a smaller loss.
        save_minutes: Minutes between checkpoints within an epoch.
        phases: What learns when, one after the other; none: all learn all the time.
            Each of them waits for a plateau of its own.
    """

    name: Literal["cosine", "staircase", "plateau"] = "cosine"
    epochs: int = Field(default=20, ge=1)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    decay: float = Field(default=0.95, gt=0, le=1)
    every: int = Field(default=1, ge=1)
    patience: int = Field(default=10, ge=1)
    save_minutes: float = Field(default=10.0, gt=0)
    phases: tuple[Phase, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.phases:
            return self
        *before, last = self.phases
        if any(phase.epochs is None for phase in before):
            raise ValueError(
                "schedule.phases: only the last phase may do without epochs; say how "
                "many the others take"
            )
        taken = sum(phase.epochs or 0 for phase in self.phases)
        covers = taken == self.epochs if last.epochs else taken < self.epochs
        if not covers:
            raise ValueError(
                f"schedule.phases: the phases take {taken} epochs"
                f"{'' if last.epochs else ' before the last one'}, schedule.epochs are "
                f"{self.epochs}; make them the same, or leave the epochs of the last "
                f"phase away, and it takes those that are left"
            )
        if self.phases[0].train == "adaptive":
            raise ValueError(
                "schedule.phases: the first cannot be adaptive, for a head that has "
                "learned nothing cannot tell which stages matter; put "
                "{epochs: 5, train: head} before it"
            )
        return self

    def phase_at(self, epoch: int) -> int:
        """Return the index of the phase that an epoch is in; 0 where there are none."""
        return max(0, sum(first <= epoch for first in self.first_epochs) - 1)

    @property
    def first_epochs(self) -> tuple[int, ...]:
        """The first epoch of each phase; one phase where there are none."""
        before = [phase.epochs or 0 for phase in self.phases[:-1]]
        return tuple(itertools.accumulate(before, initial=0))


def learning_rate(
    step: int,
    steps_per_epoch: int,
    scores: Sequence[float],
    highest: float,
    schedule: Schedule,
) -> float:
    """Return the learning rate of a step of the whole training.

    Args:
        step: From 0.
        steps_per_epoch: Steps of an epoch.
        scores: Of the epochs that are over, greater is better (plateau looks at those
            of the phase).
        highest: Learning rate (`optimizer.lr`), which a phase's factor multiplies.
        schedule: See `Schedule`.
    """
    if schedule.phases:
        at = schedule.phase_at(step // steps_per_epoch)
        highest *= schedule.phases[at].lr
        scores = scores[schedule.first_epochs[at] :]
    total = steps_per_epoch * schedule.epochs
    warmup = round(schedule.warmup * total)
    if step < warmup:
        return highest * (step + 1) / warmup
    if schedule.name == "cosine":
        progress = (step - warmup) / max(1, total - warmup)
        return highest * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if schedule.name == "staircase":
        drops = step // steps_per_epoch // schedule.every
    else:
        drops = plateau_drops(scores, schedule.every)
    factor: float = schedule.decay**drops
    return highest * factor


def plateau_drops(scores: Sequence[float], every: int) -> int:
    """Count how often `every` epochs in a row brought no better score."""
    drops = waited = 0
    best = list(itertools.accumulate(scores, max))
    for before, now in itertools.pairwise(best):
        waited = 0 if now > before else waited + 1
        if waited == every:
            drops, waited = drops + 1, 0
    return drops
