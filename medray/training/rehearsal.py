"""Timing of a training before it is started: a few of its steps, in this process.

By the trainer that trains, on the crops that it will get; without Ray, and nothing is
kept.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from medray.models import choose_device
from medray.storage import files
from medray.training.checkpoint import Checkpoints, repeat_uri
from medray.training.crops import Batch, count_val_batches, read_train, read_val_sample
from medray.training.recipe import Recipe
from medray.training.sampler import crop_of_epoch
from medray.training.settled import (
    Training,
    read_request,
    settle_training,
)
from medray.training.trainer import Trainer
from medray.training.worker import start_trainer
from medray.training.world import TrainingError, World
from medray.types import Row

_WARM_UP, _MEASURED = 2, 5  # steps
_MOST_S = 60.0  # no further step is measured after it
_VAL_PATCHES = 12  # that are predicted, about


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """The time that this process took for steps of a training.

    Attributes:
        device: Where.
        crop: Side of the crops, pixels: the largest of the recipe.
        read_s: Of the crops of a step, by one process; median.
        step_s: Of a step with all its micro batches, once they are read, in the phase
            in which all learns: each that was measured.
        val_s: Of a batch of validation patches, read and predicted.
        host_bytes: Most memory that this process had.
        device_bytes: Most of a GPU's memory; 0 without.
    """

    device: str
    crop: int
    read_s: float
    step_s: tuple[float, ...]
    val_s: float
    host_bytes: int
    device_bytes: int


@dataclass(frozen=True, kw_only=True)
class RehearsedTraining:
    """A training that would start.

    Attributes:
        recipe: Of it.
        patches: Of `train` and `val`.
        classes: By label value.
        warnings: What it would warn of.
        steps: Of an epoch.
        val_batches: Of an epoch.
        epoch: That it would go on with, from 0.
        step: Of this epoch, from 0.
        others: Trainings with other seeds that are yet to be done.
        sides: Of the crops of each epoch that is left, pixels.
        times: What its steps took here.
    """

    recipe: Recipe
    patches: Mapping[str, Sequence[Row]]
    classes: tuple[str, ...]
    warnings: list[str]
    steps: int
    val_batches: int
    epoch: int
    step: int
    others: int
    sides: list[int]
    times: StepTimes


def rehearse_training(
    recipe: str, *, data: str, out: str, overrides: Sequence[str], repeats: int
) -> RehearsedTraining | Training:
    """Return what `train` would do by the same arguments, or what it has done.

    Raises:
        ConfigError: As `train`, before it starts.
        TrainingError: A step fails, for example for want of memory.
    """
    settings = read_request(recipe, overrides, repeats)
    data, out = files.absolute(data), files.absolute(out)
    settled = settle_training(settings, data, out)
    if isinstance(settled, Training):
        return settled
    settings = settled.recipe
    trainer = start_trainer(
        World(0, 1, choose_device()),
        settings,
        settled.model_config,
        data,
        Checkpoints(out, settled.name, writes=False),
    )
    now = trainer.progress
    epoch, step = now.epoch, now.step
    over = now.is_over(settings.schedule)
    epochs = range(epoch, epoch if over else settings.schedule.epochs)
    sampling = settings.sampling
    others = [
        files.join(repeat_uri(out, settings.seed + extra), "model.yaml")
        for extra in range(1, repeats)
    ]
    return RehearsedTraining(
        recipe=settings,
        patches=settled.patches,
        classes=settled.model_config.classes.names,
        warnings=settled.warnings,
        steps=trainer.steps,
        val_batches=count_val_batches(data, sampling),
        epoch=epoch,
        step=step,
        others=sum(not files.exists(uri) for uri in others),
        sides=[crop_of_epoch(sampling, epoch) for epoch in epochs],
        times=_time_steps(trainer, data),
    )


def _time_steps(trainer: Trainer, data: str) -> StepTimes:
    """Do some steps with the largest crops, and predict some validation patches."""
    sampling = trainer.recipe.sampling
    sides = [crop_of_epoch(sampling, epoch) for epoch in range(sampling.epochs)]
    side = max(sides)
    epoch, begin = sides.index(side), time.perf_counter()
    trainer.progress.epoch = _widest_phase(trainer)
    reads, steps = [], []
    for number in range(_WARM_UP + _MEASURED):
        first = number % trainer.steps * sampling.batch
        start = time.perf_counter()
        batches = _read(data, trainer, epoch, first)
        read = time.perf_counter()
        _, failure = trainer.train_step(batches)
        _wait_for(trainer)
        if failure is not None:
            raise TrainingError(failure)
        reads.append(read - start)
        steps.append(time.perf_counter() - read)
        if len(steps) > 1 and time.perf_counter() - begin > _MOST_S:
            break
    warm_up = min(_WARM_UP, len(steps) - 1)
    start = time.perf_counter()
    sample = read_val_sample(data, sampling, _VAL_PATCHES)
    for batch in sample:
        if len(batch.images):
            trainer.model.predict(batch)
    _wait_for(trainer)
    seconds = time.perf_counter() - start
    gpu = trainer.world.device.type == "cuda"
    return StepTimes(
        device=torch.cuda.get_device_name() if gpu else "CPU",
        crop=side,
        read_s=statistics.median(reads[warm_up:]),
        step_s=tuple(steps[warm_up:]),
        val_s=seconds / max(1, len(sample)),
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        device_bytes=torch.cuda.max_memory_allocated() if gpu else 0,
    )


def _read(data: str, trainer: Trainer, epoch: int, first: int) -> list[Batch]:
    """Read the micro batches of a step, whose crops begin at a place of the order."""
    recipe, losses = trainer.recipe, b""
    if recipe.data.hard:
        losses = trainer.progress.order_losses.numpy().tobytes()
    size = recipe.crops_per_micro_batch
    return [
        read_train(data, recipe.sampling, epoch, first + number * size, losses)
        for number in range(recipe.micro_batches)
    ]


def _widest_phase(trainer: Trainer) -> int:
    """Return the first epoch of the phase in which all learns, if there is one."""
    schedule = trainer.recipe.schedule
    phases = zip(schedule.phases, schedule.first_epochs, strict=False)
    first = (epoch for phase, epoch in phases if phase.train == "all")
    return next(first, trainer.progress.epoch)


def _wait_for(trainer: Trainer) -> None:
    """Wait until what was begun on a GPU is done."""
    if trainer.world.device.type == "cuda":
        torch.cuda.synchronize()
