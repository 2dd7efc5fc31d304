"""A segmentation's scores at other thresholds, and its calibration.

Probabilities are kept as uint8, so histograms of 256 levels are exact, and add up over
regions and slides.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.evaluation.calibration import (
    Reliability,
    calibration_error,
    reliability,
)
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
    """Return precision and recall of a class at each threshold, from 255 down to 0.

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
    """Return the area under a class's curve of precision over recall; None: no pixel.

    Precision weighted by the step in recall at each threshold, without interpolation
    (as scikit-learn's average_precision_score).
    """
    if not counts[1].any():
        return None
    precision, recall = precision_recall(counts)
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def best_threshold(counts: Counts) -> tuple[float, float] | None:
    """Return the probability at which a class would have its highest F1, and that F1.

    Chosen on the very slides that are scored, so it is an upper bound; None: no pixel.
    """
    if not counts[1].any():
        return None
    precision, recall = precision_recall(counts)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(f1.argmax())
    return (LEVELS - 1 - best) / (LEVELS - 1), float(f1[best])


def reliability_of_pixels(counts: Counts) -> Reliability:
    """Sort pixels into bins by the probability of the class that was predicted.

    Pixels of probability 0 were not looked at and are left out.

    Args:
        counts: (2, 256), the last row of `count_levels`.
    """
    looked_at = counts * (np.arange(LEVELS) > 0)
    confidence = np.arange(LEVELS) / (LEVELS - 1)
    return reliability(confidence, looked_at[1], looked_at.sum(axis=0))


def curve_scores(counts: Counts, names: Sequence[str]) -> dict[str, Any]:
    """Return what metrics.json has of the curves.

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
    error = calibration_error(reliability_of_pixels(counts[-1]))
    return {"calibration_error": error, "per_class": rows}
