"""A sweep: the trainings that several values for keys of a recipe make."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medray.errors import ConfigError
from medray.storage import files, read_yaml
from medray.training.checkpoint import read_history
from medray.training.recipe import Recipe, read_recipe
from medray.training.recipe_files import SWEEPS, find_recipe, is_path
from medray.types import Row

Grid = Mapping[str, Sequence[Any]]
_MOST_TRIALS = 1000
_OVER = ("model.yaml", "stopped.json", "failed.json")  # what a trial that is over has


@dataclass(frozen=True)
class Trial:
    """One combination of a grid's values.

    Attributes:
        name: States the values; its folder's name too.
        values: By key of the recipe.
        recipe: With those values.
    """

    name: str
    values: dict[str, Any]
    recipe: Recipe


def read_sweep(sweep: str) -> tuple[str, Grid, int]:
    """Read a sweep, by name or path.

    Returns:
        The recipe's path, the grid, and ASHA's first rung (0: none).

    Raises:
        ConfigError: It is none.
    """
    uri = find_recipe(sweep, SWEEPS)
    values = read_yaml(uri)
    if unknown := sorted(map(str, values.keys() - {"recipe", "grid", "asha"})):
        raise ConfigError(
            f"{uri}: unknown keys {unknown}; a sweep has recipe, grid and asha"
        )
    recipe, grid, asha = values.get("recipe"), values.get("grid"), values.get("asha", 0)
    if not isinstance(recipe, str):
        raise ConfigError(f"{uri}: recipe: expected a name or a file, found {recipe!r}")
    if not isinstance(grid, dict):
        raise ConfigError(
            f"{uri}: grid: expected lists of values by key, such as "
            f"{{optimizer.lr: [1.0e-3, 1.0e-4]}}, found {grid!r}"
        )
    if not isinstance(asha, int) or asha < 0:
        raise ConfigError(f"{uri}: asha: expected epochs, or 0, found {asha!r}")
    if is_path(recipe):  # counted from the sweep
        recipe = files.join(files.absolute(uri).rpartition("/")[0], recipe)
    return find_recipe(recipe), grid, asha


def plan_trials(recipe: str, grid: Grid, overrides: Sequence[str]) -> list[Trial]:
    """Return a trial for each combination of the grid's values.

    Raises:
        ConfigError: A key or a value is none of the recipe's.
    """
    for key, listed in grid.items():
        if not isinstance(listed, (list, tuple)) or not listed:
            raise ConfigError(f"grid: {key}: expected a list of values, found {listed}")
    if not grid:
        raise ConfigError("grid: expected a key with a list of values, found none")
    if (count := math.prod(map(len, grid.values()))) > _MOST_TRIALS:
        raise ConfigError(f"grid: {count} trials, more than {_MOST_TRIALS}")
    trials = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        chosen = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        settings = read_recipe(recipe, [*overrides, *chosen])
        if settings.most > 1:
            raise ConfigError(
                f"workers: {settings.workers}: each trial of a sweep has one worker, "
                f"and trials run beside each other; set workers=1"
            )
        name = re.sub(r"[^\w.,=+-]+", "_", ",".join(chosen)).replace('"', "")
        trials.append(Trial(name, values, settings))
    return trials


def folder_of(out: str, trial: Trial) -> str:
    """Return the model folder of a trial of a sweep in OUT."""
    return files.join(out, "trials", trial.name)


def is_over(out: str, trial: Trial) -> bool:
    """Return whether a trial was trained, ended early or cannot be trained."""
    return any(files.exists(files.join(folder_of(out, trial), name)) for name in _OVER)


def sum_up(out: str, trial: Trial) -> Row:
    """Sum up a trial by what lies in its folder."""
    folder = folder_of(out, trial)
    history = read_history(folder)
    row: Row = {
        "trial": trial.name,
        "folder": folder,
        "values": trial.values,
        "status": "stopped early",
        "why": "",
        "history": history,
        "epochs": len(history),
        "seconds": sum(entry["seconds"] for entry in history),
    }
    best = max(history, key=lambda entry: entry["score"], default=None)
    for name in ("score", "f1", "iou"):
        row[name] = best[name] if best else None
    if files.exists(files.join(folder, "model.yaml")):
        row["status"] = "trained"
    elif files.exists(files.join(folder, "failed.json")):
        why = files.read_json(files.join(folder, "failed.json"))["why"]
        row |= {"status": "failed", "why": why}
    elif not history:
        row |= {"status": "failed", "why": "its process died; run again to go on"}
    return row
