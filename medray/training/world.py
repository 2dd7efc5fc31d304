"""The ranks that train together, and what they exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import nn

from medray.errors import MedrayError


class TrainingError(MedrayError):
    """A training cannot go on, and why."""


@dataclass(frozen=True)
class World:
    """The ranks that train together.

    Attributes:
        rank: Of this process, from 0.
        size: How many there are.
        device: Of this process.
        local_size: How many of them are on this machine, this one included.
    """

    rank: int
    size: int
    device: torch.device
    local_size: int = 1

    def share(self, count: int) -> range:
        """Return the indices assigned to this rank."""
        return range(self.rank, count, self.size)

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the world, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def any(self, asked: bool) -> bool:
        """Return whether any rank asks for it."""
        if self.size == 1:
            return asked
        return bool(self.add(torch.tensor(float(asked), device=self.device)))

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks, in their order."""
        values = [value]
        if self.size > 1:
            values = [None] * self.size
            torch.distributed.all_gather_object(values, value)
        return values

    def raise_together(self, failure: str | None) -> None:
        """Raise the failure of any rank, on all ranks.

        Raises:
            TrainingError: Anything failed anywhere.
        """
        said = dict.fromkeys(problem for problem in self.gather(failure) if problem)
        if said:
            raise TrainingError("; ".join(said))

    def add_gradients(
        self, parameters: Sequence[nn.Parameter], loss: torch.Tensor
    ) -> float:
        """Sum gradients and a loss over the world; return the loss.

        In one tensor, so that it is one exchange per step.
        """
        if self.size == 1:
            return float(loss)
        mine = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        together = torch.cat([*(gradient.flatten() for gradient in mine), loss[None]])
        self.add(together)
        sums = torch.split(together[:-1], [p.numel() for p in parameters])
        for parameter, total in zip(parameters, sums, strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(total.view_as(parameter))
        return float(together[-1])

    def average_statistics(self, network: nn.Module) -> None:
        """Set a network's running statistics to the mean over all ranks."""
        if self.size == 1:
            return
        for buffer in network.buffers():
            if buffer.is_floating_point():
                self.add(buffer).div_(self.size)
