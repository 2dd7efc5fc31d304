"""What README and docs tell people to type is accepted, is there, and runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from documents import PAGES, ROOT, of_medray

from medray.apps import parse
from medray.training.recipe_files import (
    RECIPES,
    SLIDE_MODELS,
    SWEEPS,
    find_recipe,
    is_path,
)


@pytest.mark.parametrize(
    ("page", "words"),
    [
        pytest.param(page, words, id=f"{page}-{words[0]}-{number}")
        for number, (page, words) in enumerate(of_medray())
        if words != ["COMMAND", "--help"]
    ],
)
def test_a_command_is_accepted(page: str, words: list[str]) -> None:
    request = parse(words)  # exits where it is wrong
    assert request.command == words[0]
    given = request.given
    recipe = given.get("recipe", "RECIPE")
    if recipe == "RECIPE" or is_path(recipe):
        return
    if request.command == "tune" and "grid" not in given:
        recipe = yaml.safe_load(Path(find_recipe(recipe, SWEEPS)).read_text())["recipe"]
    find_recipe(recipe, SLIDE_MODELS if "labels" in given else RECIPES)


def test_there_are_commands_to_look_at() -> None:
    found = [words[0] for _, words in of_medray()]
    assert len(found) > 40
    assert {"ingest", "train", "infer", "evaluate", "nightly", "view"} <= {*found}


def test_files_that_are_named_are_there() -> None:
    """In shell blocks and in `code`: scripts, recipes, folders of configuration."""
    missing = []
    for page in PAGES:
        text = page.read_text()
        named = re.findall(
            r"(?<![\w./-])((?:benchmarks|jobs|k8s|cluster|docs|tests)/[\w./-]*\w)",
            text,
        )
        missing += [f"{page.name}: {n}" for n in named if not (ROOT / n).exists()]
    assert missing == []


def slug(heading: str) -> str:
    """Name a heading as GitHub does."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", ""))
    return kept.replace(" ", "-")


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if target.startswith(("http://", "https://", "mailto:")):
                continue
            path, _, anchor = target.partition("#")
            place = (page.parent / path).resolve() if path else page
            if not place.exists():
                broken.append(f"{page.name}: {target}")
            elif anchor and place.suffix == ".md":
                headings = re.findall(r"^#+ (.*)$", place.read_text(), re.MULTILINE)
                if anchor not in map(slug, headings):
                    broken.append(f"{page.name}: {target}")
    assert broken == []


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    # With --quiet warnings are not counted, and --strict finds nothing.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    command += ["--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "reference" / "index.html").read_text()
    assert "medray.inference.infer_run.infer" in page
    assert "ConfigError" in page
