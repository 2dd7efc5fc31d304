"""The phases of a training: which one it is in, and what learns in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from medray.training.encoder_stages import find_stages
from medray.training.finetuning import Phase, let_learn, stages_that_learn
from medray.training.progress import Progress
from medray.training.schedule import Schedule
from medray.types import Row


class Phases:
    """What a schedule's phases make of a network, as the epochs go by.

    What learns is a function of the epoch, and for adaptive phases of what was decided
    at their start, which is part of the progress.
    """

    def __init__(
        self, schedule: Schedule, progress: Progress, network: nn.Module
    ) -> None:
        """Find the stages of the network's encoder."""
        self.schedule, self.progress, self.network = schedule, progress, network
        self.stages = find_stages(getattr(network, "encoder", None))

    @property
    def number(self) -> int:
        """Of the phase that the epoch is in; 0 where there are none."""
        return self.schedule.phase_at(self.progress.epoch)

    @property
    def now(self) -> Phase | None:
        """The phase that the epoch is in, if there are any."""
        return self.schedule.phases[self.number] if self.schedule.phases else None

    @property
    def learning(self) -> tuple[str, ...] | None:
        """Names of the encoder's stages that learn; None if it is not about stages."""
        weighed = self.progress.decided.get(self.number, {})
        return stages_that_learn(self.now, self.stages, weighed)

    def let_learn(self) -> None:
        """Have the part of the network learn that is to, and nothing else."""
        if self.now is not None:
            encoder: Any = self.network.encoder
            let_learn(encoder, self.now, self.stages, self.learning)

    def must_weigh(self) -> bool:
        """Tell whether an adaptive phase begins of which nothing is decided yet."""
        adaptive = self.now is not None and self.now.train == "adaptive"
        return adaptive and self.number not in self.progress.decided

    def decide(self, weighed: dict[str, float]) -> None:
        """Note how much the stages matter; until the phase ends it stays so."""
        self.progress.decided[self.number] = weighed

    def entry(self) -> Row:
        """Return what an epoch's entry says of its phase."""
        if self.now is None:
            return {}
        entry: Row = {"phase": self.number, "train": self.now.train}
        if self.learning is not None:
            entry["learning"] = list(self.learning)
        if self.number in self.progress.decided:
            entry["importance"] = self.progress.decided[self.number]
        return entry
