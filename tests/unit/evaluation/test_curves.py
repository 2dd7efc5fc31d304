"""Curves, cohorts and close-ups of a report of masks, against other computations."""

from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, precision_recall_curve

from medray.evaluation.calibration import calibration_error, reliability_of_images
from medray.evaluation.curves import (
    average_precision,
    best_threshold,
    count_levels,
    precision_recall,
    reliability_of_pixels,
)


def pixels(classes: int, n: int = 20_000, seed: int = 0) -> tuple[Any, Any, Any]:
    """Truth, prediction and uint8 probabilities of a model that is right at times."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, n).astype(np.uint8)
    logits = rng.normal(size=(classes, n)) + 1.2 * (
        np.arange(classes)[:, None] == truth
    )
    shares = np.exp(logits) / np.exp(logits).sum(axis=0)
    return truth, shares.argmax(axis=0).astype(np.uint8), np.rint(shares * 255)


@pytest.mark.parametrize("classes", [2, 4])
def test_curves_are_scikit_learns(classes: int) -> None:
    truth, predicted, shares = pixels(classes)
    counts = count_levels(truth, predicted, shares.astype(np.uint8))
    assert (counts.sum(axis=(1, 2)) == len(truth)).all()
    for c in range(classes):
        wanted = average_precision_score(truth == c, shares[c])
        assert average_precision(counts[c]) == pytest.approx(wanted)
        precision, recall, thresholds = precision_recall_curve(truth == c, shares[c])
        mine = precision_recall(counts[c])
        for p, r, t in zip(precision[:-1], recall[:-1], thresholds, strict=True):
            at = 255 - int(t)
            assert (mine[0][at], mine[1][at]) == pytest.approx((p, r))
        best = best_threshold(counts[c])
        assert best is not None
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-9)
        assert best[1] == pytest.approx(f1.max())
        found = shares[c] >= round(best[0] * 255)
        right = (found & (truth == c)).sum()
        own = 2 * right / (found.sum() + (truth == c).sum())
        assert own == pytest.approx(best[1])


def test_calibration_is_that_of_images() -> None:
    truth, predicted, shares = pixels(3)
    counts = count_levels(truth, predicted, shares.astype(np.uint8))
    for mine, wanted in zip(
        reliability_of_pixels(counts[-1]),
        reliability_of_images((shares / 255).T, predicted, truth),
        strict=True,
    ):
        np.testing.assert_allclose(mine, wanted)
    wanted = calibration_error(
        reliability_of_images((shares / 255).T, predicted, truth)
    )
    assert calibration_error(reliability_of_pixels(counts[-1])) == pytest.approx(wanted)


def test_what_was_not_looked_at_says_nothing_of_calibration() -> None:
    nothing = np.zeros((2, 50), np.uint8)
    counts = count_levels(nothing[0], nothing[0], nothing)
    assert calibration_error(reliability_of_pixels(counts[-1])) is None
    assert average_precision(counts[1]) is None
    assert best_threshold(counts[1]) is None
