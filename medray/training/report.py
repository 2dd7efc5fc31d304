"""The pages of a training and of a sweep: curves and examples, and a leaderboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medray.evaluation import (
    ACCENT,
    AGREEMENT,
    SOFT,
    as_svg,
    data_uri,
    finish_axes,
    render,
)
from medray.models import ModelConfig
from medray.storage import files, flat
from medray.types import Row

_SCORES = {"f1": "F1", "iou": "IoU", "small_recall": "recall of small objects"}
_IMAGE_SCORES = {"f1": "F1", "accuracy": "accuracy", "specificity": "specificity"}


# --- a training -----------------------------------------------------------------------


def write_training_report(
    out: str, config: ModelConfig, metrics: Row, examples: Sequence[bytes]
) -> None:
    """Write training.html into a model folder.

    Args:
        out: The folder.
        config: Its configuration; `provenance` says of what it was made.
        metrics: What metrics.json holds.
        examples: Pictures of validation patches, by
            `medray.evaluation.overlay.draw_overlay`.
    """
    history, kind, best = metrics["history"], config.architecture, metrics["epoch"]
    page = render(
        "training.html.jinja",
        title=f"Training of {kind.name} on {kind.encoder}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=config.classes,
        metrics=metrics,
        of_images=kind.name == "classifier",
        seconds=sum(entry["seconds"] for entry in history),
        said=metrics.get("warnings", []),
        warnings=_warnings(history),
        curves={
            "Loss": _curves(
                history,
                {"loss": "training", "val_loss": "validation"},
                metrics["epoch"],
            ),
            "Scores on the validation patches": _curves(
                history,
                _IMAGE_SCORES if kind.name == "classifier" else _SCORES,
                metrics["epoch"],
            ),
            "Learning rate": _curves(history, {"learning_rate": ""}, best),
            "Crops per second": _curves(history, {"crops_per_second": ""}, best),
        },
        phases=_phases(history),
        legend=AGREEMENT,
        examples=[data_uri(picture) for picture in examples],
        repeats=metrics.get("repeats"),
        teacher=metrics.get("teacher"),
        provenance=_provenance(config),
    )
    files.write_bytes(files.join(out, "training.html"), page.encode())


def _warnings(history: Sequence[Row]) -> list[str]:
    warned = [
        f"epoch {entry['epoch']}: {entry['warning']}"
        for entry in history
        if entry.get("warning")
    ]
    damaged = history[-1]["damaged"] if history else 0
    if damaged:
        warned.append(f"{damaged} damaged patches were left out")
    return warned


def _phases(history: Sequence[Row]) -> list[Row]:
    """Return a row for each phase that was reached: its epochs and what learned."""
    rows: dict[int, Row] = {}
    for entry in history:
        if "phase" not in entry:
            continue
        start = {"first": entry["epoch"], "learning": [], "importance": {}} | entry
        row = rows.setdefault(entry["phase"], start)
        row["last"] = entry["epoch"]
    return list(rows.values())


def _provenance(config: ModelConfig) -> dict[str, str]:
    provenance = config.provenance
    rows = {
        "digest": str(provenance.get("digest", "")),
        "data": str(provenance.get("data", "")),
        "resolution": f"{config.mpp} um per pixel" if config.mpp else "level 0",
        "window": f"{config.window.size} px, stride {config.window.stride} px",
    }
    for name, version in provenance.get("versions", {}).items():
        rows[name] = version
    recipe = flat(provenance.get("recipe", {}))
    return rows | {k: str(value) for k, value in recipe.items() if value is not None}


def _curves(history: Sequence[Row], names: Mapping[str, str], best: int) -> Markup:
    """Draw values by epoch; a line stands at the epoch that was kept."""
    figure = Figure(figsize=(5.6, 2.6), layout="constrained")
    axes = figure.subplots()
    colors = (ACCENT, "#d55e00", "#009e73")  # as the overlays have them
    for (name, label), color in zip(names.items(), colors, strict=False):
        points = [
            (entry["epoch"], entry[name])
            for entry in history
            if entry.get(name) is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=color, label=label, marker=".", linewidth=1.6)
    axes.axvline(best, color=SOFT, linewidth=1, linestyle=":")
    if any(names.values()) and axes.lines[:-1]:
        axes.legend(frameon=False, labelcolor=SOFT, fontsize=9)
    if names in (_SCORES, _IMAGE_SCORES):
        axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish_axes(axes, "epoch")
    return as_svg(figure)


# --- a sweep --------------------------------------------------------------------------


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
    values.sort(key=lambda text: (_as_number(text), text))
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


def _as_number(text: str) -> float:
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
