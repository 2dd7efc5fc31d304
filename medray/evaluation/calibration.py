"""How sure a classifier may be: calibration, and the temperature that mends it.

Guo, Pleiss, Sun and Weinberger 2017, "On Calibration of Modern Neural Networks".
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

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
        The temperature, from 1e-4 to 1e4; None where none can be had: every image is
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


def scaled(logits: Floats, temperature: float) -> Floats:
    """Give the probabilities at a temperature: (N, C) logits to (N, C)."""
    shares: Floats = np.exp(log_softmax(logits / temperature, axis=1))
    return shares


def reliability(
    probabilities: Floats, predicted: Ints, truth: Ints
) -> tuple[Floats, Floats, Ints]:
    """Sort predictions into bins by how sure they are.

    Args:
        probabilities: (N, C).
        predicted: (N,) label values; their probability is the confidence.
        truth: (N,) label values.

    Returns:
        (BINS,) mean confidence, share that is right (both 0 of an empty bin) and count.
    """
    sure = probabilities[np.arange(len(predicted)), predicted]
    right = (truth == predicted).astype(np.float64)
    place = np.minimum((sure * BINS).astype(int), BINS - 1)
    count: Ints = np.bincount(place, minlength=BINS)
    used = np.maximum(count, 1).astype(np.float64)
    confidence: Floats = np.bincount(place, sure, BINS) / used
    accuracy: Floats = np.bincount(place, right, BINS) / used
    return confidence, accuracy, count


def calibration_error(probabilities: Floats, predicted: Ints, truth: Ints) -> float:
    """Give the expected calibration error, over `BINS` bins; arguments as above."""
    confidence, accuracy, count = reliability(probabilities, predicted, truth)
    error = (np.abs(confidence - accuracy) * count).sum()
    return float(error / max(1, int(count.sum())))
