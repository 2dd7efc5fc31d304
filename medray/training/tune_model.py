"""A recipe with several values for some of its keys -> the best model of them all.

The way of a sweep, top to bottom:

    trials   every combination of the values is a training with a folder of its own
    run      Ray Tune runs as many of them at a time as there are devices; ASHA may end
             those that are behind
    report   what each was worth by F1 on the validation patches; the best model
"""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray.tune
import torch
from ray.tune.schedulers import ASHAScheduler

from medray.datasets import holds_images
from medray.errors import ConfigError, MedrayError
from medray.evaluation import f1_line
from medray.execution import cluster
from medray.models import ModelConfig, choose_device
from medray.storage import files, locked, named_digest
from medray.training.checkpoint import read_history
from medray.training.checks import check_comparable
from medray.training.identity import data_parts
from medray.training.notices import (
    AskedToStopError,
    ask_to_stop,
    is_asked_to_stop,
    withdraw_stop,
)
from medray.training.recipe import Recipe
from medray.training.recipe_files import find_recipe
from medray.training.report import write_tune_report
from medray.training.sweep import (
    Grid,
    Trial,
    folder_of,
    is_over,
    plan_trials,
    read_sweep,
    sum_up,
)
from medray.training.train_model import train_with
from medray.training.worker import train_as
from medray.training.world import World
from medray.types import Row

log = logging.getLogger(__name__)

_LIVES = 3  # times that a trial whose process died goes on
_FOLDER = (
    *("seen.txt", "weights.safetensors", "metrics.json", "training.html"),
    "model.yaml",
)


@dataclass(frozen=True)
class Tuning:
    """What a sweep did.

    Attributes:
        out: Its folder; OUT/best is the best model.
        trials: How many there are.
        best: The values of the best one.
        f1: Its F1 on the validation patches; they chose it, so it flatters.
        failed: Why trials have no result, by their values.
        report: Its page.
        seconds: Wall time, Ray's start apart.
    """

    out: str
    trials: int
    best: dict[str, Any]
    f1: float
    failed: dict[str, str]
    report: str
    seconds: float

    def __str__(self) -> str:
        best = ", ".join(f"{key}={value}" for key, value in self.best.items())
        return (
            f"{f1_line(self.f1)}\n"
            f"report  {self.report}\n"
            f"out     {self.out}\n"
            f"best    {best}\n"
            f"{self.trials} trials, {len(self.failed)} failed, {self.seconds:.1f} s"
        )


def tune(
    recipe: str,
    *,
    data: str,
    out: str,
    grid: Mapping[str, Sequence[Any]] | None = None,
    asha: int = 0,
    overrides: Sequence[str] = (),
) -> Tuning:
    """Train a recipe with every combination of some values.

    Running the same command again goes on with the trials that are not over, each from
    its last checkpoint, and starts none again.

    Args:
        recipe: Name or path of a recipe, with a grid; without, of a sweep.
        data: Dataset, as `medray ingest` writes it.
        out: Folder to make.
        grid: Values by key of the recipe; every combination is a trial. Such as
            {"optimizer.lr": [1e-3, 1e-4]}.
        asha: End trials that are behind after this many epochs (0: none). ASHA (Li et
            al. 2020): two thirds of what is left after each threefold.
        overrides: Keys of the recipe to change in all trials.

    Raises:
        ConfigError: A key, a value or the dataset is wrong, or another process works
            in OUT.
        MedrayError: No trial has a result.
        StoppedError: SIGTERM or Ctrl-C.
    """
    if grid is None:
        recipe, grid, asha = read_sweep(recipe)
    recipe = find_recipe(recipe)
    data, out = files.absolute(data), files.absolute(out)
    trials = plan_trials(recipe, grid, overrides)
    cluster.connect()
    start = time.perf_counter()
    with locked(out, "tune"):
        _check_same(out, recipe, grid, asha, overrides, data)
        check_comparable([trial.recipe for trial in trials], data)
        log.info("%d trials into %s", len(trials), out)
        todo = [trial for trial in trials if not is_over(out, trial)]
        if todo:
            # ASHA compares: those that are over report again what they reached.
            _run(trials if asha else todo, data, out, asha)
        rows = [sum_up(out, trial) for trial in trials]
        # Without foreground in validation there is no F1, but a loss.
        rows.sort(
            key=lambda row: -row["score"] if row["score"] is not None else math.inf
        )
        best = next((row for row in rows if row["status"] == "trained"), None)
        failed = {row["trial"]: row["why"] for row in rows if row["status"] == "failed"}
        if best is None:
            name, why = next(iter(failed.items()), ("none", "all were stopped"))
            raise MedrayError(f"no trial has a result; {name}: {why}")
        for name in _FOLDER:
            content = files.read_bytes(files.join(best["folder"], name))
            files.write_bytes(files.join(out, "best", name), content)
        page = write_tune_report(out, list(grid), rows, best)
    return Tuning(
        out,
        len(trials),
        best["values"],
        best["f1"],
        failed,
        page,
        time.perf_counter() - start,
    )


def _check_same(
    out: str,
    recipe: str,
    grid: Grid,
    asha: int,
    overrides: Sequence[str],
    data: str,
) -> None:
    """Raise an error for a folder of another sweep."""
    uri = files.join(out, "sweep.json")
    asked = {
        "recipe": recipe.rpartition("/")[2],
        "grid": {key: list(values) for key, values in grid.items()},
        "asha": asha,
        "overrides": list(overrides),
        "data": named_digest(b"".join(data_parts(data, morphology=True))),
    }
    before = files.read_json(uri) if files.exists(uri) else asked
    if holds_images(data):  # of which an older medray did not note the digest
        before.setdefault("data", asked["data"])
    if before != asked:
        differing = [key for key in asked if before.get(key) != asked[key]]
        raise ConfigError(
            f"{out}: holds another sweep (other {', '.join(differing)}); choose "
            f"another --out"
        )
    files.write_json(uri, asked)


def _run(trials: Sequence[Trial], data: str, out: str, asha: int) -> None:
    """Run by Ray Tune the trials that are not over."""
    gpus = cluster.gpus()
    # On CPUs half of them train; the processes that read need some too.
    cpus = int(ray.cluster_resources().get("CPU", 1))
    at_a_time = gpus or max(1, cpus // 2)
    epochs = max(trial.recipe.schedule.epochs for trial in trials)
    scheduler = None
    if asha:
        scheduler = ASHAScheduler(
            time_attr="epochs",
            metric="score",
            mode="max",
            grace_period=min(asha, epochs),
            max_t=epochs,
            reduction_factor=3,
        )
    by_name = {trial.name: trial for trial in trials}
    trainable = functools.partial(_train_one, trials=by_name, data=data, out=out)
    tuner = ray.tune.Tuner(
        ray.tune.with_resources(trainable, {"GPU": 1} if gpus else {"CPU": 1}),
        param_space={"trial": ray.tune.grid_search(list(by_name))},
        tune_config=ray.tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=at_a_time,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=ray.tune.RunConfig(
            name=f"{time.time_ns()}",  # what is over is known by the trials' folders
            storage_path=files.join(out, "ray"),
            verbose=0,
            failure_config=ray.tune.FailureConfig(max_failures=_LIVES),
        ),
    )
    folders = [folder_of(out, trial) for trial in trials]
    _withdraw_stops(folders)
    try:
        fitted = cluster.call_stoppable(
            tuner.fit,
            functools.partial(_ask_to_stop, folders),
            lambda: "trials that are over and checkpoints are kept",
        )
    finally:
        _withdraw_stops(folders)
    for result in fitted:
        trial = by_name[result.config["trial"]]
        if result.error is not None:
            log.warning("%s: %s", trial.name, f"{result.error}".splitlines()[-1])
        elif not is_over(out, trial):
            files.write_json(files.join(folder_of(out, trial), "stopped.json"), {})
    files.remove(files.join(out, "ray"))


def _ask_to_stop(folders: Sequence[str]) -> None:
    for folder in folders:
        ask_to_stop(folder)


def _withdraw_stops(folders: Sequence[str]) -> None:
    for folder in folders:
        withdraw_stop(folder)


def _train_one(
    config: Row, *, trials: dict[str, Trial], data: str, out: str
) -> dict[str, float]:
    """Train one combination in one of Ray Tune's processes."""
    trial = trials[config["trial"]]
    folder = folder_of(out, trial)
    last: Row = {"score": float("-inf"), "epochs": 0}
    if is_asked_to_stop(folder):  # before its turn came
        return last

    def on_epoch_end(entry: Row) -> None:
        last.update(score=entry["score"], epochs=entry["epoch"] + 1)
        ray.tune.report(dict(last))

    def run(settings: Recipe, model_config: ModelConfig, training: str) -> None:
        device = choose_device()
        if device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
        world = World(0, 1, device)
        train_as(world, settings, model_config, data, folder, training, on_epoch_end)

    try:
        done = train_with(run, trial.recipe, data, folder)
    except MedrayError as error:
        # It would fail again: a loss that is no number, say.
        files.write_json(files.join(folder, "failed.json"), {"why": f"{error}"})
        return last
    except AskedToStopError:
        return last  # its state is written
    if not done.trained:
        for entry in read_history(folder):
            on_epoch_end(entry)
    return last
