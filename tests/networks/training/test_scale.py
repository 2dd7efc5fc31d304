"""Which epoch is kept, where validation can choose one and where it cannot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from medray.datasets.dataset import write_patches
from medray.errors import ConfigError
from medray.training.checks import check_comparable
from medray.training.losses import Loss
from medray.training.progress import start_progress
from medray.training.recipe import Recipe
from medray.training.scale import (
    WORST,
    Scale,
    choose_scale,
    score_of,
    warn_of_validation,
)
from medray.training.schedule import Schedule, plateau_drops

SHARES = st.floats(0, 1)
LOSSES = st.floats(0, 1e6)


def patches(*class_px: list[int]) -> list[dict[str, Any]]:
    return [{"class_px": pixels} for pixels in class_px]


def best_of(epochs: list[tuple[float | None, float | None]], scale: Scale) -> int:
    """Which epoch a training of such F1 and validation losses keeps."""
    progress = start_progress(1)
    for f1, loss in epochs:
        progress.end_epoch(1, 1, 0.0, {"f1": f1, "val_loss": loss}, scale)
    assert progress.history[progress.best["epoch"]]["score"] == progress.best["score"]
    return progress.best["epoch"]


@given(st.lists(st.tuples(st.none() | SHARES, st.none() | LOSSES), min_size=1))
@example([(None, 0.5), (0.0, 3.0)])  # nothing found, and rightly; then all is wrong
@example([(0.0, 3.0), (None, 0.5)])
@example([(None, None), (None, 7.0)])
def test_without_foreground_the_least_loss_is_kept_whatever_f1_does(
    epochs: list[tuple[float | None, float | None]],
) -> None:
    losses = [math.inf if loss is None else loss for _, loss in epochs]
    assert losses[best_of(epochs, "val_loss")] == min(losses)


@given(st.lists(st.tuples(SHARES, st.none() | LOSSES), min_size=1))
def test_with_foreground_the_greatest_f1_is_kept_whatever_losses_do(
    epochs: list[tuple[float | None, float | None]],
) -> None:
    scores = [f1 for f1, _ in epochs]
    assert scores[best_of(epochs, "f1")] == max(scores, key=lambda f1: f1 or 0)


@given(st.none() | SHARES, st.none() | LOSSES)
def test_a_score_is_a_number_that_json_can_hold(
    f1: float | None, loss: float | None
) -> None:
    for scale in ("f1", "val_loss"):
        score = score_of({"f1": f1, "val_loss": loss}, scale)
        assert math.isfinite(score)
        assert score >= WORST


def test_patience_and_plateau_wait_by_the_same_scale() -> None:
    """Epochs that find nothing have no F1; the loss falls all the time."""
    progress = start_progress(1)
    schedule = Schedule(epochs=99, patience=2)
    for epoch in range(6):
        scores = {"f1": None if epoch % 2 else 0.0, "val_loss": 6.0 - epoch}
        progress.end_epoch(1, 1, 0.0, scores, "val_loss")
        assert not progress.is_over(schedule)
    assert plateau_drops([entry["score"] for entry in progress.history], 1) == 0


@pytest.mark.parametrize(
    ("held", "of_images", "scale", "missing"),
    [
        ([[9, 0], [5, 4]], False, "f1", []),
        ([[9, 0], [9, 0]], False, "val_loss", ["a"]),
        ([[9, 0, 0], [5, 0, 4]], False, "f1", ["a"]),
        ([[0, 9], [0, 9]], False, "f1", ["0"]),
        # Classifiers take a patch's commonest class.
        ([[9, 0], [5, 4]], True, "val_loss", ["a"]),
        ([[9, 0], [4, 5]], True, "f1", []),
        ([[9, 0, 0], [9, 0, 0]], True, "f1", ["a", "b"]),
    ],
)
def test_validation_patches_decide_at_the_start(
    held: list[list[int]], of_images: bool, scale: str, missing: list[str]
) -> None:
    rows = patches(*held)
    assert choose_scale(rows, of_images=of_images) == scale
    names = ["0", "a", "b"][: len(held[0])]
    warned = warn_of_validation(rows, names, of_images=of_images)
    words = f"holds nothing of {', '.join(missing)}"
    assert [words in said for said in warned] == [True] * bool(missing)
    assert ["least validation loss" in said for said in warned] == [
        scale == "val_loss"
    ] * len(warned)


@pytest.mark.parametrize("tumour", [0, 9])
def test_trials_of_other_losses_are_not_compared_by_them(
    tumour: int, tmp_path: Path
) -> None:
    place = {"slide": "s", "split": "val", "tissue": 1.0, "y": 0, "x": 0}
    write_patches(str(tmp_path), [place | {"class_px": [99, tumour]}])
    one, other = Recipe(loss=Loss()), Recipe(loss=Loss(dice=2.0))
    # The sum of weights is no part of the validation loss.
    check_comparable([one, Recipe(loss=Loss(l2=1.0))], str(tmp_path))
    refused = ""
    try:
        check_comparable([one, other], str(tmp_path))
    except ConfigError as error:
        refused = f"{error}"
    assert ("cannot be compared" in refused) == (not tumour)
