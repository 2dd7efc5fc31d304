"""Which part of a network is trained in a phase."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import nn

from medray.errors import ConfigError
from medray.models import Architecture
from medray.training.encoder_stages import (
    Stage,
    find_stages,
    hooked,
    most_important,
)
from medray.training.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Phase:
    """Epochs in which a part of the network is trained; the rest is frozen.

    What rests keeps the running statistics of its batch normalisation, too.

    Attributes:
        epochs: How many; None, for the last phase: those that are left.
        train: head (what stands above the encoder); last (the head and the last
            `stages` stages of the encoder); adaptive (the head and those stages that
            matter most, see medray.training.finetuning); or all.
        stages: Of `last`: how many.
        share: Of `adaptive`: how many of the stages learn (0 to 1).
        lr: Factor of the learning rate.
    """

    epochs: Annotated[int, Field(ge=1)] | None = None
    train: Literal["head", "last", "adaptive", "all"] = "all"
    stages: int = Field(default=0, ge=0)
    share: float = Field(default=0.0, ge=0, lt=1)
    lr: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.stages >= 1) != (self.train == "last"):
            raise ValueError(
                f"schedule.phases: `train: last` goes with `stages` of 1 or more, the "
                f"others with none, found train {self.train} and stages {self.stages}"
            )
        if (self.share > 0) != (self.train == "adaptive"):
            raise ValueError(
                f"schedule.phases: `train: adaptive` goes with a `share` of the stages "
                f"above 0 and below 1, the others with none, found train {self.train} "
                f"and share {self.share}"
            )
        return self


def check_phases(
    network: nn.Module, phases: Sequence[Phase], kind: Architecture, side: int
) -> None:
    """Raise an error, before training, for phases that a network does not support.

    Args:
        network: With an `encoder`.
        phases: Of the schedule.
        kind: What it is called in messages.
        side: Of the first crops, pixels.

    Raises:
        ConfigError: Its encoder has no stages, or fewer than a phase asks for, or none
            that can be ablated.
    """
    for phase in phases:
        if phase.train in ("head", "all"):
            continue
        encoder: Any = network.encoder
        stages = find_stages(encoder)
        name = kind.encoder
        if not stages:
            raise ConfigError(
                f"schedule.phases: train: {phase.train} needs an encoder whose stages "
                f"are known, {name} of {kind.name} has none; train head or "
                f"all, or take a classifier"
            )
        if phase.stages > len(stages):
            raise ConfigError(
                f"schedule.phases: the last {phase.stages} stages are to learn, but "
                f"{name} has {len(stages)}: {', '.join(s.name for s in stages)}"
            )
        if phase.train == "adaptive" and not _gives_maps(encoder, stages, side):
            raise ConfigError(
                f"schedule.phases: train: adaptive needs stages that give feature maps "
                f"(N, C, H, W), those of {name} do not; take a convolutional encoder, "
                f"or train: last"
            )


def _gives_maps(encoder: nn.Module, stages: Sequence[Stage], side: int) -> bool:
    """Return whether each stage outputs (N, C, H, W), as convolutions do."""
    shapes: list[torch.Size] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            shapes.append(output.shape)

    was = encoder.training
    with torch.inference_mode(), hooked(encoder.eval(), stages, lambda _: note):
        encoder(torch.zeros(1, 3, side, side))
    encoder.train(was)
    # Those of transformers are (N, T, C) or (N, H, W, C).
    maps = [shape for shape in shapes if len(shape) == 4 and shape[2] == shape[3]]
    return len(maps) == len(stages)


def let_learn(
    encoder: nn.Module,
    phase: Phase,
    stages: Sequence[Stage],
    learning: Collection[str] | None,
) -> None:
    """Set `requires_grad` for the trained part of an encoder; the rest is in eval mode.

    Args:
        encoder: In training mode or not.
        phase: What it is to do.
        stages: Of the encoder.
        learning: Of `last` and `adaptive`: names of the stages that learn.
    """
    every = phase.train != "head"
    encoder.requires_grad_(every)
    encoder.train(every)
    if learning is None:
        return
    parameters = dict(encoder.named_parameters())
    for stage in stages:
        if stage.name in learning:
            continue
        for name in stage.parameters:
            parameters[name].requires_grad_(False)
        for name in stage.modules:
            encoder.get_submodule(name).eval()


def stages_that_learn(
    phase: Phase | None, stages: Sequence[Stage], weighed: dict[str, float]
) -> tuple[str, ...] | None:
    """Return the names of the encoder stages that learn; None for other phases.

    Args:
        phase: That an epoch is in, if there are any.
        stages: Of the encoder.
        weighed: How much each matters; an adaptive phase goes by that.
    """
    if phase is None or phase.train in ("head", "all"):
        return None
    if phase.train == "adaptive":
        return most_important(weighed, phase.share)
    return tuple(stage.name for stage in stages[-phase.stages :])
