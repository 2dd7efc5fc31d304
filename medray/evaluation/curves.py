"""How good a segmentation would be at other thresholds, and how sure it may be.

Probabilities are kept as uint8, so histograms of 256 levels tell all there is, and add
up over regions and slides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure

from medray.classes import Classes
from medray.evaluation.calibration import BINS
from medray.evaluation.html import ACCENT, SOFT, as_svg, finish_axes
from medray.types import UInt8

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

LEVELS = 256


def count_levels(truth: UInt8, predicted: UInt8, probabilities: UInt8) -> Counts:
    """Count pixels by their probability.

    Args:
        truth: (N,) label values.
        predicted: (N,) label values.
        probabilities: (C, N) uint8, 255 is certain; all 0 where nothing was predicted.

    Returns:
        (C + 1, 2, 256) int64. Row c: pixels by the probability of class c, first those
        that are not of the class, then those that are. The last row: by the probability
        of the class that was predicted, first the wrong ones, then the right ones.
    """
    classes = len(probabilities)
    chosen = np.take_along_axis(probabilities, predicted[None].astype(np.intp), 0)[0]
    pairs = [(probabilities[c], truth == c) for c in range(classes)]
    pairs.append((chosen, truth == predicted))
    return np.stack([_histogram(levels, holds) for levels, holds in pairs])


def _histogram(levels: UInt8, holds: npt.NDArray[np.bool_]) -> Counts:
    both = levels + (holds.astype(np.uint16) << 8)
    return np.bincount(both, minlength=2 * LEVELS).reshape(2, LEVELS).astype(np.int64)


def precision_recall(counts: Counts) -> tuple[Floats, Floats]:
    """Give precision and recall of a class at each threshold, from 255 down to 0.

    Args:
        counts: (2, 256), see `count_levels`; the class occurs.

    Returns:
        (256,) each; precision is 1 where nothing reaches the threshold.
    """
    wrong, right = np.cumsum(counts[:, ::-1], axis=1)
    found = wrong + right
    precision = np.where(found > 0, right / np.maximum(found, 1), 1.0)
    return precision, right / right[-1]


def average_precision(counts: Counts) -> float | None:
    """Give the area under a class's curve of precision over recall; None: no pixel.

    Precision weighted by the step in recall at each threshold, without interpolation
    (as scikit-learn's average_precision_score).
    """
    if not counts[1].any():
        return None
    precision, recall = precision_recall(counts)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def best_threshold(counts: Counts) -> tuple[float, float] | None:
    """Give the probability at which a class would have its highest F1, and that F1.

    Chosen on the very slides that are scored, so it is an upper bound; None: no pixel.
    """
    if not counts[1].any():
        return None
    precision, recall = precision_recall(counts)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1.argmax())
    return (LEVELS - 1 - best) / (LEVELS - 1), float(f1[best])


def reliability(counts: Counts) -> tuple[Floats, Floats, Counts]:
    """Sort pixels into bins by the probability of the class that was predicted.

    Pixels of probability 0 were not looked at and are left out.

    Args:
        counts: (2, 256), the last row of `count_levels`.

    Returns:
        (BINS,) mean probability, share that is right (both 0 of an empty bin), pixels.
    """
    shares = np.arange(LEVELS) / (LEVELS - 1)
    place = np.minimum((shares * BINS).astype(int), BINS - 1)
    each = counts.sum(axis=0)
    each[0] = 0
    pixels: Counts = np.bincount(place, each, BINS).astype(np.int64)
    used = np.maximum(pixels, 1)
    right = np.where(each > 0, counts[1], 0)
    return (
        np.bincount(place, each * shares, BINS) / used,
        np.bincount(place, right, BINS) / used,
        pixels,
    )


def calibration_error(counts: Counts) -> float | None:
    """Give the expected calibration error (Guo et al. 2017) of pixels; None: none."""
    confidence, accuracy, pixels = reliability(counts)
    total = int(pixels.sum())
    if not total:
        return None
    return float((np.abs(confidence - accuracy) * pixels).sum() / total)


def summed_up(counts: Counts, names: Sequence[str]) -> dict[str, Any]:
    """Give what metrics.json has of the curves.

    Args:
        counts: See `count_levels`.
        names: Of the classes.

    Returns:
        `calibration_error`, and `per_class`: `class`, `average_precision`,
        `best_threshold` and `best_f1`, of each class but the background; None where
        the class does not occur.
    """
    rows = []
    for value, name in enumerate(names[1:], 1):
        best = best_threshold(counts[value]) or (None, None)
        rows.append(
            {
                "class": name,
                "average_precision": average_precision(counts[value]),
                "best_threshold": best[0],
                "best_f1": best[1],
            }
        )
    return {"calibration_error": calibration_error(counts[-1]), "per_class": rows}


def draw_precision_recall(counts: Counts, classes: Classes) -> Markup:
    """Draw a curve a class, the background apart, as an SVG element."""
    figure = Figure(figsize=(4.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for value, name in enumerate(classes.names[1:], 1):
        if counts[value][1].any():
            precision, recall = precision_recall(counts[value])
            axes.plot(recall, precision, color=classes.colors[value], label=name)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.legend(frameon=False, loc="lower left", labelcolor=SOFT)
    finish_axes(axes, "recall", "precision")
    return as_svg(figure)


def draw_reliability(counts: Counts) -> Markup:
    """Draw how often pixels are right, by how sure the model was, as an SVG element."""
    confidence, accuracy, pixels = reliability(counts[-1])
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
