"""Scores of classifiers: calibration, areas, two models on the same images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.special import expit, softmax
from scipy.stats import binom, chi2
from sklearn.metrics import roc_auc_score

from medray.errors import ConfigError
from medray.evaluation.calibration import (
    calibration_error,
    fit_temperature,
    reliability_of_images,
    scaled,
)
from medray.evaluation.image_metrics import Predicted, score, weighted_auc
from medray.evaluation.metrics import draws
from medray.evaluation.significance import (
    ReportedImage,
    beside,
    read_image_predictions,
    write_image_predictions,
)

NAMES = ("healthy", "sick")


# --- calibration ----------------------------------------------------------------------


@pytest.mark.parametrize("true", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_recovered(true: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (8_000, 3))
    shares = softmax(logits / true, axis=1).cumsum(axis=1)
    truth = (rng.random((8_000, 1)) > shares).sum(axis=1)
    found = fit_temperature(logits, truth)
    assert found == pytest.approx(true, rel=0.08)
    # No temperature of a fine grid fits better.
    grid = np.exp(np.linspace(np.log(0.1), np.log(10), 50))

    def loss(temperature: float) -> float:
        return -np.log(scaled(logits, temperature)[np.arange(len(truth)), truth]).mean()

    assert loss(found) <= min(map(loss, grid)) + 1e-9
    error, before = (
        calibration_error(
            reliability_of_images(scaled(logits, t), logits.argmax(axis=1), truth)
        )
        for t in (found, true * 2)
    )
    assert error < 0.03 < before


def test_the_temperature_of_equal_confidences_has_a_closed_form() -> None:
    """All as sure, a share q of them right: the best confidence is q itself."""
    apart, right = 6.0, np.arange(100) < 80
    logits = np.tile([0.0, apart], (100, 1))
    found = fit_temperature(logits, right.astype(int))
    assert found == pytest.approx(apart / np.log(0.8 / 0.2), rel=1e-4)
    assert scaled(logits, found)[0, 1] == pytest.approx(0.8, abs=1e-5)


def test_without_an_error_there_is_no_temperature() -> None:
    logits = np.array([[2.0, 0.0], [0.0, 0.1]])
    assert fit_temperature(logits, np.array([0, 1])) is None
    assert fit_temperature(logits[:0], np.array([], int)) is None
    assert fit_temperature(logits, np.array([0, 0])) is not None


def test_bins_are_those_of_the_definition() -> None:
    rng = np.random.default_rng(1)
    shares = rng.dirichlet(np.ones(4), 300)
    shares[0] = [1.0, 0, 0, 0]  # the upper end belongs to the last bin
    truth, predicted = rng.integers(4, size=300), shares.argmax(axis=1)
    sure = shares.max(axis=1)
    wanted = 0.0
    confidence, right, count = reliability_of_images(shares, predicted, truth)
    for k in range(10):
        last = k == 9
        inside = (sure >= k / 10) & ((sure < (k + 1) / 10) | last)
        assert count[k] == inside.sum()
        if inside.any():
            hits = (predicted == truth)[inside].mean()
            assert confidence[k] == pytest.approx(sure[inside].mean())
            assert right[k] == pytest.approx(hits)
            wanted += inside.mean() * abs(hits - sure[inside].mean())
    assert calibration_error(
        reliability_of_images(shares, predicted, truth)
    ) == pytest.approx(wanted)


# --- areas ----------------------------------------------------------------------------


def test_areas_are_those_of_scikit_learn_under_every_weighting() -> None:
    rng = np.random.default_rng(2)
    is_label = rng.random(80) < 0.4
    shares = np.round(rng.random(80), 1)  # many are equal
    weights = rng.integers(0, 4, (30, 80)).astype(float)
    weights[0], weights[1, is_label] = 1.0, 0.0
    found = weighted_auc(is_label, shares, weights)
    assert found[0] == pytest.approx(roc_auc_score(is_label, shares))
    assert np.isnan(found[1])
    for area, weight in zip(found[2:], weights[2:], strict=True):
        wanted = roc_auc_score(is_label, shares, sample_weight=weight)
        assert area == pytest.approx(wanted)


def drawn(classes: int, images: int = 240) -> list[Predicted]:
    rng = np.random.default_rng(classes)
    truth = rng.integers(classes, size=images)
    logits = rng.normal(0, 1, (images, classes))
    logits[np.arange(images), truth] += 1.0
    shares = softmax(logits, axis=1)
    return [
        Predicted(
            name=f"{k}.png",
            digest=f"blake2b:{k}",
            patient=f"P{k % 12:02d}",
            truth=int(truth[k]),
            predicted=int(shares[k].argmax()),
            probabilities=shares[k],
            log_probabilities=np.log(shares[k]),
        )
        for k in range(images)
    ]


@pytest.mark.parametrize("classes", [2, 4])
def test_the_area_and_its_interval_over_patients(classes: int) -> None:
    rows = drawn(classes)
    found = score(rows, [str(k) for k in range(classes)])
    truth = np.array([row.truth for row in rows])
    shares = np.array([row.probabilities for row in rows])

    if classes == 2:
        wanted = roc_auc_score(truth, shares[:, 1])
    else:
        wanted = roc_auc_score(truth, shares, multi_class="ovr", average="macro")
    assert found["auc"] == pytest.approx(wanted)
    # Patients are drawn whole: pairs of images that are won, patient against patient.
    patient = np.arange(len(rows)) % 12
    areas = []
    for label in [1] if classes == 2 else range(classes):
        ours, score_of = truth == label, shares[:, label]
        won = np.zeros((12, 12))
        for i in np.flatnonzero(ours):
            better = (score_of[i] > score_of) + 0.5 * (score_of[i] == score_of)
            won[patient[i]] += np.bincount(patient, better * ~ours, 12)
        times = np.concatenate(list(draws(12)))
        yes, no = (np.bincount(patient, side, 12) for side in (ours, ~ours))
        pairs = (times @ yes) * (times @ no)
        areas.append(np.einsum("rp,pq,rq->r", times, won, times) / pairs)
    wanted = np.quantile(np.mean(areas, axis=0), [0.025, 0.975])
    assert found["intervals"]["auc"] == pytest.approx(wanted)
    assert [row["support"] for row in found["per_class"]] == np.bincount(truth).tolist()
    for row in found["per_class"]:
        low, high = row["intervals"]["recall"]
        assert low <= row["recall"] <= high


def test_one_patient_or_one_class_has_no_interval_or_area() -> None:
    rows = [replace(row, patient="P") for row in drawn(2)]
    assert score(rows, NAMES)["intervals"] is None
    healthy = [row for row in drawn(2) if row.truth == 0]
    found = score(healthy, NAMES)
    assert found["auc"] is None
    assert found["intervals"]["auc"] is None


# --- two models -----------------------------------------------------------------------


def table(*cells: tuple[int, int, int]) -> tuple[list[Predicted], list[Predicted]]:
    """Make so many images of which this one and the other are right (1) or wrong."""
    ours, theirs = [], []
    for count, this, other in cells:
        for _ in range(count):
            number = len(ours)
            row = Predicted(
                name=f"{number}.png",
                digest=f"blake2b:{number}",
                patient=f"P{number % 12:02d}",
                truth=1,
                predicted=this,
                probabilities=np.array([0.5, 0.5]),
                log_probabilities=np.log([0.5, 0.5]),
            )
            ours.append(row)
            theirs.append(replace(row, predicted=other))
    return ours, theirs


def named(rows: list[Predicted]) -> list[ReportedImage]:
    return [
        ReportedImage(
            row.name, row.digest, row.patient, NAMES[row.truth], NAMES[row.predicted]
        )
        for row in rows
    ]


def test_mcnemar_is_the_binomial_of_the_discordant_images() -> None:
    ours, theirs = table((50, 1, 1), (12, 1, 0), (4, 0, 1), (10, 0, 0))
    found = beside(ours, named(theirs), NAMES, "other")
    assert (found["only_this"], found["only_other"]) == (12, 4)
    assert found["p_value"] == pytest.approx(2 * binom.cdf(4, 16, 0.5))
    assert found["accuracy"] == pytest.approx(62 / 76)
    assert found["difference"] == pytest.approx(8 / 76)
    low, high = found["interval"]
    assert low < found["difference"] < high
    # Many discordant images: as the chi-squared test with continuity correction.
    ours, theirs = table((500, 1, 1), (260, 1, 0), (210, 0, 1))
    found = beside(ours, named(theirs), NAMES, "other")
    wanted = chi2.sf((abs(260 - 210) - 1) ** 2 / 470, 1)
    assert found["p_value"] == pytest.approx(wanted, rel=0.01)
    same = beside(ours, named(ours), NAMES, "other")
    assert (same["p_value"], same["difference"], same["interval"]) == (1, 0, [0, 0])


def test_the_interval_of_the_difference_is_over_patients() -> None:
    """A model that is better for whole patients gains less certainty than by image."""
    ours, theirs = table((120, 1, 1))
    worse = ("P00", "P03", "P07", "P10")
    theirs = [replace(row, predicted=int(row.patient not in worse)) for row in theirs]
    low, high = beside(ours, named(theirs), NAMES, "other")["interval"]
    shares = np.linspace(0, 1, 13)  # of four patients of twelve: k of twelve draws
    wanted = [shares[int(binom.ppf(q, 12, 1 / 3))] for q in (0.025, 0.975)]
    assert [low, high] == pytest.approx(wanted)


def test_only_images_that_both_have_are_compared() -> None:
    ours, theirs = table((20, 1, 1), (5, 1, 0))
    found = beside(ours[2:], named(theirs)[:-3], NAMES, "other")
    assert (found["images"], found["only_this"]) == (20, 2)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    ours, theirs = table((4, 1, 1))
    write_image_predictions(theirs, NAMES, str(tmp_path / "images.csv"))
    back = read_image_predictions(str(tmp_path), NAMES)
    assert back == named(theirs)
    with pytest.raises(ConfigError, match=r"its classes \['healthy', 'sick'\] are not"):
        read_image_predictions(str(tmp_path), ("healthy", "sick", "odd"))
    with pytest.raises(ConfigError, match=r"expected the report of a classifier"):
        read_image_predictions(str(tmp_path / "nowhere"), NAMES)
    others = [replace(row, digest="blake2b:x") for row in back]
    with pytest.raises(ConfigError, match="no image in common"):
        beside(ours, others, NAMES, "other")
    others = [replace(row, truth="healthy") for row in back]
    with pytest.raises(ConfigError, match=r"0\.png is healthy there and sick here"):
        beside(ours, others, NAMES, "other")
    lines = (tmp_path / "images.csv").read_text().splitlines()
    for text, match in (
        ("image,truth\n1.png,sick\n", "expected the column digest"),
        ("\n".join(lines).replace('"sick"', '"ill"'), r"expected classes of"),
        ("a,b\n1\n", "expected a CSV file"),
    ):
        (tmp_path / "images.csv").write_text(text)
        with pytest.raises(ConfigError, match=match):
            read_image_predictions(str(tmp_path), NAMES)


def test_confidences_of_a_sigmoid_are_those_of_a_softmax() -> None:
    """Two logits count by their difference alone."""
    logits = np.array([[0.3, -0.4], [5.0, 7.0]])
    wanted = expit((logits[:, 1] - logits[:, 0]) / 3.0)
    assert scaled(logits, 3.0)[:, 1] == pytest.approx(wanted)
