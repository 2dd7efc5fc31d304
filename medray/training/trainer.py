"""The trainer: a network, all that changes it, and the loop around it.

    train         epochs, from the last checkpoint to the end
    train_step    micro batches of a step -> gradients, summed over the world -> weights
    validate      validation patches -> counts and pictures
    state_dict    all that the next step depends on: two trainers of the same state do
                  the same next step

A step's micro batches are numbered (`Recipe.micro_batches`), and so are the places of
their crops in the order: how many workers share them changes nothing but the order of a
sum.

One file, because the loop, its step and its state are read together.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medray.datasets import read_dataset
from medray.errors import MedrayError
from medray.models import ModelConfig
from medray.storage import files
from medray.training.checkpoint import Checkpoints, keep_crops, teacher_uri
from medray.training.crops import Batch, count_val_batches, read_val_sample
from medray.training.dataloader import read_epochs
from medray.training.encoder_stages import weigh_stages
from medray.training.failures import explain_error, explain_loss
from medray.training.loggers import Tracker
from medray.training.model import TrainingModel
from medray.training.notices import AskedToStopError, Notices
from medray.training.optim import build_optimizer, set_learning_rate
from medray.training.phases import Phases
from medray.training.progress import start_progress
from medray.training.recipe import Recipe
from medray.training.scale import scale_of
from medray.training.schedule import learning_rate
from medray.training.validation import (
    Validation,
    choose_examples,
    compare_with_teacher,
    show_pictures,
)
from medray.training.world import World
from medray.types import Row

_WEIGHED = 512  # validation images on which an encoder's stages are weighed


class Trainer:
    """A model in training, as one rank of a world."""

    def __init__(
        self,
        world: World,
        recipe: Recipe,
        model_config: ModelConfig,
        patches: int,
        steps: int,
        measures: Mapping[str, npt.NDArray[np.float64]] | None = None,
    ) -> None:
        """Start from the recipe's weights.

        Args:
            world: Who trains together.
            recipe: How.
            model_config: How pixels become inputs, and the classes.
            patches: To train on.
            steps: Of an epoch.
            measures: (N, F) of the patches of `train` and `val`, for a model that takes
                them (`model_config.morphology`).

        Raises:
            ConfigError: The model, its weights or its teacher are not available.
        """
        self.world, self.recipe, self.steps = world, recipe, steps
        torch.manual_seed(recipe.seed)
        total = steps * recipe.schedule.epochs
        self.model = TrainingModel(world, recipe, model_config, total, measures or {})
        self.optimizer = build_optimizer(recipe.optimizer, self.model.parameters)
        # Only float16 needs scaled losses: its smallest numbers are too large.
        scaled = self.model.arithmetic.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=scaled)
        self.progress = start_progress(patches)
        self.phases = Phases(recipe.schedule, self.progress, self.model.network)

    # --- the loop ---------------------------------------------------------------------

    def train(
        self,
        data: str,
        checkpoints: Checkpoints,
        tracker: Tracker,
        on_epoch_end: Callable[[Row], None] = lambda entry: None,
    ) -> None:
        """Train from where this trainer is to the end.

        Args:
            data: Dataset.
            checkpoints: Take the last and the best state.
            tracker: Logs steps and epochs.
            on_epoch_end: Receives the entry of each epoch.

        Raises:
            TrainingError: It cannot go on; all of the world raise it.
        """
        now, recipe, kept = self.progress, self.recipe, self.model.kept
        notices = Notices(checkpoints.out)
        scale = scale_of(data, recipe.data, of_images=recipe.classifies)
        feed = (data, recipe.sampling, recipe.schedule, now, self.world, self.steps)
        with closing(read_epochs(*feed)) as epochs:
            for epoch, batches in epochs:
                if self.phases.must_weigh():
                    self._weigh_stages(data)
                    checkpoints.write_last(self.state_dict())
                self._train_epoch(batches, checkpoints, tracker, notices)
                found = self.validate(batches, data)
                step, crops = (epoch + 1) * self.steps, self.steps * recipe.batch
                show_pictures(tracker, step, found.pictures, self.model)
                scores = found.scores() | self.phases.entry()
                entry = now.end_epoch(self.steps, crops, found.seconds, scores, scale)
                if now.best["epoch"] == epoch:
                    weights = {k: v.cpu() for k, v in kept.state_dict().items()}
                    shown = [picture.shown for picture in found.pictures]
                    checkpoints.write_best(weights, entry | found.metrics(), shown)
                checkpoints.write_last(self.state_dict())
                checkpoints.write_history(now.history)
                tracker.epoch(step, entry)
                on_epoch_end(entry)
                if now.is_over(recipe.schedule):
                    break
        if self.model.teacher is not None and self.world.rank == 0:
            compared = compare_with_teacher(data, self.model, self.model.teacher)
            files.write_json(teacher_uri(checkpoints.out), compared)

    def _train_epoch(
        self,
        batches: Iterator[Batch],
        checkpoints: Checkpoints,
        tracker: Tracker,
        notices: Notices,
    ) -> None:
        now, start = self.progress, time.perf_counter()
        save_seconds = 60 * self.recipe.schedule.save_minutes
        for step in range(now.step, self.steps):
            loss = self._next_step(batches, checkpoints.out)
            scalars = {"train/loss": loss, "train/learning_rate": now.rate}
            tracker.scalars(now.epoch * self.steps + step, scalars)
            seconds = time.perf_counter() - start
            notice = notices.hear(self.world)
            if notice or (seconds >= save_seconds and step + 1 < self.steps):
                now.seconds += seconds
                checkpoints.write_last(self.state_dict())
                start = time.perf_counter()
            if notice == "stop":
                raise AskedToStopError
        now.seconds += time.perf_counter() - start

    def _next_step(self, batches: Iterator[Batch], out: str) -> float:
        """Do a step on this worker's next micro batches, and return its loss."""
        now, share = self.progress, self.world.share(self.recipe.micro_batches)
        name = f"epoch-{now.epoch}-step-{now.step}-rank-{self.world.rank}"
        micro_batches: list[Batch] = []
        failure, start = None, time.perf_counter()
        try:
            micro_batches = [next(batches) for _ in share]
            now.waited += time.perf_counter() - start
            now.note_damage(micro_batches)
        except MedrayError as error:
            failure = f"{error}"
        loss, failure = self.train_step(micro_batches, failure)
        if not np.isfinite(loss):
            if failure is not None and micro_batches:
                kept = keep_crops(out, name, micro_batches)
                failure += f"; its crops are kept in {kept}"
            self.world.raise_together(failure)
        return loss

    # --- a step -----------------------------------------------------------------------

    def train_step(
        self, micro_batches: Sequence[Batch], failure: str | None = None
    ) -> tuple[float, str | None]:
        """Do one optimizer step on this worker's micro batches and those of the others.

        Args:
            micro_batches: As many as `World.share` gives this worker.
            failure: Why there are none, if there are none.

        Returns:
            The loss over all micro batches of the world, and what went wrong here. If
            anything went wrong anywhere, the loss is not a number, and no weights are
            changed.
        """
        recipe, now = self.recipe, self.progress
        self.model.compiled.train()
        self.phases.let_learn()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.world.device)
        step = now.epoch * self.steps + now.step
        try:
            share = self.world.share(recipe.micro_batches)
            for index, batch in zip(share, micro_batches, strict=False):
                place = (recipe.seed, step, index)
                seed = int(np.random.SeedSequence(place).generate_state(1)[0])
                loss, of_crops = self.model.loss(batch, seed, step)
                if of_crops is not None:
                    now.note_losses(batch.patches, of_crops)
                loss = loss / recipe.micro_batches
                self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
                total += loss.detach()
        except (torch.OutOfMemoryError, RuntimeError, ValueError) as error:
            side = micro_batches[0].images.shape[-1]
            failure = explain_error(error, recipe, side, self.world.device)
        if failure is not None:
            total += torch.nan
        elif not torch.isfinite(total):
            failure = explain_loss(recipe, step)
        loss_of_all = self.world.add_gradients(self.model.parameters, total)
        if np.isfinite(loss_of_all):
            self._change_weights(step)
            now.step += 1
            now.loss_sum += loss_of_all
        return loss_of_all, failure

    def _change_weights(self, step: int) -> None:
        how, now = self.recipe.optimizer, self.progress
        schedule, scores = self.recipe.schedule, [row["score"] for row in now.history]
        now.rate = learning_rate(step, self.steps, scores, how.lr, schedule)
        set_learning_rate(self.optimizer, now.rate)
        self.scaler.unscale_(self.optimizer)
        if how.clip:
            nn.utils.clip_grad_norm_(self.model.parameters, how.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.model.average is not None:
            self.model.average.update_parameters(self.model.network)

    # --- validation -------------------------------------------------------------------

    def validate(self, batches: Iterator[Batch], data: str) -> Validation:
        """Return the validation results of the kept network.

        Running statistics, and what is known of patches, are then the same in all of
        the world.
        """
        start, now, world = time.perf_counter(), self.progress, self.world
        sampling, of_images = self.recipe.sampling, self.recipe.classifies
        shown = [] if of_images else choose_examples(data, sampling, world)
        found = Validation(read_dataset(data).classes, of_images, shown)
        world.average_statistics(self.model.network)
        if self.model.average is not None:
            world.average_statistics(self.model.average)
        now.share(world)
        failure = None
        try:
            for _ in world.share(count_val_batches(data, sampling)):
                batch = next(batches)
                now.damaged |= batch.damaged
                if len(batch.images):
                    found.add(batch, *self.model.predict(batch))
        except MedrayError as error:
            failure = f"{error}"
        world.raise_together(failure)
        found.gather(world)
        found.seconds = time.perf_counter() - start
        return found

    def _weigh_stages(self, data: str) -> None:
        """Weigh the encoder's stages for an adaptive phase, by rank 0 for all."""
        weighed: dict[str, float] = {}
        failure, stages, model = None, self.phases.stages, self.model
        if self.world.rank == 0:
            encoder: Any = model.kept.eval().encoder
            try:
                batches = read_val_sample(data, self.recipe.sampling, _WEIGHED)
                weighed = weigh_stages(encoder, stages, model.predict, batches)
            except MedrayError as error:
                failure = f"{error}"
        self.world.raise_together(failure)
        self.phases.decide(self.world.gather(weighed)[0])

    # --- state ------------------------------------------------------------------------

    def state_dict(self) -> Row:
        """Return all that the next step depends on."""
        states = {name: each.state_dict() for name, each in self._stateful().items()}
        return self.progress.state_dict() | states

    def load_state_dict(self, state: Row) -> None:
        """Restore what `state_dict` returned."""
        self.progress.load_state_dict(state)
        for name, each in self._stateful().items():
            each.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        model, teacher = self.model, self.model.teacher
        stateful = {
            "network": model.network,
            "optimizer": self.optimizer,
            "scaler": self.scaler,
            "hints": teacher and teacher.hints,
            "average": model.average,
        }
        return {name: each for name, each in stateful.items() if each is not None}
