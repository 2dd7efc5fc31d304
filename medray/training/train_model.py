"""A recipe and a dataset -> a model folder.

The way of a patch, top to bottom:

    order    which crop of which patch comes when: medray/training/sampler.py
    feed     processes next to each worker cut the crops from the zarr chunks:
             medray/training/dataloader.py, medray/training/crops.py
    workers  Ray Train starts them and replaces those that die:
             medray/training/launch.py, medray/training/worker.py
    loop     the workers learn, validate and keep: medray/training/trainer.py
    model    the best weights become the model folder, the epochs its report: here
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from medray.execution import cluster
from medray.models import ModelConfig, read_config, save_model, write_seen
from medray.storage import files, locked
from medray.training.checkpoint import (
    example_uri,
    read_best,
    read_history,
    repeat_uri,
    teacher_uri,
)
from medray.training.identity import seen_of
from medray.training.launch import run_workers
from medray.training.recipe import Recipe
from medray.training.report import write_training_report
from medray.training.settled import Training, read_request, settle_training
from medray.types import Row

log = logging.getLogger(__name__)


def train(
    recipe: str,
    *,
    data: str,
    out: str,
    overrides: Sequence[str] = (),
    repeats: int = 1,
) -> Training:
    """Train a model as a recipe says.

    Running the same command again goes on from the last checkpoint, and does nothing
    once the model is there.

    Args:
        recipe: Name, see `medray recipes`, or path of a YAML file.
        data: Dataset, as `medray ingest` writes it.
        out: Model folder to make.
        overrides: Keys of the recipe to change, such as `optimizer.lr=1e-4`.
        repeats: Trainings with other seeds, for mean and spread of the score. The
            recipe's own seed makes the model, the others lie in OUT/repeats.

    Raises:
        ConfigError: The recipe, the dataset or both together are wrong, OUT holds
            another model, or another process works there.
        TrainingError: The training cannot go on.

    Examples:
        >>> training = medray.train(
        ...     "unet",
        ...     data="dataset",
        ...     out="trained",
        ...     overrides=["schedule.epochs=1", "data.crop=128", "data.samples=4"],
        ... )
        >>> training.trained, training.epochs
        (True, 1)
    """
    settings = read_request(recipe, overrides, repeats)
    data, out = files.absolute(data), files.absolute(out)
    with locked(out, "train"):
        results = [_train(settings, data, out)]
        for extra in range(1, repeats):
            again = replace(settings, seed=settings.seed + extra)
            place = repeat_uri(out, again.seed)
            results.append(_train(again, data, place))
        if repeats > 1:
            _note_repeats(out, results)
    return replace(
        results[0],
        trained=any(result.trained for result in results),
        seconds=sum(result.seconds for result in results),
    )


def _note_repeats(out: str, results: Sequence[Training]) -> None:
    """Write the spread of the best scores into metrics.json and the report."""
    metrics = files.read_json(files.join(out, "metrics.json"))
    scores = [result.f1 for result in results if result.f1 is not None]
    spread: Row = {"f1": scores, "mean": None, "std": None}
    if len(scores) > 1:
        spread |= {
            "mean": float(np.mean(scores)),
            "std": float(np.std(scores, ddof=1)),
        }
    metrics["repeats"] = spread
    files.write_json(files.join(out, "metrics.json"), metrics)
    _write_report(out, read_config(out), metrics)


def _train(settings: Recipe, data: str, out: str) -> Training:
    def run(settings: Recipe, model_config: ModelConfig, name: str) -> None:
        run_workers(settings, model_config, data, out, name)

    return train_with(run, settings, data, out)


def train_with(
    run: Callable[[Recipe, ModelConfig, str], None],
    settings: Recipe,
    data: str,
    out: str,
) -> Training:
    """Train a model as a recipe says, by other means than Ray Train.

    Args:
        run: Trains by `medray.training.worker.train_as`; takes the recipe, what
            inference must know, and the training's name.
        settings: The recipe.
        data: Dataset.
        out: Model folder to make; no other process may work there.

    Raises:
        ConfigError: The recipe, the dataset or both together are wrong, or OUT holds
            another model.
        TrainingError: The training cannot go on.
    """
    settled = settle_training(settings, data, out)
    if isinstance(settled, Training):
        return settled
    cluster.connect()
    patches, network = settled.patches, settled.network
    log.info(
        "training on %d patches, validating on %d, into %s",
        len(patches["train"]),
        len(patches["val"]),
        out,
    )
    start = time.perf_counter()
    settings, name = settled.recipe, settled.name
    run(settings, settled.model_config, name)
    best = read_best(out, name)
    history = read_history(out)
    metrics = best["metrics"] | {"history": history}
    if settled.warnings:
        metrics["warnings"] = settled.warnings
    provenance = settled.provenance | {"epochs": len(history)}
    model_config = replace(settled.model_config, provenance=provenance)
    network.load_state_dict(best["model"])
    if settings.teacher is not None:
        metrics["teacher"] = files.read_json(teacher_uri(out))
    metrics["parameters"] = sum(p.numel() for p in network.parameters())
    _write_report(out, model_config, metrics)
    write_seen(out, seen_of(settings, patches, data))
    save_model(out, model_config, network, metrics)
    seconds = time.perf_counter() - start
    page = files.join(out, "training.html")
    return Training(out, True, len(history), metrics["f1"], page, seconds)


def _write_report(out: str, model_config: ModelConfig, metrics: Row) -> None:
    uris = [example_uri(out, number) for number in range(100)]
    pictures = []
    for uri in uris:
        if not files.exists(uri):
            break
        pictures.append(files.read_bytes(uri))
    write_training_report(out, model_config, metrics, pictures)
