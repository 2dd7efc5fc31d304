"""How weights change: the optimizer, its learning rate, and their moving average."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from medray.training.recipe import Optimizer, Schedule


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


def learning_rate(
    step: int,
    steps_per_epoch: int,
    scores: Sequence[float],
    optimizer: Optimizer,
    schedule: Schedule,
) -> float:
    """Give the learning rate of a step of the whole training.

    Args:
        step: From 0.
        steps_per_epoch: Steps of an epoch.
        scores: Of the epochs that are over, greater is better (plateau looks at those
            of the phase).
        optimizer: Its `lr` is the highest, times the phase's factor.
        schedule: See `Schedule`.
    """
    if schedule.phases:
        at = schedule.phase_at(step // steps_per_epoch)
        optimizer = replace(optimizer, lr=optimizer.lr * schedule.phases[at].lr)
        scores = scores[schedule.first_epochs[at] :]
    total = steps_per_epoch * schedule.epochs
    warmup = round(schedule.warmup * total)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    if schedule.name == "cosine":
        progress = (step - warmup) / max(1, total - warmup)
        return optimizer.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    if schedule.name == "staircase":
        drops = step // steps_per_epoch // schedule.every
    else:
        drops = plateau_drops(scores, schedule.every)
    factor: float = schedule.decay**drops
    return optimizer.lr * factor


def plateau_drops(scores: Sequence[float], every: int) -> int:
    """Count how often `every` epochs in a row brought no better score."""
    drops = waited = 0
    best = list(itertools.accumulate(scores, max))
    for before, now in itertools.pairwise(best):
        waited = 0 if now > before else waited + 1
        if waited == every:
            drops, waited = drops + 1, 0
    return drops


def build_average(model: nn.Module, decay: float) -> AveragedModel:
    """Build the moving average of a model's weights and buffers."""
    mean = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
    return AveragedModel(model, multi_avg_fn=mean, use_buffers=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set it for all parameters."""
    for group in optimizer.param_groups:
        group["lr"] = rate
