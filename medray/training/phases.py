"""The fine-tuning phases of a training: the current one, and what learns in it."""

from __future__ import annotations

from typing import Any

from torch import nn

from medray.training.encoder_stages import find_stages
from medray.training.finetuning import Phase, let_learn, stages_that_learn
from medray.training.progress import Progress
from medray.training.schedule import Schedule
from medray.types import Row


class Phases:
    """Applies a schedule's phases to a network, epoch by epoch.

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
        """Set `requires_grad` for the current fine-tuning phase."""
        if self.now is not None:
            encoder: Any = self.network.encoder
            let_learn(encoder, self.now, self.stages, self.learning)

    def must_weigh(self) -> bool:
        """Return whether an adaptive phase begins whose stages are not chosen yet."""
        adaptive = self.now is not None and self.now.train == "adaptive"
        return adaptive and self.number not in self.progress.decided

    def decide(self, weighed: dict[str, float]) -> None:
        """Record how much the stages matter, for the rest of the phase."""
        self.progress.decided[self.number] = weighed

    def entry(self) -> Row:
        """Return the part of an epoch's entry about its phase."""
        if self.now is None:
            return {}
        entry: Row = {"phase": self.number, "train": self.now.train}
        if self.learning is not None:
            entry["learning"] = list(self.learning)
        if self.number in self.progress.decided:
            entry["importance"] = self.progress.decided[self.number]
        return entry
