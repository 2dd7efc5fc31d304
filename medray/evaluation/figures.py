"""What the reports draw: curves, reliability and distributions, as SVG elements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure
from sklearn.metrics import precision_recall_curve, roc_curve

from medray.classes import Classes
from medray.evaluation.calibration import reliability_of_images, scaled
from medray.evaluation.curves import Counts, precision_recall, reliability_of_pixels
from medray.evaluation.html import (
    ACCENT,
    INK,
    LINE,
    SOFT,
    as_svg,
    finish_axes,
    name_above,
)
from medray.evaluation.image_metrics import Predicted, image_columns
from medray.types import Row

# --- slides ---------------------------------------------------------------------------


def draw_distribution(values: Sequence[float]) -> Markup:
    """Draw one dot per slide, and a box around the middle half."""
    figure = Figure(figsize=(5.6, 1.9), layout="constrained")
    axes = figure.subplots()
    many = len(values) > 300
    if len(values) >= 5:
        axes.boxplot(
            values,
            orientation="horizontal",
            widths=0.55,
            showfliers=False,
            boxprops={"color": SOFT},
            whiskerprops={"color": SOFT},
            capprops={"color": SOFT},
            medianprops={"color": INK, "linewidth": 2},
            zorder=4,
        )
    jitter = np.random.default_rng(0).uniform(-0.18, 0.18, len(values))
    axes.scatter(
        values,
        1 + jitter,
        s=6 if many else 24,
        alpha=0.25 if many else 0.55,
        color=ACCENT,
        linewidths=0,
        zorder=3,
        rasterized=many,  # thousands of vector dots would bloat the page
    )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(0.6, 1.4)
    axes.set_yticks([])
    axes.set_xlabel("F1 of each slide", color=SOFT)
    axes.tick_params(colors=SOFT)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    return as_svg(figure)


def draw_pairs(rows: Sequence[Row]) -> Markup:
    """Draw one dot per slide: its F1 in run A and in run B."""
    pairs = [(r["f1"], r["other_f1"]) for r in rows if r["difference"] is not None]
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axes = figure.subplots()
    least = max(0.0, min((min(pair) for pair in pairs), default=0.0) - 0.05)
    axes.plot([least, 1], [least, 1], color=SOFT, linewidth=1)
    axes.scatter(
        [ours for ours, _ in pairs],
        [theirs for _, theirs in pairs],
        s=24 if len(pairs) <= 300 else 6,
        alpha=0.55,
        color=ACCENT,
        linewidths=0,
        zorder=3,
        rasterized=len(pairs) > 300,
    )
    axes.set_xlim(least, 1.01)
    axes.set_ylim(least, 1.01)
    axes.set_aspect("equal")
    finish_axes(axes, "F1 in A", "F1 in B")
    return as_svg(figure)


# --- pixels ---------------------------------------------------------------------------


def draw_precision_recall(counts: Counts, classes: Classes) -> Markup:
    """Draw one curve per class but the background."""
    figure = Figure(figsize=(4.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for value, name in enumerate(classes.names[1:], 1):
        if counts[value][1].any():
            precision, recall = precision_recall(counts[value])
            axes.plot(recall, precision, color=classes.colors[value], label=name)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    name_above(axes)
    finish_axes(axes, "recall", "precision")
    return as_svg(figure)


def draw_reliability(counts: Counts) -> Markup:
    """Draw how often pixels are right, by how sure the model was."""
    confidence, accuracy, pixels = reliability_of_pixels(counts[-1])
    seen = pixels > 0
    figure = Figure(figsize=(4.4, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color=SOFT, linewidth=1)
    axes.plot(confidence[seen], accuracy[seen], color=ACCENT, linewidth=1.5)
    area = 15 + 150 * pixels[seen] / pixels.max()
    axes.scatter(
        confidence[seen], accuracy[seen], s=area, color=ACCENT, zorder=3, clip_on=False
    )
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    finish_axes(axes, "probability of the predicted class", "share that is right")
    return as_svg(figure)


# --- images ---------------------------------------------------------------------------


def draw_image_curves(
    rows: Sequence[Predicted], names: Sequence[str], temperature: float | None = None
) -> dict[str, Markup]:
    """Draw ROC, precision over recall, and reliability, of images, by name."""
    truth, predicted, probabilities, logs = image_columns(rows)
    shown = [1] if len(names) == 2 else range(len(names))
    roc, pr = Figure(figsize=(4, 3.6)), Figure(figsize=(4, 3.6))
    for label in shown:
        shares, is_label = probabilities[:, label], truth == label
        if not 0 < is_label.sum() < len(truth):
            continue
        fpr, tpr, _ = roc_curve(is_label, shares)
        precision, recall, _ = precision_recall_curve(is_label, shares)
        color = ACCENT if len(names) == 2 else None
        roc.gca().plot(fpr, tpr, label=names[label], color=color)
        pr.gca().plot(recall, precision, label=names[label], color=color)
    roc.gca().plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=":")
    sure = Figure(figsize=(4, 3.6))
    axes = sure.gca()
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=":")
    curves = {"as it is": (probabilities, ACCENT)}
    if temperature is not None:
        words = f"at temperature {temperature:.2f}"
        curves[words] = (scaled(logs, temperature), SOFT)
    for words, (shares, color) in curves.items():
        confidence, right, count = reliability_of_images(shares, predicted, truth)
        used = count > 0
        axes.plot(confidence[used], right[used], "o-", color=color, label=words)
    figures = {
        "ROC": (roc, "false positive rate", "recall (sensitivity)"),
        "Precision and recall": (pr, "recall", "precision"),
        "Reliability": (sure, "confidence", "share that is right"),
    }
    return {name: _finished(figure, x, y) for name, (figure, x, y) in figures.items()}


def _finished(figure: Figure, x: str, y: str) -> Markup:
    axes = figure.gca()
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    finish_axes(axes, x, y)
    if axes.get_legend_handles_labels()[0]:
        name_above(axes)
    return as_svg(figure)
