"""Scores as pure functions of confusion counts.

Counts are int64 (C, C): rows are the truth, columns the prediction, class 0 is the
background. Definitions: F1 = Dice = 2 TP / (2 TP + FP + FN) (Dice 1945), IoU = TP /
(TP + FP + FN) (Jaccard 1912). A score whose denominator is 0 is undefined: None.

One file, though a long one: every function is of the same counts, without I/O.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Counts = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]

SCORES = ("f1", "iou", "precision", "recall", "specificity")

# Draws of the bootstrap held at a time, so that memory does not grow with the slides.
_DRAWS = 2_000_000


def confusion(
    truth: npt.NDArray[Any], predicted: npt.NDArray[Any], n_classes: int
) -> Counts:
    """Count truth against prediction.

    Args:
        truth: Label values, any shape.
        predicted: Label values of the same shape.
        n_classes: C; every label must be from 0 to C - 1.

    Returns:
        (C, C) int64.

    Raises:
        ValueError: The shapes differ, or a label is not from 0 to C - 1.

    Examples:
        >>> from medray.evaluation import confusion
        >>> truth = np.array([[0, 0, 1], [0, 1, 1]])
        >>> predicted = np.array([[0, 1, 1], [0, 1, 0]])
        >>> confusion(truth, predicted, 2)
        array([[2, 1],
               [1, 2]])
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth is {truth.shape}, prediction {predicted.shape}")
    for labels in (truth, predicted):
        for label in (labels.min(initial=0), labels.max(initial=0)):
            if not 0 <= label < n_classes:
                raise ValueError(f"label {label} found, expected 0 to {n_classes - 1}")
    # In place: a region may have tens of millions of pixels.
    pairs = truth.ravel().astype(np.int64)
    pairs *= n_classes
    pairs += predicted.ravel().astype(np.int64, copy=False)
    flat = np.bincount(pairs, minlength=n_classes * n_classes)
    return flat.reshape(n_classes, n_classes).astype(np.int64)


def _scores(counts: npt.NDArray[Any]) -> dict[str, Float]:
    """Return each score of each class: (..., C) float64, NaN where undefined."""
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
    with np.errstate(divide="ignore", invalid="ignore"):
        for name, values in scores.items():
            values = values[..., 1:]
            # A class that occurs, but was never predicted, has a precision of 0; one
            # that was predicted, but does not occur, has a recall of 0: leaving them
            # out would reward a model for ignoring a class. A class without any
            # negative pixel says nothing of specificity.
            used = ~np.isnan(values) if name == "specificity" else present
            used = used & present
            total = np.where(used, np.nan_to_num(values), 0.0).sum(axis=-1)
            result[name] = total / used.sum(axis=-1)
        right = np.trace(counts, axis1=-2, axis2=-1)
        result["accuracy"] = right / counts.sum(axis=(-2, -1))
    return result


def _plain(value: Any) -> float | None:
    return None if np.isnan(value) else float(value)


def class_scores(counts: Counts, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the scores of every class.

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
    """Return the pooled scores: means over the foreground classes that occur.

    A class that is neither in the truth nor in the prediction is left out; if none is
    left, the scores are None. Precision counts as 0 for a class that occurs but was
    never predicted, recall as 0 for one that was predicted but does not occur.

    Args:
        counts: (C, C) int64.
        names: Of the C classes.

    Returns:
        f1 (the headline number), iou, precision, recall, specificity, and accuracy
        (the share of right pixels, background included).

    Raises:
        ValueError: `counts` and `names` do not fit.

    Examples:
        >>> from medray.evaluation import summary
        >>> counts = np.array([[90, 2], [2, 6]])
        >>> scores = summary(counts, ["background", "tumour"])
        >>> scores["f1"], scores["iou"], scores["accuracy"]
        (0.75, 0.6, 0.96)
    """
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"{len(names)} classes, but counts of shape {counts.shape}")
    return {name: _plain(value) for name, value in _macro(counts).items()}


def of_images(counts: Counts, names: Sequence[str]) -> tuple[Counts, Sequence[str]]:
    """Make counts of whole images such that their means are those of classifiers.

    Of two classes the second is what is looked for: its scores count. Of more, all
    count alike (macro averages), which a background before them brings about.

    Args:
        counts: (..., C, C) int64, images.
        names: Of the C classes.

    Returns:
        Counts and names for `summary` and `bootstrap`.
    """
    if len(names) == 2:
        return counts, names
    before = [(0, 0)] * (counts.ndim - 2) + [(1, 0), (1, 0)]
    return np.pad(counts, before), ["", *names]


SMALL = 32 * 32
"""Pixels below which an object is small, as COCO has it (Lin et al. 2014)."""


def small_objects(truth: npt.NDArray[Any], predicted: npt.NDArray[Any]) -> Counts:
    """Count small objects: connected foreground (8 neighbours) of less than `SMALL` px.

    What is predicted counts for them unless it touches a larger object of the truth.

    Args:
        truth: (h, w) label values.
        predicted: (h, w) label values.

    Returns:
        (4,) int64: small objects in the truth; those of which at least half the pixels
        were predicted as foreground; pixels of the intersection and of the union of
        small objects and what is predicted.
    """
    around = np.ones((3, 3))
    objects, count = ndimage.label(truth > 0, around)
    sizes = np.bincount(objects.ravel(), minlength=count + 1)
    is_small = sizes < SMALL
    is_small[0] = False
    hit = np.bincount(objects[predicted > 0], minlength=count + 1)
    found = is_small & (2 * hit >= sizes)
    guesses, number = ndimage.label(predicted > 0, around)
    touches = np.zeros(number + 1, bool)
    touches[guesses[(objects > 0) & ~is_small[objects]]] = True
    touches[0] = True
    near, small = ~touches[guesses], is_small[objects]
    both = small & (predicted > 0)
    union = small | near
    return np.array(
        [is_small.sum(), found.sum(), both.sum(), union.sum()], dtype=np.int64
    )


def small_scores(counts: Counts) -> dict[str, float | None]:
    """Return the recall and IoU of small objects that were counted; None: undefined."""
    objects, found, both, union = counts.tolist()
    return {
        "small_recall": found / objects if objects else None,
        "small_iou": both / union if union else None,
    }


def draws(
    units: int, *, seed: int = 0, rounds: int = 2000, step: int | None = None
) -> Iterator[Counts]:
    """Draw units with replacement, as many as there are, again and again.

    Args:
        units: Slides or patients.
        seed: Decides the draws.
        rounds: How often.
        step: Rounds at a time; by default as many as memory should hold. It does not
            change the draws.

    Yields:
        (step, units) int64: how often each unit was drawn in each round.
    """
    generator = np.random.default_rng(seed)
    share = np.full(units, 1 / units)
    step = step or max(1, _DRAWS // units)
    for done in range(0, rounds, step):
        yield generator.multinomial(units, share, size=min(step, rounds - done))


def bootstrap(
    slide_counts: Counts,
    names: Sequence[str],
    *,
    seed: int = 0,
    rounds: int = 2000,
    level: float = 0.95,
) -> dict[str, Any] | None:
    """Return intervals of the pooled scores by resampling slides.

    Percentile bootstrap (Efron and Tibshirani 1993, chapter 13).

    Args:
        slide_counts: (N, C, C), one slide each.
        names: Of the C classes.
        seed: Decides the samples.
        rounds: Number of samples.
        level: Share of the samples inside the interval.

    Returns:
        [low, high] by score, and `per_class`: by class name, then by score. Samples in
        which a score is undefined are left out; None if it never is defined. None
        altogether with fewer than two slides.

    Examples:
        >>> from medray.evaluation import bootstrap
        >>> slides = np.array([[[90, 2], [2, 6]], [[80, 0], [9, 9]], [[99, 1], [0, 9]]])
        >>> low, high = bootstrap(slides, ["background", "tumour"])["f1"]
        >>> round(low, 2), round(high, 2)
        (0.67, 0.95)
    """
    slides = len(slide_counts)
    if slides < 2:
        return None
    # float64: exact up to 2**53 pixels, and a matrix product that BLAS does.
    flat = slide_counts.reshape(slides, -1).astype(np.float64)
    blocks = [drawn @ flat for drawn in draws(slides, seed=seed, rounds=rounds)]
    pooled = np.concatenate(blocks).reshape(rounds, *slide_counts.shape[1:])
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


def difference(
    before: Counts, after: Counts, *, seed: int = 0, rounds: int = 2000
) -> dict[str, Any]:
    """Return how much better one prediction is than another of the same slides.

    Paired percentile bootstrap: the same slides are drawn for both (Efron and
    Tibshirani 1993, chapter 13), so what makes a slide hard for both cancels out.

    Args:
        before: (N, C, C), one slide each.
        after: (N, C, C), the same slides in the same order.
        seed: Decides the samples.
        rounds: Number of samples.

    Returns:
        f1, other_f1 (pooled, of `before` and `after`), difference (after minus
        before), interval (95 %, of the difference; None with fewer than two slides),
        p_value (two-sided, the share of samples in which the difference is not on the
        side where it was found, doubled; None as for interval); None where undefined.

    Raises:
        ValueError: The two do not have the same shape.
    """
    if before.shape != after.shape:
        raise ValueError(f"counts of shape {before.shape} beside {after.shape}")
    ours, theirs = (_macro(counts.sum(axis=0))["f1"] for counts in (before, after))
    found = {
        "f1": _plain(ours),
        "other_f1": _plain(theirs),
        "difference": _plain(theirs - ours),
        "interval": None,
        "p_value": None,
    }
    slides = len(before)
    if slides < 2 or found["difference"] is None:
        return found
    pairs = np.stack([before, after]).reshape(2, slides, -1).astype(np.float64)
    pooled = np.concatenate(
        [drawn @ pairs for drawn in draws(slides, seed=seed, rounds=rounds)], axis=1
    ).reshape(2, rounds, *before.shape[1:])
    f1 = _macro(pooled)["f1"]
    moved = f1[1] - f1[0]
    moved = moved[~np.isnan(moved)]
    sides = min((moved <= 0).mean(), (moved >= 0).mean())
    return found | {
        "interval": np.quantile(moved, [0.025, 0.975]).tolist(),
        "p_value": float(min(1.0, 2 * sides)),
    }


def f1_line(f1: float | None, interval: Sequence[float] | None = None) -> str:
    """Return an F1 score and its interval as a line of a result's text."""
    value = "none (no foreground)" if f1 is None else f"{f1:.4f}"
    span = f" [{interval[0]:.4f}, {interval[1]:.4f}]" if interval else ""
    return f"F1      {value}{span}"
