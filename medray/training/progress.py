"""The progress of a training: all that its next step depends on, except the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt
import torch

from medray.errors import FormatError
from medray.training.crops import Batch
from medray.training.scale import Scale, score_of
from medray.training.schedule import Schedule
from medray.training.world import World
from medray.types import Row

_OLD = 0.7  # weight of what was known of a patch's loss before
_LEAST_DAMAGED = 3  # damaged patches that are endured in any case


@dataclass
class Progress:
    """The progress of a training; a checkpoint holds these by their names.

    Attributes:
        losses: (N,) float64, of the training patches: what was last known; else NaN.
        order_losses: Those at the end of the last epoch, which the order follows.
        epoch: That is under way, from 0.
        step: Of the epoch, the next.
        rate: Learning rate of the last step.
        loss_sum: Over the steps of the epoch.
        seconds: That the steps of the epoch took.
        waited: Of these, for batches.
        history: Entries of the epochs that are over.
        best: Epoch and score of the best of them.
        damaged: Patches that could not be read, and why.
        decided: By number of a phase, how much each stage of the encoder matters.
    """

    losses: torch.Tensor
    order_losses: torch.Tensor
    epoch: int = 0
    step: int = 0
    rate: float = 0.0
    loss_sum: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    history: list[Row] = field(default_factory=list)
    best: Row = field(default_factory=lambda: {"epoch": -1, "score": float("-inf")})
    damaged: dict[str, str] = field(default_factory=dict)
    decided: dict[int, dict[str, float]] = field(default_factory=dict)

    def state_dict(self) -> Row:
        """Return all of it by name."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def load_state_dict(self, state: Row) -> None:
        """Restore what `state_dict` returned."""
        for each in fields(self):
            setattr(self, each.name, state[each.name])

    def note_losses(self, patches: npt.NDArray[np.int64], losses: torch.Tensor) -> None:
        """Mix the losses (M,) of these patches into their running losses."""
        index = torch.from_numpy(patches)
        known, new = self.losses[index], losses.detach().cpu().double()
        mixed = _OLD * known + (1 - _OLD) * new
        self.losses[index] = torch.where(known.isnan(), new, mixed)

    def note_damage(self, batches: Sequence[Batch]) -> None:
        """Record damaged training patches.

        Raises:
            FormatError: They are too many to be left out.
        """
        for batch in batches:
            self.damaged |= batch.damaged
        patches = len(self.losses)
        most = max(_LEAST_DAMAGED, patches // 100)
        if len(self.damaged) > most:
            name, problem = next(iter(self.damaged.items()))
            raise FormatError(
                f"{len(self.damaged)} of {patches} training patches are damaged, more "
                f"than {most} are not left out; the first is {name}: {problem}"
            )

    def share(self, world: World) -> None:
        """Share losses and damage among all ranks."""
        if world.size == 1:
            return
        for damaged in world.gather(self.damaged):
            self.damaged |= damaged
        seen = world.gather(self.losses)
        changed = [now for now in seen if not now.equal(self.order_losses)]
        for now in changed:
            new = (now != self.order_losses) & ~now.isnan()
            self.losses[new] = now[new]

    def end_epoch(
        self, steps: int, crops: int, seconds: float, scores: Row, scale: Scale
    ) -> Row:
        """Record the end of an epoch, and return its entry.

        Args:
            steps: Of an epoch.
            crops: Of an epoch.
            seconds: That validation took.
            scores: Of the validation patches, and more to note.
            scale: Which of them decides which epoch is the best.
        """
        entry: Row = {
            "epoch": self.epoch,
            "loss": self.loss_sum / steps,
            "learning_rate": self.rate,
            "seconds": self.seconds + seconds,
            "crops_per_second": crops / max(self.seconds, 1e-9),
            "waiting": self.waited / max(self.seconds, 1e-9),
            "damaged": len(self.damaged),
        }
        entry |= scores
        entry["score"] = score_of(scores, scale)
        self.history.append(entry)
        if entry["score"] > self.best["score"]:
            self.best = {"epoch": self.epoch, "score": entry["score"]}
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum = self.seconds = self.waited = 0.0
        self.order_losses = self.losses.clone()
        return entry

    def is_over(self, schedule: Schedule) -> bool:
        """Return whether all epochs are done, or nothing has improved for too long."""
        # What all can do together shows in the last phase.
        best = max(self.best["epoch"], schedule.first_epochs[-1] - 1)
        since_best: int = self.epoch - 1 - best
        return self.epoch >= schedule.epochs or since_best >= schedule.patience


def start_progress(patches: int) -> Progress:
    """Return the progress of a training of so many patches before its first step."""
    unknown = torch.full((patches,), torch.nan, dtype=torch.float64)
    return Progress(unknown, unknown.clone())
