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
from medray.training.recipe import Recipe, read_recipe
from medray.training.recipe_files import SWEEPS, find_recipe, is_path

Grid = Mapping[str, Sequence[Any]]
_MOST_TRIALS = 1000


@dataclass(frozen=True)
class Trial:
    """One combination of a grid's values.

    Attributes:
        name: Tells the values; its folder's name too.
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
