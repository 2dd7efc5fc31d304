"""The recipes and sweeps that come with medray, by name.

A recipe is a YAML file below `recipes/` next to this module, so it is part of each
installation; its name is the file without `.yaml`, and its first line, a comment, says
what it is. Which folder a name is looked up in depends on the command.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from medray.errors import ConfigError
from medray.storage import files

RECIPES = Path(__file__).parent / "recipes"
SWEEPS = RECIPES / "sweeps"
SLIDE_MODELS = RECIPES / "slide_models"

_COMMANDS = {
    RECIPES: "medray train NAME",
    SLIDE_MODELS: "medray train NAME --labels CSV",
    SWEEPS: "medray tune NAME",
}


@dataclass(frozen=True)
class RecipeFile:
    """A recipe or sweep that comes with medray.

    Attributes:
        name: To give instead of a path.
        command: That takes it.
        about: What it is, in one line.
    """

    name: str
    command: str
    about: str


@dataclass(frozen=True)
class RecipeList:
    """What `medray recipes` lists.

    Attributes:
        recipes: By command, then by name; each with `name`, `command` and `about`.
        folder: Where their files lie, to copy one.
    """

    recipes: list[RecipeFile]
    folder: str

    def __str__(self) -> str:
        width = max(len(recipe.name) for recipe in self.recipes)
        lines: list[str] = []
        for recipe in self.recipes:
            if recipe.command not in lines:
                lines += ["", recipe.command]
            lines.append(f"  {recipe.name:{width}}  {recipe.about}")
        lines += ["", f"folder  {self.folder}"]
        return "\n".join([*lines[1:], f"{len(self.recipes)} recipes and sweeps"])


def list_recipes() -> RecipeList:
    """Return all recipes and sweeps that come with medray."""
    recipes = [
        RecipeFile(path.stem, command, _about(path))
        for folder, command in _COMMANDS.items()
        for path in sorted(folder.glob("*.yaml"))
    ]
    return RecipeList(recipes, str(RECIPES))


def is_path(recipe: str) -> bool:
    """Return whether a recipe is given by path: with a `/` or the ending `.yaml`.

    All else is a name, even if the working directory has such a file.
    """
    return "/" in recipe or recipe.endswith(".yaml")


def find_recipe(recipe: str, folder: Path = RECIPES) -> str:
    """Return the path of a recipe that is given by name or by path.

    Args:
        recipe: A path, which is returned as it is, or a name.
        folder: Where names are looked up: RECIPES, SWEEPS or SLIDE_MODELS.

    Raises:
        ConfigError: No recipe of this name goes with this command.
    """
    names = _names(folder)
    if is_path(recipe):
        name = recipe.rpartition("/")[2].removesuffix(".yaml")
        if name in names and not files.exists(recipe):
            raise ConfigError(
                f"{recipe}: there is no such file; `{name}` alone is the recipe that "
                f"comes with medray"
            )
        return recipe
    if recipe in names:
        return str(folder / f"{recipe}.yaml")
    for other, command in _COMMANDS.items():
        if recipe in _names(other):
            raise ConfigError(
                f"{recipe}: goes with `{command}`, not with `{_COMMANDS[folder]}`; "
                f"`medray recipes` lists both"
            )
    nearest = difflib.get_close_matches(recipe, names, n=3, cutoff=0.3) or names
    raise ConfigError(
        f"{recipe}: no recipe for `{_COMMANDS[folder]}` has this name; nearest: "
        f"{', '.join(nearest)}; `medray recipes` lists all, and a file of your own has "
        f"a / in its path or ends in .yaml"
    )


def find_slide_recipe(recipe: str) -> str:
    """Return the path of a recipe of a slide model, given by name or by path.

    Raises:
        ConfigError: There is none of this name.
    """
    return find_recipe(recipe, SLIDE_MODELS)


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def _about(path: Path) -> str:
    """Return the first line of a recipe, without the mark of a comment."""
    with path.open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
