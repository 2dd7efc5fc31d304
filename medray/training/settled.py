"""A recipe and a dataset, checked together before a training starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from medray.datasets import copies_apart, holds_images, read_slides
from medray.errors import ConfigError
from medray.evaluation import f1_line
from medray.models import ModelConfig, is_file, read_config
from medray.storage import files
from medray.training.checks import check_inputs, check_patches
from medray.training.identity import check_checkpoints, provenance_of
from medray.training.network import build_model_config, build_network
from medray.training.recipe import Recipe, read_recipe
from medray.training.sampler import usable_patches
from medray.training.scale import warn_of_validation
from medray.types import Row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """What a training did.

    Attributes:
        out: The model folder.
        trained: False if the model was there already.
        epochs: Epochs that were trained.
        f1: Best F1 on the validation patches; None if they hold no foreground.
        report: Its page.
        seconds: Wall time, Ray's start apart.
    """

    out: str
    trained: bool
    epochs: int
    f1: float | None
    report: str
    seconds: float

    def __str__(self) -> str:
        state = "trained" if self.trained else "was there already"
        return (
            f"{f1_line(self.f1)}\n"
            f"report  {self.report}\n"
            f"out     {self.out}\n"
            f"{state}, {self.epochs} epochs"
        )


@dataclass(frozen=True)
class SettledTraining:
    """A training that may start.

    Attributes:
        recipe: With absolute paths.
        provenance: Names it, see `medray.training.identity`.
        patches: Of `train` and `val`.
        model_config: How pixels become inputs, and the classes.
        network: As the recipe builds it.
        warnings: What the user should know of the dataset.
    """

    recipe: Recipe
    provenance: Row
    patches: dict[str, list[Row]]
    model_config: ModelConfig
    network: nn.Module
    warnings: list[str]

    @property
    def name(self) -> str:
        """Of its checkpoints; it holds the digest: only the very same is resumed."""
        digest: str = self.provenance["digest"]
        return digest.removeprefix("blake2b:")


def read_request(recipe: str, overrides: Sequence[str], repeats: int) -> Recipe:
    """Read the recipe of a training that is repeated so often.

    Raises:
        ConfigError: There is no such recipe, or no such number.
    """
    settings = read_recipe(recipe, overrides)
    if repeats < 1:
        raise ConfigError(f"repeats: expected 1 or more, found {repeats}")
    return settings


def settle_training(
    settings: Recipe, data: str, out: str
) -> SettledTraining | Training:
    """Return a training that may start, or the one that was done before.

    Nothing is written.

    Args:
        settings: The recipe.
        data: Dataset.
        out: Model folder.

    Raises:
        ConfigError: The recipe, the dataset or both together are wrong, or OUT holds
            another model.
    """
    settings = _with_absolute_paths(settings)
    provenance = provenance_of(settings, data)
    if (before := _trained_before(out, provenance)) is not None:
        return before
    patches = {
        split: usable_patches(data, split, settings.data) for split in ("train", "val")
    }
    check_patches(patches, data)
    model_config = build_model_config(settings, patches["train"], data)
    check_inputs(settings, model_config, data)
    network = build_network(settings, len(model_config.classes))
    names = model_config.classes.names
    warnings = warn_of_validation(patches["val"], names, of_images=settings.classifies)
    if not holds_images(data):
        warnings += copies_apart(read_slides(data))
    for said in warnings:
        log.warning("%s: %s", data, said)
    check_checkpoints(out, provenance)
    return SettledTraining(
        settings, provenance, patches, model_config, network, warnings
    )


def _with_absolute_paths(settings: Recipe) -> Recipe:
    """Workers run in folders of their own."""
    if settings.teacher is not None:
        teacher = files.absolute(settings.teacher.model)
        settings = replace(settings, teacher=replace(settings.teacher, model=teacher))
    if settings.prune is not None:
        model = files.absolute(settings.prune.model)
        settings = replace(settings, prune=replace(settings.prune, model=model))
    if settings.weights and is_file(settings.weights):
        settings = replace(settings, weights=files.absolute(settings.weights))
    return settings


def _trained_before(out: str, provenance: Row) -> Training | None:
    if not files.exists(files.join(out, "model.yaml")):
        return None
    before = read_config(out).provenance
    if before.get("digest") != provenance["digest"]:
        raise ConfigError(
            f"{out}: holds a model of another recipe or dataset; choose another --out, "
            f"or delete this model"
        )
    metrics = files.read_json(files.join(out, "metrics.json"))
    page = files.join(out, "training.html")
    return Training(out, False, before["epochs"], metrics["f1"], page, 0.0)
