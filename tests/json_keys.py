"""The keys of `--json` into docs/json.md: `python tests/json_keys.py`.

They are the fields of the results that the commands' functions return, described by
their docstrings. tests/networks/apps/test_results.py says when the page is out of date.
"""

import dataclasses
import importlib
import typing
from pathlib import Path
from typing import Any

from docstring_parser import parse

from medray.apps.commands.table import COMMANDS

PAGE = Path(__file__).resolve().parents[1] / "docs" / "json.md"
START = "<!-- from here on written by tests/json_keys.py -->\n"
ANNOUNCED = {"view": "medray.apps.viewer.server:Viewing"}
"""Results that are printed before the command ends."""
NONE = {"serve"}
"""Commands that print nothing but what they log."""


def results() -> dict[type[Any], list[str]]:
    """Return the results of all commands, each with the commands that have it."""
    found: dict[type[Any], list[str]] = {}
    for name, command in COMMANDS.items():
        if name in NONE:
            continue
        if name in ANNOUNCED:
            kinds = [_get(ANNOUNCED[name])]
        else:
            functions = map(_get, command.functions + command.dry_run)
            kinds = [typing.get_type_hints(one)["return"] for one in functions]
        for kind in dict.fromkeys(kinds):
            found.setdefault(kind, []).append(name)
    return found


def render() -> str:
    """Return the part of the page that is written here."""
    lines = []
    for kind, commands in results().items():
        docs = parse(kind.__doc__ or "")
        texts = {
            p.arg_name: " ".join((p.description or "").split()) for p in docs.params
        }
        names = [field.name for field in dataclasses.fields(kind)]
        assert [*texts] == names, f"{kind}: describes {[*texts]}, has {names}"
        names_of = ", ".join(f"`{name}`" for name in commands)
        lines += [f"## {names_of}: {kind.__name__}", ""]
        lines += [f"{docs.short_description}", "", "| key | what |", "| --- | --- |"]
        lines += [f"| `{name}` | {text} |" for name, text in texts.items()]
        lines.append("")
    return "\n".join(lines)


def _get(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    head, _, _ = PAGE.read_text().partition(START)
    PAGE.write_text(f"{head}{START}\n{render()}")
