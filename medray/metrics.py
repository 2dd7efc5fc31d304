"""Scores as pure functions of confusion counts.

Counts are int64 (C, C): rows are the truth, columns the prediction, class 0 is the
background. Definitions: F1 = Dice = 2 TP / (2 TP + FP + FN) (Dice 1945), IoU = TP /
(TP + FP + FN) (Jaccard 1912). A score whose denominator is 0 is undefined: None.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]

SCORES = ("f1", "iou", "precision", "recall", "specificity")


def confusion(
    truth: npt.NDArray[Any], predicted: npt.NDArray[Any], n_classes: int
) -> Counts:
    """Count truth against prediction.

    Args:
        truth: Label values, any shape.
        predicted: Label values of the same shape.
        n_classes: C; every label must be below it.

    Returns:
        (C, C) int64.

    Raises:
        ValueError: The shapes differ, or a label is not below `n_classes`.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth is {truth.shape}, prediction {predicted.shape}")
    highest = max(truth.max(initial=0), predicted.max(initial=0))
    if highest >= n_classes:
        raise ValueError(f"label {highest} found, expected 0 to {n_classes - 1}")
    pairs = truth.ravel().astype(np.int64) * n_classes + predicted.ravel()
    flat = np.bincount(pairs, minlength=n_classes * n_classes)
    return flat.reshape(n_classes, n_classes).astype(np.int64)


def _scores(counts: npt.NDArray[Any]) -> dict[str, Float]:
    """Give each score of each class: (..., C) float64, NaN where undefined."""
    total = counts.sum(axis=(-2, -1))[..., None].astype(np.float64)
    tp = np.diagonal(counts, axis1=-2, axis2=-1).astype(np.float64)
    fn, fp = counts.sum(axis=-1) - tp, counts.sum(axis=-2) - tp
    tn = total - tp - fn - fp
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "f1": 2 * tp / (2 * tp + fp + fn),
            "iou": tp / (tp + fp + fn),
            "precision": tp / (tp + fp),
            "recall": tp / (tp + fn),
            "specificity": tn / (tn + fp),
        }


def _macro(counts: npt.NDArray[Any]) -> dict[str, Float]:
    """Average over the foreground classes in truth or prediction: (...) float64."""
    scores = _scores(counts)
    present = ~np.isnan(scores["f1"][..., 1:])
    result = {}
    for name, values in scores.items():
        # A class that occurs, but was never predicted, has a precision of 0; one that
        # was predicted but does not occur has a recall of 0.
        known = np.where(present, np.nan_to_num(values[..., 1:]), 0.0)
        with np.errstate(invalid="ignore"):
            result[name] = known.sum(axis=-1) / present.sum(axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        right = np.trace(counts, axis1=-2, axis2=-1)
        result["accuracy"] = right / counts.sum(axis=(-2, -1))
    return result


def _plain(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def class_scores(counts: Counts, names: Sequence[str]) -> list[dict[str, Any]]:
    """Give the scores of every class.

    Returns:
        A dictionary a class: class, f1, iou, precision, recall, specificity (None
        where undefined), support_px (pixels of the class in the truth).
    """
    scores = _scores(counts)
    return [
        {"class": name}
        | {score: _plain(scores[score][i]) for score in SCORES}
        | {"support_px": int(counts[i].sum())}
        for i, name in enumerate(names)
    ]


def summary(counts: Counts, names: Sequence[str]) -> dict[str, float | None]:
    """Give the pooled scores: means over the foreground classes that occur.

    A class that is neither in the truth nor in the prediction is left out; if none is
    left, the scores are None. `f1` is the headline number.
    """
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"{len(names)} classes, but counts of shape {counts.shape}")
    return {name: _plain(value) for name, value in _macro(counts).items()}


def bootstrap(
    slide_counts: Counts,
    names: Sequence[str],
    *,
    seed: int = 0,
    rounds: int = 2000,
    level: float = 0.95,
) -> dict[str, Any] | None:
    """Give intervals of the pooled scores by resampling slides.

    Percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

    Args:
        slide_counts: (N, C, C), one slide each.
        names: Of the C classes.
        seed: Decides the samples.
        rounds: Number of samples.
        level: Share of the samples inside the interval.

    Returns:
        [low, high] by score, and `per_class`: by class name, then by score; None with
        fewer than two slides, and for scores that were never defined.
    """
    slides = len(slide_counts)
    if slides < 2:
        return None
    drawn = np.random.default_rng(seed).multinomial(
        slides, np.full(slides, 1 / slides), size=rounds
    )
    pooled = np.tensordot(drawn, slide_counts.astype(np.float64), axes=1)
    ends = [(1 - level) / 2, (1 + level) / 2]

    def interval(values: Float) -> list[float] | None:
        known = values[~np.isnan(values)]
        return np.quantile(known, ends).tolist() if len(known) else None

    result: dict[str, Any] = {k: interval(v) for k, v in _macro(pooled).items()}
    scores = _scores(pooled)
    result["per_class"] = {
        name: {score: interval(scores[score][:, i]) for score in SCORES}
        for i, name in enumerate(names)
    }
    return result
