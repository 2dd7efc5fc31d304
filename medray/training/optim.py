"""The optimizer, and the moving average of weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from medray.training.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Optimizer:
    """Settings of the optimizer.

    Attributes:
        name: adamw (Loshchilov and Hutter 2019), adam (Kingma and Ba 2015) or sgd
            (with Nesterov's momentum of 0.9).
        lr: Highest learning rate.
        weight_decay: Decoupled for adamw, else added to the gradient.
        clip: Largest norm of the gradient; 0: no clipping.
        average: Decay of the moving average of the weights that is validated and kept
            (0.999, say); 0: the weights themselves.
    """

    name: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    clip: float = Field(default=1.0, ge=0)
    average: float = Field(default=0.0, ge=0, lt=1)


def build_optimizer(
    how: Optimizer, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """Build the optimizer; its learning rate is set before each step."""
    lr, decay = how.lr, how.weight_decay
    # Fused: one pass over the weights, on a CPU a quarter of the time.
    if how.name == "sgd":
        return torch.optim.SGD(
            parameters, lr, momentum=0.9, nesterov=True, weight_decay=decay, fused=True
        )
    kind = torch.optim.AdamW if how.name == "adamw" else torch.optim.Adam
    return kind(parameters, lr, weight_decay=decay, fused=True)


def build_average(model: nn.Module, decay: float) -> AveragedModel:
    """Build the moving average of a model's weights and buffers."""
    mean = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=mean, use_buffers=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate
