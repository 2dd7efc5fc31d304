"""Checks of a recipe and a dataset together, before anything is started."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from medray.datasets import holds_images, read_dataset
from medray.errors import ConfigError
from medray.models import ModelConfig, is_exported, read_config
from medray.storage import files
from medray.training.recipe import Recipe
from medray.training.sampler import usable_patches
from medray.training.scale import choose_scale
from medray.types import Row

_MPP_APART = 0.15  # relative difference of resolutions that is taken for none


def check_patches(patches: Mapping[str, Sequence[Row]], data: str) -> None:
    """Raise an error for patches that would make a training pointless.

    Raises:
        ConfigError: They hold too little, or differ in resolution.
    """
    classes = read_dataset(data).classes
    for split, rows in patches.items():
        if not rows:
            raise ConfigError(
                f"{data}: no annotated patches with tissue in split {split}; ingest "
                f"more annotated slides, or other --fractions"
            )
    pixels = np.sum([row["class_px"] for row in patches["train"]], axis=0)
    empty = [name for name, n in zip(classes.names, pixels, strict=True) if not n]
    if empty:
        raise ConfigError(
            f"{data}: the training patches hold no pixel of {empty}; annotate some, or "
            f"take the class out of the dataset"
        )
    resolutions = {row["mpp"] for row in patches["train"]}
    known = [mpp for mpp in resolutions if mpp]
    if known and (
        len(known) < len(resolutions) or max(known) > (1 + _MPP_APART) * min(known)
    ):
        raise ConfigError(
            f"{data}: the slides differ in microns per pixel "
            f"({sorted(map(str, resolutions))}); make a dataset of each resolution"
        )


def check_inputs(settings: Recipe, model_config: ModelConfig, data: str) -> None:
    """Check the recipe against the dataset, and what it refers to.

    Raises:
        ConfigError: They do not go together.
    """
    side = read_dataset(data).patch
    if holds_images(data) and not (
        settings.classifies
        and settings.data.crops == (side,)
        and (settings.window.size, settings.window.stride) == (side, side)
    ):
        raise ConfigError(
            f"{data}: holds images of {side} px that have one class each; expected "
            f"model.name=classifier data.crop={side} window.size={side} "
            f"window.stride={side}, found {settings.model.name}, "
            f"{settings.data.crop}, {settings.window.size} and "
            f"{settings.window.stride}"
        )
    if max(settings.data.crops) > side:
        slides = files.read_table(files.join(data, "slides.parquet")).to_pylist()
        partly = [row["slide"] for row in slides if row.get("partly")]
        if partly:
            raise ConfigError(
                f"{data}: {len(partly)} slides, such as {partly[0]}, are annotated "
                f"only in part: crops must lie within patches of {side} px, found "
                f"data.crop={settings.data.crop}"
            )
    how = settings.unlabelled
    if how is not None:
        if not settings.optimizer.average:
            raise ConfigError(
                "unlabelled: needs the moving average that teaches; set "
                "optimizer.average=0.99"
            )
        if not usable_patches(data, "", settings.data):
            raise ConfigError(
                f"{data}: holds no slides without annotation for `unlabelled`; ingest "
                f"some, or remove `unlabelled` from the recipe"
            )
    for other in (settings.teacher, settings.prune):
        if other is not None and is_exported(other.model):
            raise ConfigError(
                f"{other.model}: comes from `medray export`; give the model folder "
                f"that it was made from"
            )
    if settings.teacher is not None:
        teacher = read_config(settings.teacher.model)
        if teacher.classes != model_config.classes:
            raise ConfigError(
                f"teacher.model: {settings.teacher.model} knows "
                f"{teacher.classes.names}, the dataset {model_config.classes.names}; "
                f"they must be the same"
            )
        if (teacher.mpp or 0) != (model_config.mpp or 0) and not (
            teacher.mpp
            and model_config.mpp
            and abs(teacher.mpp / model_config.mpp - 1) <= _MPP_APART
        ):
            raise ConfigError(
                f"teacher.model: {settings.teacher.model} looks at {teacher.mpp} um "
                f"per pixel, the dataset has {model_config.mpp}; they must be the same"
            )


def check_comparable(recipes: Sequence[Recipe], data: str) -> None:
    """Raise an error if trials would be compared by different losses.

    Raises:
        ConfigError: Validation has no foreground, so that losses decide, and they
            differ between trials.
    """
    # Validation does not count the weights, of which l2 is.
    if len({replace(recipe.loss, l2=0.0) for recipe in recipes}) == 1:
        return
    first = recipes[0]
    val = usable_patches(data, "val", first.data)
    if val and choose_scale(val, of_images=first.classifies) == "val_loss":
        raise ConfigError(
            f"{data}: split val holds no foreground, so the validation loss decides "
            f"between trials, and those of different `loss` cannot be compared by it; "
            f"give split val a slide with foreground, or take `loss` out of the grid"
        )
