"""Which crop of which patch of a dataset comes when.

Without torch, so that the processes that read start quickly. The order is a function
of the recipe's seed and the epoch (and of the losses, if hard patches are preferred),
never of who reads when.
"""

from __future__ import annotations

import functools
from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from medray.datasets import read_patches
from medray.training.settings import STRICT
from medray.types import Row

Floats = npt.NDArray[np.float64]
Side = Annotated[int, Field(ge=32, le=2048, multiple_of=32)]


@dataclass(frozen=True, config=STRICT)
class Data:
    """Which pixels a training sees, and how often.

    Attributes:
        crop: Side of a training crop in pixels, a multiple of 32; or several sides that
            the epochs go through in equal parts (progressive resolution).
        min_tissue: Patches with less tissue (0 to 1) are left out.
        samples: Crops an epoch; None: one a patch.
        balance: Draw each class equally often: first the class, then a patch by how
            much it holds of it, then a crop around one of its pixels.
        hard: Share of the draws (0 to 1) that go to patches by their last loss.
    """

    crop: Side | Annotated[tuple[Side, ...], Field(min_length=1)] = 256
    min_tissue: float = Field(default=0.05, ge=0, le=1)
    samples: Annotated[int, Field(ge=0)] | None = None
    balance: bool = False
    hard: float = Field(default=0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hard and self.balance:
            raise ValueError("data.hard: not with data.balance; set one of them")
        return self

    @property
    def crops(self) -> tuple[int, ...]:
        """The sides that the epochs go through."""
        return (self.crop,) if isinstance(self.crop, int) else self.crop


@dataclass(frozen=True, config=STRICT)
class Sampling:
    """The part of a recipe that decides which crops come when.

    Attributes:
        data: Which pixels are seen.
        seed: Of the order and of the crops' places.
        epochs: Of the longest training.
        batch: Crops per step.
        micro_batch_size: Crops that are read together.
        unlabelled: Read as many crops of slides without annotation in addition.
    """

    data: Data
    seed: int
    epochs: int
    batch: int
    micro_batch_size: int
    unlabelled: bool = False

    @property
    def micro_batches(self) -> int:
        """Micro batches of a step, which the workers share among them."""
        return self.batch // self.micro_batch_size


@functools.lru_cache(maxsize=8)
def usable_patches(data: str, split: str, how: Data) -> list[Row]:
    """Return the patches of a split with enough tissue, in a fixed order.

    Split "" holds those of slides without annotation.
    """
    rows = [
        row
        for row in read_patches(data, split)
        if row["tissue"] >= how.min_tissue or any(row["class_px"][1:])
    ]
    return sorted(rows, key=lambda row: (row["slide"], row["y"], row["x"]))


def steps_per_epoch(sampling: Sampling, patches: int) -> int:
    """Return the optimizer's steps of an epoch."""
    return max(1, (sampling.data.samples or patches) // sampling.batch)


def crop_of_epoch(sampling: Sampling, epoch: int) -> int:
    """Return the side of the crops of an epoch, in pixels."""
    sides = sampling.data.crops
    return sides[min(epoch * len(sides) // sampling.epochs, len(sides) - 1)]


def shares(class_px: npt.NDArray[np.int64], how: Data, losses: Floats) -> Floats:
    """Return how often each patch is to be drawn, and for which class.

    Args:
        class_px: (N, C) pixels of each class in each patch.
        how: Balance and hard patches.
        losses: (N,) last losses of the patches; NaN where there is none yet.

    Returns:
        (N, C + 1), the sum 1; the last column is drawn for no class in particular.
    """
    n, classes = class_px.shape
    wanted = np.zeros((n, classes + 1))
    if how.balance:
        totals = class_px.sum(axis=0)
        wanted[:, :classes] = class_px / np.maximum(totals, 1)
        wanted /= np.count_nonzero(totals)
        return wanted
    wanted[:, -1] = 1 / n
    known = ~np.isnan(losses)
    if how.hard and losses[known].sum() > 0:
        filled = np.where(known, losses, losses[known].mean())
        wanted[:, -1] *= 1 - how.hard
        wanted[:, -1] += how.hard * filled / filled.sum()
    return wanted


def draw(wanted: Floats, count: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Draw `count` cells of `wanted` in a random order.

    Systematic sampling (Madow 1949): a cell is drawn as often as its share of the
    count, rounded up or down. So with equal shares and as many draws as patches each
    patch is drawn once, and with fewer they are spread evenly over the slides.

    Returns:
        (count, 2): row and column.
    """
    ends = np.cumsum(wanted.ravel())
    places = (np.arange(count) + rng.random()) / count * ends[-1]
    cells = np.minimum(np.searchsorted(ends, places, side="right"), ends.size - 1)
    order = rng.permutation(cells)
    return np.stack(np.unravel_index(order, wanted.shape), axis=1)


@functools.lru_cache(maxsize=4)
def order_of_epoch(
    data: str, sampling: Sampling, epoch: int, losses: bytes = b""
) -> npt.NDArray[np.int64]:
    """Return the patch and the class (N, 2) that each crop of an epoch is drawn for.

    A class that is none of the dataset's: for no class in particular. `losses` are
    those of the patches, float64, that hard patches are chosen by.
    """
    patches = usable_patches(data, "train", sampling.data)
    known = np.frombuffer(losses) if losses else np.full(len(patches), np.nan)
    class_px = np.array([row["class_px"] for row in patches], np.int64)
    count = steps_per_epoch(sampling, len(patches)) * sampling.batch
    rng = np.random.default_rng((sampling.seed, epoch))
    return draw(shares(class_px, sampling.data, known), count, rng)
