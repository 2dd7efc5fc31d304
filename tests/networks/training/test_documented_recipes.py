"""What the pages say of recipes is read as they are; tests/programs has the rest."""

from pathlib import Path

import yaml
from documents import blocks, of_medray

from medray.apps import parse
from medray.slides.quality_limits import read_limits
from medray.training.recipe import read_recipe
from medray.training.recipe_files import RECIPES, is_path


def test_overrides_of_commands_are_keys_of_their_recipes() -> None:
    read = 0
    for _, words in of_medray():
        if words == ["COMMAND", "--help"]:
            continue
        request = parse(words)
        given = request.given
        recipe = given.get("recipe", "RECIPE")
        if recipe == "RECIPE" or is_path(recipe) or "labels" in given:
            continue
        if request.command == "train" or "grid" in given:
            read_recipe(recipe, given.get("overrides", ()))
            read += 1
    assert read > 4


def test_yaml_is_part_of_a_recipe_or_limits_of_quality(tmp_path: Path) -> None:
    found = [*blocks("yaml")]
    assert {page for page, _ in found} == {"docs/nights.md", "docs/training.md"}
    for number, (page, text) in enumerate(found):
        if page == "docs/nights.md":
            limits = tmp_path / "qc.yaml"
            limits.write_text(text)
            assert read_limits(str(limits)) != read_limits("default")
            continue
        recipe = yaml.safe_load((RECIPES / "cells-small.yaml").read_text())
        path = tmp_path / f"{number}.yaml"
        path.write_text(
            yaml.safe_dump(recipe | {"weights": "imagenet"} | yaml.safe_load(text))
        )
        read_recipe(str(path))
