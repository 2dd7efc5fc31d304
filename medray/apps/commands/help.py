"""A page of help that fits a screen: one line per option, without frames."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cyclopts.help import HelpEntry, HelpPanel
    from rich.console import Console, ConsoleOptions

_WIDTH = 100
"""Columns of a page; fewer where the terminal has fewer."""


def page() -> Console:
    """Return where a page of help is printed."""
    from rich.console import Console

    width = min(shutil.get_terminal_size((_WIDTH, 0)).columns, _WIDTH)
    return Console(width=width, highlight=False)


class Page:
    """Prints the parts of a page of help, as cyclopts asks for them."""

    def render_usage(
        self, console: Console, options: ConsoleOptions, text: Any
    ) -> None:
        """Print how the command is called, on one line."""
        console.print(str(text).strip())

    def render_description(
        self, console: Console, options: ConsoleOptions, text: Any
    ) -> None:
        """Print what the command does, and an empty line."""
        console.print(text)

    def __call__(
        self, console: Console, options: ConsoleOptions, panel: HelpPanel
    ) -> None:
        """Print a group of commands or options."""
        if panel.entries:
            _print_group(console, panel)


def _print_group(console: Console, panel: HelpPanel) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(max_width=console.width * 2 // 5)
    table.add_column()
    for entry in panel.entries:
        names = " ".join(entry.display_labels_with_metavar)
        table.add_row(Text(f"  {names}"), Text(_description(entry)))
    console.print(Text(f"{panel.title}:", style="bold"))
    console.print(table)


def shown_default(value: Any) -> str | None:
    """Return a default as it would be typed; None where there is nothing to show."""
    if value is None or value is False or value in ("", ()):
        return None
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _description(entry: HelpEntry) -> str:
    text = getattr(entry.description, "primary_renderable", entry.description)
    text = str(text or "").strip()
    notes = ["required"] if entry.required else []
    if entry.choices:
        others = [choice for choice in entry.choices if choice != entry.default]
        *firsts, last = others
        words = f"{', '.join(firsts)} or {last}" if firsts else last
        notes.insert(0, f"{entry.default}, else {words}" if entry.default else words)
    elif entry.default:
        notes.append(f"default {entry.default}")
    return f"{text} ({'; '.join(notes)})" if notes else text
