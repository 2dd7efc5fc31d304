"""A network in training: from a batch of crops to its loss, and to its classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medray.models import ModelConfig, Normalise, choose_precision, standardise
from medray.training.arithmetic import Arithmetic
from medray.training.augment import move, recolour
from medray.training.crops import Batch
from medray.training.depthwise import quicken
from medray.training.distillation import Distillation, consistency, rise
from medray.training.losses import SegmentationLoss
from medray.training.network import build_network, synchronise
from medray.training.optim import build_average
from medray.training.recipe import Recipe
from medray.training.world import World
from medray.types import UInt8


class TrainingModel:
    """A network with its preprocessing, its augmentation and its losses."""

    def __init__(
        self,
        world: World,
        recipe: Recipe,
        model_config: ModelConfig,
        total_steps: int,
        measures: Mapping[str, npt.NDArray[np.float64]],
    ) -> None:
        """Build the network with the recipe's weights.

        Args:
            world: Who trains together.
            recipe: How.
            model_config: How pixels become inputs, and the classes.
            total_steps: Of the longest training.
            measures: (N, F) of the patches of `train` and `val`, for a model that takes
                them (`model_config.morphology`).

        Raises:
            ConfigError: It, its weights or its teacher are not available.
        """
        self.recipe, self.model_config, self.device = recipe, model_config, world.device
        self.total_steps = total_steps
        dtype = choose_precision(recipe.precision, world.device)
        self.arithmetic = Arithmetic(world.device, dtype, recipe.channels_last)
        network = build_network(recipe, len(model_config.classes))
        if world.device.type == "cpu" and dtype == torch.bfloat16:
            network = quicken(network)
        self.network = synchronise(self.arithmetic.place(network), recipe, world)
        self.compiled: nn.Module = self.network
        if recipe.compile:
            self.compiled = torch.compile(self.network)  # type: ignore[assignment]
        self.normalise = Normalise(model_config).to(world.device)
        self.measures = {
            split: standardise(values, model_config, world.device)
            for split, values in measures.items()
        }
        self.criterion = SegmentationLoss(recipe.loss)
        self.parameters: list[nn.Parameter] = list(self.network.parameters())
        self.teacher: Distillation | None = None
        if recipe.teacher is not None:
            self.teacher = Distillation(recipe.teacher, self.network, self.arithmetic)
            if self.teacher.hints is not None:
                self.parameters += self.teacher.hints.parameters()
        self.average = None
        if recipe.optimizer.average:
            self.average = build_average(self.network, recipe.optimizer.average)

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and kept: the average, if there is one."""
        kept: nn.Module = self.network
        if self.average is not None:
            kept = self.average.module
        return kept

    def loss(
        self, batch: Batch, seed: int, step: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the loss of a micro batch.

        Args:
            batch: On the host.
            seed: Decides augmentation and dropout.
            step: Of the whole training.

        Returns:
            What is minimised, and where the recipe asks for it the loss of each crop.
        """
        augment = self.recipe.augment
        images, masks = self._to_device(batch.images), self._to_device(batch.masks)
        images, masks = move(augment, images, masks, seed=seed)
        images = recolour(augment, images, seed=seed + 1)
        torch.manual_seed(seed)  # of dropout
        beside = self.beside("train", batch)
        logits = self.arithmetic.forward(self.compiled, self.normalise(images), *beside)
        labels = self._to_labels(masks)
        loss: torch.Tensor = self.criterion(logits, labels)
        loss = loss + self.criterion.of_weights(self.network)
        if self.teacher is not None:
            loss = self.teacher.add_to(loss, logits, images)
        if batch.unlabelled is not None:
            loss = loss + self._unlabelled_loss(batch.unlabelled, seed + 2, step)
        of_crops = None
        if self.recipe.data.hard:
            of_crops = self.criterion.of_crops(logits, labels)
        return loss, of_crops

    def _unlabelled_loss(self, crops: UInt8, seed: int, step: int) -> torch.Tensor:
        """Return how far this model is from its own average, on other colours."""
        how, augment = self.recipe.unlabelled, self.recipe.augment
        assert how is not None
        assert self.average is not None
        images = self._to_device(crops)
        images, _ = move(augment, images, torch.zeros_like(images[:, 0]), seed=seed)
        changed = recolour(augment, images, seed=seed + 1)
        forward = self.arithmetic.forward
        with torch.no_grad():
            theirs = forward(self.average.module.eval(), self.normalise(images))
        ours = forward(self.compiled, self.normalise(changed))
        weight = how.weight * rise(step, round(how.ramp * self.total_steps))
        return weight * consistency(ours, theirs, how.threshold)

    @torch.inference_mode()
    def predict(self, batch: Batch) -> tuple[UInt8, float]:
        """Return the predictions of the kept network on validation patches.

        Returns:
            Their classes (N, H, W), of a classifier (N, 1, 1), and the mean loss.
        """
        inputs = self.normalise(self._to_device(batch.images))
        beside = self.beside("val", batch)
        logits = self.arithmetic.forward(self.kept.eval(), inputs, *beside)
        labels = self._to_labels(self._to_device(batch.masks))
        classes = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
        return classes, float(self.criterion(logits, labels))

    def beside(self, split: str, batch: Batch) -> tuple[torch.Tensor, ...]:
        """Return the network's inputs in addition to a batch's pixels, if any."""
        if self.model_config.morphology is None:
            return ()
        return (self.measures[split][torch.from_numpy(batch.patches)],)

    def _to_labels(self, masks: torch.Tensor) -> torch.Tensor:
        """Return int64 labels: of pixels (N, S, S), or (N, 1, 1) a crop's commonest."""
        if not self.recipe.classifies:
            return masks.long()
        flat, classes = masks.flatten(1), range(len(self.model_config.classes))
        counts = torch.stack([(flat == value).sum(dim=1) for value in classes], dim=1)
        return counts.argmax(dim=1)[:, None, None]

    def _to_device(self, pixels: npt.NDArray[Any]) -> torch.Tensor:
        """Return pixels on the device; on a CPU they are those of the batch."""
        tensor = torch.from_numpy(pixels)
        if self.device.type == "cuda":  # pinned by who read them, or here
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor
