"""Predictions of whole images: from the logits of models, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax, logsumexp
from sklearn.metrics import average_precision_score, roc_auc_score

from medray.evaluation.calibration import (
    calibration_error,
    fit_temperature,
    fit_threshold,
    reliability_of_images,
    scaled,
)
from medray.evaluation.metrics import (
    bootstrap,
    class_scores,
    confusion,
    draws,
    of_images,
    summary,
)
from medray.inference import ClassifiedImage
from medray.types import Row

Floats = npt.NDArray[np.float64]

_AREAS = {"auc": roc_auc_score, "average_precision": average_precision_score}
_CELLS = 2_000_000  # weights of images held at a time


@dataclass(frozen=True, eq=False, kw_only=True)
class Predicted:
    """An image, or a slide with one label, and what was predicted of it.

    Attributes:
        name: Of it.
        digest: Of its bytes.
        patient: Whose it is.
        truth: Label value.
        predicted: Label value.
        probabilities: (C,), of each class.
        log_probabilities: Their logarithms. Of one model these are its logits but for a
            number that all have in common, so that a temperature means the same for
            both.
    """

    name: str
    digest: str
    patient: str
    truth: int
    predicted: int
    probabilities: Floats
    log_probabilities: Floats


def score(rows: Sequence[Predicted], names: Sequence[str]) -> dict[str, Any]:
    """Score predictions of whole images.

    Args:
        rows: The images.
        names: Of the C classes.

    Returns:
        f1 (of the second of two classes, else the mean of all), precision, recall,
        specificity, accuracy; `auc` (area under the ROC curve of the second of two
        classes, else the mean of each class against the rest; None where a class is
        missing); `intervals` of them all over patients, None of one patient;
        `per_class` with `auc`, `average_precision`, `support` (images) and
        `intervals`; `confusion`; `calibration_error` (10 bins); `images`, `patients`.
    """
    truth = np.array([row.truth for row in rows])
    predicted = np.array([row.predicted for row in rows])
    shares = np.array([row.probabilities for row in rows], np.float64)
    counts = confusion(truth, predicted, len(names))
    who, patients = patients_of([row.patient for row in rows])
    each = np.zeros((patients, len(names), len(names)), np.int64)
    np.add.at(each, (who, truth, predicted), 1)
    intervals = bootstrap(*of_images(each, names))
    per_class = class_scores(counts, names)
    for label, entry in enumerate(per_class):
        is_label = truth == label
        some = 0 < is_label.sum() < len(truth)
        entry["auc"] = (
            float(roc_auc_score(is_label, shares[:, label])) if some else None
        )
        entry["average_precision"] = (
            float(average_precision_score(is_label, shares[:, label])) if some else None
        )
        entry["support"] = entry.pop("support_px")
        entry["intervals"] = intervals["per_class"][entry["class"]] if intervals else {}
    if intervals:
        del intervals["per_class"]
        intervals["auc"] = _auc_interval(truth, shares, who, patients)
    areas = [per_class[label]["auc"] for label in _looked_for(len(names))]
    return {
        **summary(*of_images(counts, names)),
        "auc": None if None in areas else float(np.mean(areas)),
        "intervals": intervals,
        "per_class": per_class,
        "confusion": counts.tolist(),
        "calibration_error": calibration_error(
            reliability_of_images(shares, predicted, truth)
        ),
        "images": len(rows),
        "patients": patients,
    }


def image_columns(
    rows: Sequence[Predicted],
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], Floats, Floats]:
    """Return truth (N,), predicted (N,), probabilities and their logarithms (N, C)."""
    return (
        np.array([row.truth for row in rows]),
        np.array([row.predicted for row in rows]),
        np.array([row.probabilities for row in rows]),
        np.array([row.log_probabilities for row in rows]),
    )


def combine(found: ClassifiedImage, *, vote: bool) -> Predicted:
    """Combine the logits (models, C) of an image into one prediction."""
    logs = log_softmax(found.logits, axis=1)
    mean = logsumexp(logs, axis=0) - np.log(len(logs))
    shares = np.exp(mean)
    if vote:
        votes = np.bincount(logs.argmax(axis=1), minlength=logs.shape[1])
        chosen = int(np.argmax(votes + shares / 2))
    else:
        chosen = int(shares.argmax())
    return Predicted(
        name=found.image.image,
        digest=found.image.digest,
        patient=found.image.patient,
        truth=found.image.truth,
        predicted=chosen,
        probabilities=shares,
        log_probabilities=mean,
    )


def calibrate(rows: Sequence[Predicted], validation: Sequence[Predicted]) -> Row:
    """Fit a temperature on validation images; return its effect on the others."""
    truth, predicted, shares, logs = image_columns(rows)
    bins = reliability_of_images(shares, predicted, truth)
    found: Row = {"error": calibration_error(bins)}
    if not validation:
        return found | {
            "why": "the dataset has no validation images that no model was trained on"
        }
    val_truth, _, _, val_logs = image_columns(validation)
    temperature = fit_temperature(val_logs, val_truth)
    if temperature is None:
        return found | {
            "why": f"all {len(validation)} validation images are classified rightly, "
            f"so they do not tell how sure is too sure"
        }
    bins = reliability_of_images(scaled(logs, temperature), predicted, truth)
    found |= {"temperature": temperature, "images": len(validation)}
    return found | {"error_scaled": calibration_error(bins)}


def at_threshold(
    rows: Sequence[Predicted], validation: Sequence[Predicted], names: Sequence[str]
) -> Row | None:
    """Score predictions of two classes at a threshold that validation images choose.

    Returns:
        `threshold` of the second class's probability, validation `images`, and
        accuracy, f1, recall, specificity and their `intervals` with it; None where
        there are more classes, or too few validation images to choose by.
    """
    if len(names) != 2 or not validation:
        return None
    truth, _, shares, _ = image_columns(validation)
    threshold = fit_threshold(shares[:, 1], truth == 1)
    if threshold is None:
        return None
    moved = [
        replace(row, predicted=int(row.probabilities[1] >= threshold)) for row in rows
    ]
    found = score(moved, names)
    scores = ("accuracy", "f1", "recall", "specificity")
    intervals = found["intervals"]
    return {
        "threshold": threshold,
        "images": len(validation),
        **{name: found[name] for name in scores},
        "intervals": {name: intervals[name] for name in scores} if intervals else None,
    }


def patients_of(patients: Sequence[str]) -> tuple[npt.NDArray[np.int64], int]:
    """Return the number of each image's patient, and how many patients there are."""
    number = {patient: i for i, patient in enumerate(sorted(set(patients)))}
    return np.array([number[one] for one in patients], np.int64), len(number)


def _looked_for(classes: int) -> Sequence[int]:
    """Return the label values that count: the second of two classes, else all."""
    return [1] if classes == 2 else range(classes)


def _auc_interval(
    truth: npt.NDArray[Any], shares: Floats, who: npt.NDArray[Any], patients: int
) -> list[float] | None:
    """Return the 95 % bootstrap interval of the area over patients."""
    labels = _looked_for(shares.shape[1])
    step = max(1, _CELLS // len(truth))
    areas = []
    for drawn in draws(patients, step=step):
        weights = drawn[:, who].astype(np.float64)
        each = [weighted_auc(truth == k, shares[:, k], weights) for k in labels]
        areas.append(np.mean(each, axis=0))
    values = np.concatenate(areas)
    known = values[~np.isnan(values)]
    return np.quantile(known, [0.025, 0.975]).tolist() if len(known) else None


def weighted_auc(is_label: npt.NDArray[Any], shares: Floats, weights: Floats) -> Floats:
    """Return areas under the ROC curve for many weightings of the same images.

    The area is the share of pairs (one image of the class, one of the others) of which
    the first has the higher score; equal scores count half (Hanley and McNeil 1982).

    Args:
        is_label: (N,) whether an image is of the class.
        shares: (N,) its score.
        weights: (R, N), 0 or more.

    Returns:
        (R,) float64; NaN where one of both sides has no weight.
    """
    order = np.argsort(shares, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(shares[order]) > 0])
    there = is_label[order]
    ours = np.add.reduceat(weights[:, order] * there, starts, axis=1)
    others = np.add.reduceat(weights[:, order] * ~there, starts, axis=1)
    below = np.cumsum(others, axis=1) - others / 2
    pairs = ours.sum(axis=1) * others.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        areas: Floats = (ours * below).sum(axis=1) / pairs
    return areas
