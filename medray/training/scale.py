"""The score by which epochs are compared: one scale for a whole training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from medray.training.sampler import Data, usable_patches
from medray.types import Row

Scale = Literal["f1", "val_loss"]
WORST = -sys.float_info.max
"""The score of an epoch whose validation loss is no number; JSON can hold it."""


def held_classes(patches: Sequence[Row], *, of_images: bool) -> npt.NDArray[np.int64]:
    """Return how much patches hold of each class: (C,).

    Args:
        patches: Rows with `class_px`, one or more.
        of_images: Count patches by their commonest class, as classifiers do; else
            pixels.
    """
    pixels = np.array([row["class_px"] for row in patches], np.int64)
    if not of_images:
        return pixels.sum(axis=0)
    return np.bincount(pixels.argmax(axis=1), minlength=pixels.shape[1])


def choose_scale(patches: Sequence[Row], *, of_images: bool) -> Scale:
    """Return the scale: F1, unless nothing in the validation patches can have one.

    On such patches F1 is 0 in an epoch that finds anything and undefined in a better
    one that does not, so it says nothing, and the loss decides in every epoch.

    Args:
        patches: Rows of the validation patches.
        of_images: See `held_classes`.
    """
    held = held_classes(patches, of_images=of_images)
    # Of more than two classes of images each counts, see `of_images` of the metrics.
    sought = held if of_images and len(held) > 2 else held[1:]
    return "f1" if sought.any() else "val_loss"


def scale_of(data: str, how: Data, *, of_images: bool) -> Scale:
    """Return the scale of a training on a dataset."""
    return choose_scale(usable_patches(data, "val", how), of_images=of_images)


def score_of(scores: Row, scale: Scale) -> float:
    """Return the score of an epoch; greater is better.

    Args:
        scores: `f1` and `val_loss` of its validation; None where undefined.
        scale: Of the training.
    """
    if scale == "f1":
        # None only if all patches with something to find turned out damaged.
        return scores["f1"] or 0.0
    return WORST if scores["val_loss"] is None else -scores["val_loss"]


def warn_of_validation(
    patches: Sequence[Row], names: Sequence[str], *, of_images: bool
) -> list[str]:
    """Return a warning if validation patches cannot show how good a model is.

    Args:
        patches: Their rows.
        names: Of the classes.
        of_images: See `held_classes`.
    """
    held = held_classes(patches, of_images=of_images)
    lacking = [name for name, count in zip(names, held, strict=True) if not count]
    missing = ", ".join(lacking)
    if choose_scale(patches, of_images=of_images) == "val_loss":
        return [
            f"split val holds nothing of {missing}, so no F1 can choose the epoch: the "
            f"one of the least validation loss is kept; a validation slide that holds "
            f"some would tell more"
        ]
    if not missing:
        return []
    return [
        f"split val holds nothing of {missing}: its scores do not tell how well "
        f"{'it is' if len(lacking) == 1 else 'they are'} found"
    ]
