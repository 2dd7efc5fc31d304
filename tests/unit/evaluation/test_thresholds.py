"""The threshold of two classes is chosen on validation images alone."""

import numpy as np
import pytest

from medray.evaluation.calibration import fit_threshold
from medray.evaluation.image_metrics import Predicted, at_threshold


def image(name: str, truth: int, share: float) -> Predicted:
    shares = np.array([1 - share, share])
    return Predicted(
        name=name,
        digest=name,
        patient=name,
        truth=truth,
        predicted=int(share >= 0.5),
        probabilities=shares,
        log_probabilities=np.log(shares),
    )


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.1, 0.6, 0.8, 0.9], 0.7),  # halfway between the classes
        ([0.1, 0.8, 0.6, 0.9], 0.85),  # one of each class is wrong: the higher one
        ([0.6, 0.7, 0.2, 0.1], 1.0),  # the wrong way round: none is called positive
    ],
)
def test_it_is_where_sensitivity_and_specificity_are_greatest(shares, expected):
    truth = np.array([False, False, True, True])
    assert fit_threshold(np.array(shares), truth) == pytest.approx(expected)


@pytest.mark.parametrize("truth", [[], [True, True], [False]])
def test_there_is_none_without_both_classes(truth):
    assert fit_threshold(np.full(len(truth), 0.5), np.array(truth, bool)) is None


def test_scores_are_those_of_the_tested_images_at_the_threshold():
    validation = [image("a", 0, 0.7), image("b", 1, 0.9), image("c", 0, 0.2)]
    tested = [image("d", 0, 0.6), image("e", 1, 0.95), image("f", 1, 0.6)]
    found = at_threshold(tested, validation, ("healthy", "ill"))
    assert found is not None
    assert found["threshold"] == pytest.approx(0.8)
    assert found["images"] == 3
    assert (found["recall"], found["specificity"]) == (0.5, 1.0)
    assert found["accuracy"] == pytest.approx(2 / 3)


def test_there_is_none_of_more_classes_or_without_validation_images():
    tested = [image("d", 0, 0.6), image("e", 1, 0.95)]
    assert at_threshold(tested, [], ("healthy", "ill")) is None
    assert at_threshold(tested, tested, ("a", "b", "c")) is None
