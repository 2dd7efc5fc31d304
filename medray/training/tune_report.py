"""The report of a sweep: a leaderboard (HTML and CSV) and what each value was worth."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medray.evaluation.html import ACCENT, SOFT, as_svg, finish_axes, render
from medray.storage import files
from medray.types import Row


def write_tune_report(
    out: str, keys: Sequence[str], rows: Sequence[Row], best: Row
) -> str:
    """Write tune.html and leaderboard.csv into a sweep's folder.

    Args:
        out: The folder.
        keys: Of the grid.
        rows: The trials, best first: values, status, why, epochs, seconds, f1, iou and
            history (entries of metrics.jsonl).
        best: The one whose model was kept.

    Returns:
        The page's address.
    """
    columns = ("status", "f1", "iou", "epochs", "seconds", "why")
    table = pd.DataFrame(
        [row["values"] | {name: row[name] for name in columns} for row in rows]
    )
    csv = table.to_csv(index=False)
    files.write_bytes(files.join(out, "leaderboard.csv"), csv.encode())
    page = render(
        "tune.html.jinja",
        title=f"Sweep of {len(rows)} trainings",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        keys=keys,
        rows=rows,
        best=best,
        pictures={
            **{f"By {key}": _by_value(rows, key) for key in keys},
            "By epoch": _by_epoch(rows, best),
        },
    )
    uri = files.join(out, "tune.html")
    files.write_bytes(uri, page.encode())
    return uri


def _by_value(rows: Sequence[Row], key: str) -> Markup:
    """Draw the trials' F1 by their value of a key; a line joins the values' best."""
    values = list(dict.fromkeys(str(row["values"][key]) for row in rows))
    values.sort(key=lambda text: (_number(text), text))
    points = [
        (values.index(str(row["values"][key])), row["f1"])
        for row in rows
        if row["f1"] is not None
    ]
    figure = Figure(figsize=(5.6, 2.6), layout="constrained")
    axes = figure.subplots()
    for place, f1 in points:
        axes.plot(place, f1, "o", color=ACCENT, alpha=0.5)
    best = {place: max(f1 for at, f1 in points if at == place) for place, _ in points}
    axes.plot(sorted(best), [best[place] for place in sorted(best)], color=ACCENT)
    axes.set_xticks(range(len(values)), values)
    axes.set_xlim(-0.5, len(values) - 0.5)
    _finish(axes, key)
    return as_svg(figure)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("inf")


def _by_epoch(rows: Sequence[Row], best: Row) -> Markup:
    figure = Figure(figsize=(5.6, 2.6), layout="constrained")
    axes = figure.subplots()
    for row in reversed(rows):
        points = [(e["epoch"], e["f1"]) for e in row["history"] if e["f1"] is not None]
        if points:
            mine = row is best
            axes.plot(
                *zip(*points, strict=True),
                color=ACCENT if mine else SOFT,
                alpha=1 if mine else 0.35,
                linewidth=1.8 if mine else 1,
                marker=".",
            )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, "epoch")
    return as_svg(figure)


def _finish(axes: Any, label: str) -> None:
    axes.set_ylim(0, 1)
    finish_axes(axes, label, "F1")
