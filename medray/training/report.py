"""The report of a training: one HTML page with its curves and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from medray.evaluation.html import ACCENT, SOFT, as_svg, data_uri, finish_axes, render
from medray.evaluation.overlay import AGREEMENT
from medray.models.config import ModelConfig
from medray.storage import files
from medray.storage.yaml_config import flat
from medray.types import Row

_SCORES = {"f1": "F1", "iou": "IoU", "small_recall": "recall of small objects"}
_IMAGE_SCORES = {"f1": "F1", "accuracy": "accuracy", "specificity": "specificity"}


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
    """Say of each phase that was reached which epochs it took and what learned."""
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
