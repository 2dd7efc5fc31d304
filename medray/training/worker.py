"""A worker of a training: what runs in each process that Ray Train starts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import ray.train
import torch

from medray.datasets import read_morphology
from medray.errors import MedrayError
from medray.execution import cluster
from medray.models import ModelConfig, choose_device
from medray.storage import from_dict, to_dict
from medray.training.checkpoint import Checkpoints
from medray.training.loggers import Tracker
from medray.training.notices import AskedToStopError
from medray.training.recipe import Recipe
from medray.training.sampler import steps_per_epoch, usable_patches
from medray.training.trainer import Trainer
from medray.training.world import World
from medray.types import Row


def run_worker(config: Row) -> str | None:
    """Train in one of the processes that Ray Train starts.

    Returns:
        Why the training cannot go on, or None. An error that is raised makes Ray Train
        start all workers again.
    """
    context = ray.train.get_context()
    rank, size = context.get_world_rank(), context.get_world_size()
    world = World(rank, size, choose_device(), context.get_local_world_size())
    if world.device.type == "cpu":
        # As many as Ray counts: a container may have fewer than its machine.
        torch.set_num_threads(max(1, cluster.cpus_per_node() // world.local_size))
    recipe = from_dict(Recipe, config["recipe"], "recipe")
    model_config = from_dict(ModelConfig, config["model_config"], "model.yaml")
    try:
        train_as(
            world, recipe, model_config, config["data"], config["out"], config["name"]
        )
    except MedrayError as error:
        return f"{error}"
    except AskedToStopError:
        return None  # who asked knows
    return None


def train_as(
    world: World,
    recipe: Recipe,
    model_config: ModelConfig,
    data: str,
    out: str,
    name: str,
    on_epoch_end: Callable[[Row], None] = lambda entry: None,
) -> None:
    """Train as one rank of a world, from the last checkpoint to the end.

    Args:
        world: Who this is, of how many.
        recipe: What to do.
        model_config: How pixels become inputs, and the classes.
        data: Dataset.
        out: Model folder; checkpoints/NAME-last.pt and NAME-best.pt are kept there.
        name: Of this very training.
        on_epoch_end: Is given the entry of each epoch, of those before a checkpoint
            too.

    Raises:
        TrainingError: It cannot go on; all of the world raise it.
        AskedToStopError: It was asked to stop.
    """
    checkpoints = Checkpoints(out, name, writes=world.rank == 0)
    trainer = start_trainer(world, recipe, model_config, data, checkpoints)
    progress = trainer.progress
    begun = progress.epoch * trainer.steps + progress.step
    tracker = Tracker(
        out, step=begun, name=name, settings=to_dict(recipe), shown=world.rank == 0
    )
    for entry in progress.history:
        on_epoch_end(entry)
    with closing(tracker):
        trainer.train(data, checkpoints, tracker, on_epoch_end)


def start_trainer(
    world: World,
    recipe: Recipe,
    model_config: ModelConfig,
    data: str,
    checkpoints: Checkpoints,
) -> Trainer:
    """Return a trainer where the last checkpoint left off.

    Raises:
        TrainingError: It cannot be built; all of the world raise it.
    """
    patches = {
        split: usable_patches(data, split, recipe.data) for split in ("train", "val")
    }
    steps = steps_per_epoch(recipe.sampling, len(patches["train"]))
    measures = {}
    if model_config.morphology is not None:
        measures = {s: read_morphology(data, rows)[1] for s, rows in patches.items()}
    failure = None
    try:
        trainer = Trainer(
            world, recipe, model_config, len(patches["train"]), steps, measures
        )
        if (state := checkpoints.read_last()) is not None:
            trainer.load_state_dict(state)
    except MedrayError as error:
        failure = f"{error}"
    world.raise_together(failure)
    return trainer
