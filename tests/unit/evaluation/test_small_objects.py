"""Small objects against a count by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medray.evaluation.metrics import SMALL, small_objects, small_scores


def square(mask: np.ndarray, y: int, x: int, side: int) -> None:
    mask[y : y + side, x : x + side] = 1


def test_small_objects_are_counted_apart() -> None:
    truth, found = np.zeros((200, 200), int), np.zeros((200, 200), int)
    square(truth, 0, 0, 60)  # large: neither it nor what touches it counts
    square(found, 0, 0, 70)
    square(truth, 100, 0, 10)  # found whole
    square(found, 100, 0, 10)
    square(truth, 100, 50, 10)  # 30 of 100 pixels found: missed
    found[100:103, 50:60] = 1
    square(truth, 100, 100, 10)  # not found at all
    square(found, 150, 150, 20)  # nothing is there
    counts = small_objects(truth, found)
    assert counts.tolist() == [3, 1, 130, 300 + 400]
    scores = small_scores(counts)
    assert scores["small_recall"] == pytest.approx(1 / 3)
    assert scores["small_iou"] == pytest.approx(130 / 700)


def test_nothing_small_is_no_score() -> None:
    truth = np.ones((64, 64), int)
    counts = small_objects(truth, truth)
    assert counts.tolist() == [0, 0, 0, 0]
    assert small_scores(counts) == {"small_recall": None, "small_iou": None}


@given(st.integers(0, 2**31))
def test_a_perfect_prediction_finds_them_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.zeros((80, 80), int)
    for _ in range(rng.integers(1, 6)):
        square(truth, *rng.integers(0, 60, 2), int(rng.integers(1, 60)))
    objects, found, both, union = small_objects(truth, truth).tolist()
    assert objects == found
    assert both == union
    assert both < objects * SMALL or not objects
