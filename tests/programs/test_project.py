"""Habits of the project that files must keep: versions, decisions, changes."""

import re
import tomllib
from pathlib import Path

import pytest
from documents import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def asked_for() -> list[str]:
    """Every requirement of medray, its extras, its groups and its build."""
    extras = PROJECT["project"]["optional-dependencies"].values()
    groups = PROJECT["dependency-groups"].values()
    found = [*PROJECT["project"]["dependencies"], *PROJECT["build-system"]["requires"]]
    return found + [line for lines in (*extras, *groups) for line in lines]


def test_every_package_is_pinned_within_its_bounds() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split(" ;")[0].split("==") for line in lines)
    for text in asked_for():
        wanted = Requirement(text)
        assert wanted.specifier.contains(pins[canonicalize_name(wanted.name)]), text


def test_the_pins_name_no_index() -> None:
    text = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"://|^-|@", text, re.MULTILINE)


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs/decisions").glob("*.md")), ids=lambda p: p.stem
)
def test_a_decision_says_whether_it_stands(path: Path) -> None:
    title, _, status, blank, *_ = path.read_text().splitlines()
    assert title.startswith("# ")
    assert blank == ""
    found = re.fullmatch(
        r"Status: (?:accepted|superseded by (\d{4})), \d{4}-\d\d-\d\d", status
    )
    assert found, status
    if found[1]:
        assert [*path.parent.glob(f"{found[1]}-*.md")]


def test_changes_are_named_by_their_kind() -> None:
    kinds = {kind["directory"] for kind in PROJECT["tool"]["towncrier"]["type"]}
    for path in (ROOT / "changelog.d").iterdir():
        if path.name == "template.md.jinja":
            continue
        name, kind, ending = path.name.split(".")
        assert name
        assert (kind in kinds, ending) == (True, "md"), path.name


def test_the_changelog_has_this_version_or_fragments_for_it() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    version = PROJECT["project"]["version"]
    fragments = [*(ROOT / "changelog.d").glob("*.md")]
    assert fragments or f"\n## {version} - " in text
