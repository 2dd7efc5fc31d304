"""The calibration of a classifier, the temperature that corrects it, and a threshold.

Guo, Pleiss, Sun and Weinberger 2017, "On Calibration of Modern Neural Networks".
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.metrics import roc_curve

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BINS = 10
"""Of the reliability picture and of the calibration error; of equal width."""

_LEAST, _MOST = 1e-4, 1e4  # temperature


def fit_temperature(logits: Floats, truth: Ints) -> float | None:
    """Find the temperature T at which softmax(logits / T) fits the truth best.

    That is the least mean negative log likelihood. It is convex in 1 / T, so there is
    one such T.

    Args:
        logits: (N, C), of images that have not trained the model.
        truth: (N,) label values.

    Returns:
        The temperature, from 1e-4 to 1e4; None where none can be fitted: every image is
        right, so the surer the better the fit.
    """
    if not len(truth) or bool((logits.argmax(axis=1) == truth).all()):
        return None

    def loss(log_temperature: float) -> float:
        logs = log_softmax(logits / np.exp(log_temperature), axis=1)
        return float(-logs[np.arange(len(truth)), truth].mean())

    bounds = (np.log(_LEAST), np.log(_MOST))
    found = minimize_scalar(
        loss, bounds=bounds, method="bounded", options={"xatol": 1e-6}
    )
    return float(np.exp(found.x))


def fit_threshold(probabilities: Floats, is_label: npt.NDArray[Any]) -> float | None:
    """Find the probability from which on an image is best called one of the class.

    That is where sensitivity + specificity is greatest (Youden 1950), halfway to the
    next image below.

    Args:
        probabilities: (N,) of the class, of images that have not trained the model.
        is_label: (N,) whether an image is of the class.

    Returns:
        The threshold; None where all images, or none, are of the class.
    """
    if not 0 < np.count_nonzero(is_label) < len(is_label):
        return None
    false, true, values = roc_curve(is_label, probabilities, drop_intermediate=False)
    best = int(np.argmax(true - false))
    # roc_curve begins above all values: no image is called one of the class.
    return float(np.mean(values[best : best + 2])) if best else 1.0


def scaled(logits: Floats, temperature: float) -> Floats:
    """Return the probabilities at a temperature: (N, C) logits to (N, C)."""
    shares: Floats = np.exp(log_softmax(logits / temperature, axis=1))
    return shares


class Reliability(NamedTuple):
    """Predictions in bins by how sure they are, (BINS,) each.

    Attributes:
        confidence: Mean of a bin; 0 of an empty one.
        accuracy: Share that is right; 0 of an empty bin.
        counts: Predictions in the bin.
    """

    confidence: Floats
    accuracy: Floats
    counts: Ints


def reliability(
    confidence: Floats, right: npt.NDArray[Any], count: npt.NDArray[Any]
) -> Reliability:
    """Sort predictions into bins by how sure they are.

    Args:
        confidence: (N,) probabilities of what was predicted, all different or not.
        right: (N,) how many of the predictions of that probability are right.
        count: (N,) how many predictions have it.
    """
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    total: Ints = np.bincount(place, count, BINS).astype(np.int64)
    used = np.maximum(total, 1).astype(np.float64)
    return Reliability(
        np.bincount(place, count * confidence, BINS) / used,
        np.bincount(place, right, BINS) / used,
        total,
    )


def reliability_of_images(
    probabilities: Floats, predicted: Ints, truth: Ints
) -> Reliability:
    """Sort images into bins by how sure their prediction is.

    Args:
        probabilities: (N, C).
        predicted: (N,) label values; their probability is the confidence.
        truth: (N,) label values.
    """
    sure = probabilities[np.arange(len(predicted)), predicted]
    return reliability(sure, truth == predicted, np.ones(len(sure), np.int64))


def calibration_error(bins: Reliability) -> float | None:
    """Return the expected calibration error, see above; None of no predictions."""
    total = int(bins.counts.sum())
    if not total:
        return None
    error = (np.abs(bins.confidence - bins.accuracy) * bins.counts).sum()
    return float(error / total)
