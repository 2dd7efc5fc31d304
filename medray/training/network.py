"""The network that a recipe starts from, and its model_config for inference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from torch import nn

from medray.datasets import read_dataset, read_morphology
from medray.errors import ConfigError
from medray.models import (
    ModelConfig,
    Morphology,
    build_classifier,
    build_segmenter,
    load_model,
    thinned,
)
from medray.training.finetuning import check_phases
from medray.training.recipe import Recipe
from medray.training.world import World
from medray.types import Row


def build_network(recipe: Recipe, classes: int) -> nn.Module:
    """Build the network that a recipe starts from.

    Raises:
        ConfigError: It, its weights or the model to prune are not available, or it
            cannot go through the phases.
    """
    network = _build(recipe, classes)
    phases, side = recipe.schedule.phases, recipe.data.crops[0]
    check_phases(network, phases, recipe.model, side)
    return network


def _build(recipe: Recipe, classes: int) -> nn.Module:
    if recipe.prune is not None:
        network, config = load_model(recipe.prune.model)
        if config.architecture != recipe.model or len(config.classes) != classes:
            raise ConfigError(
                f"prune.model: {recipe.prune.model} is {config.architecture} of "
                f"{len(config.classes)} classes, the recipe asks for {recipe.model} of "
                f"{classes}; make them the same"
            )
        return thinned(network, recipe.prune.share)
    if recipe.classifies:
        return build_classifier(recipe.model, classes, recipe.weights)
    return build_segmenter(recipe.model, classes, recipe.weights)


def synchronise(network: nn.Module, recipe: Recipe, world: World) -> nn.Module:
    """Make a network normalise over the crops of all workers, if the recipe says so.

    Raises:
        ConfigError: These workers cannot.
    """
    if not recipe.sync_batch_norm or world.size == 1:
        return network
    if world.device.type != "cuda":
        raise ConfigError("sync_batch_norm: needs GPUs; set it to false")
    if recipe.micro_batches % world.size:
        raise ConfigError(
            f"sync_batch_norm: {recipe.micro_batches} micro batches a step cannot be "
            f"shared evenly by {world.size} workers; choose another micro_batch_size "
            f"or batch"
        )
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    return converted


def build_model_config(settings: Recipe, patches: list[Row], data: str) -> ModelConfig:
    """Return the model_config for inference, which training uses too."""
    model_config = ModelConfig(
        architecture=settings.model,
        classes=read_dataset(data).classes,
        window=settings.window,
        mpp=_mpp(patches),
        stain=settings.stain,
        morphology=_morphology(patches, data) if settings.model.morphology else None,
    )
    if settings.scaling != "imagenet":
        model_config = replace(model_config, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    if settings.scaling == "zscore":
        model_config = replace(model_config, zscore=True)
    return model_config


def _morphology(patches: list[Row], data: str) -> Morphology:
    """Return how measures of cells are standardised: by the training images."""
    names, values = read_morphology(data, patches)
    std = values.std(axis=0)
    std[std == 0] = 1  # the same for all
    mean = values.mean(axis=0)
    return Morphology(names, tuple(mean.tolist()), tuple(std.tolist()))


def _mpp(patches: list[Row]) -> float | None:
    known = [row["mpp"] for row in patches if row["mpp"]]
    return float(np.median(known)) if known else None
