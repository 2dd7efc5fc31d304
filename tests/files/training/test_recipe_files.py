"""Recipes by name: found wherever medray lies, and never mistaken for files."""

from pathlib import Path

import pytest

from medray import cli
from medray.errors import ConfigError
from medray.training.recipe import read_recipe
from medray.training.recipe_files import (
    RECIPES,
    SLIDE_MODELS,
    SWEEPS,
    find_recipe,
    list_recipes,
)


def test_each_recipe_says_in_its_first_line_what_it_is() -> None:
    found = list_recipes().recipes
    assert len(found) == len([*RECIPES.rglob("*.yaml")])
    for recipe in found:
        assert recipe.about.endswith("."), recipe
        assert 20 < len(recipe.about) < 90, recipe


def test_a_name_is_found_and_a_path_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_recipe("unet") == str(RECIPES / "unet.yaml")
    assert find_recipe("gastric-fcn8s", SWEEPS) == str(SWEEPS / "gastric-fcn8s.yaml")
    assert find_recipe("linear", SLIDE_MODELS) == str(SLIDE_MODELS / "linear.yaml")
    for path in ("./own", "own/u.yml", "own.yaml", "s3://bucket/r.yaml"):
        assert find_recipe(path) == path
    # A file counts where it looks like a path only.
    monkeypatch.chdir(tmp_path)
    for name in ("unet", "unet.yaml"):
        Path(name).write_text("batch: 3")
    assert find_recipe("unet") == str(RECIPES / "unet.yaml")
    assert read_recipe("unet.yaml").batch == 3
    assert read_recipe("./unet").batch == 3


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("unt", RECIPES, "unt: no recipe .* nearest: unet.*`medray recipes`"),
        ("nothing-like-it", SLIDE_MODELS, "nearest: attention-mil, linear;"),
        ("attention-mil", RECIPES, "goes with `medray train NAME --labels CSV`, not"),
        ("unet", SWEEPS, "goes with `medray train NAME`, not with `medray tune"),
        ("cervical", SWEEPS, "goes with `medray train NAME`, not with `medray tune"),
        ("recipes/unet.yaml", RECIPES, "no such file; `unet` alone is the recipe"),
        ("../unet", RECIPES, None),
    ],
)
def test_a_wrong_name_is_explained(
    name: str,
    folder: Path,
    message: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    message = message or "there is no such file"
    with pytest.raises(ConfigError, match=message):
        find_recipe(name, folder)


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "medray train NAME"
    assert "medray tune NAME" in lines
    assert any(line.startswith("  unet ") and "U-Net" in line for line in lines)
    assert lines[-2] == f"folder  {RECIPES}"
