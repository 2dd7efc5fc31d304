"""A recipe: the YAML file that names everything about one training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from medray.grid import Windows
from medray.models.config import Architecture
from medray.settings import read_settings


@dataclass(frozen=True)
class Data:
    """Which pixels a training sees.

    Attributes:
        crop: Side of a training crop in pixels; a multiple of 32, at most a patch.
        min_tissue: Patches with less tissue (0 to 1) are left out.
        samples: Crops an epoch; None: one a patch.
    """

    crop: int = 256
    min_tissue: float = 0.05
    samples: int | None = None

    def __post_init__(self) -> None:
        """Check that a crop fits into a patch and through the encoder."""
        if not 32 <= self.crop <= 512 or self.crop % 32:
            raise ValueError(
                f"data.crop: expected a multiple of 32 up to 512, found {self.crop}"
            )


@dataclass(frozen=True)
class Loss:
    """A weighted sum of losses; a weight of 0 leaves one out.

    Attributes:
        dice: Weight of the soft Dice loss (Milletari et al. 2016).
        focal: Weight of the focal loss, gamma 2 (Lin et al. 2017).
        cross_entropy: Weight of the cross entropy.
        hardest: Share of the pixels, those of the greatest loss, that focal loss and
            cross entropy count (online hard-example mining); 1: all.
        l2: Weight of the sum of squares of the weights above the encoder.
    """

    dice: float = 1.0
    focal: float = 1.0
    cross_entropy: float = 0.0
    hardest: float = 1.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        """Check that something is left to minimise."""
        weights = (self.dice, self.focal, self.cross_entropy)
        if min(*weights, self.l2) < 0 or max(weights) == 0:
            raise ValueError(
                f"loss weights must be >= 0 and not all 0, found {weights}"
            )
        if not 0 < self.hardest <= 1:
            raise ValueError(
                f"loss.hardest: expected a share above 0 and up to 1, "
                f"found {self.hardest}"
            )


@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter 2019).

    Attributes:
        lr: Highest learning rate.
        weight_decay: Decoupled weight decay.
        clip: Largest norm of the gradient; 0: no clipping.
    """

    lr: float = 1e-3
    weight_decay: float = 1e-2
    clip: float = 1.0


@dataclass(frozen=True)
class Schedule:
    """How long, and how the learning rate goes: linear warm-up, then a cosine to 0.

    Attributes:
        epochs: Longest training.
        warmup: Share of the steps in which the learning rate rises.
        patience: Epochs without a better validation F1 before it stops early.
    """

    epochs: int = 20
    warmup: float = 0.05
    patience: int = 10


@dataclass(frozen=True)
class Augment:
    """Random changes of a crop, image and mask together.

    Attributes:
        flips: Mirror, and turn by right angles.
        brightness: Largest relative change.
        contrast: Largest relative change.
        saturation: Largest relative change.
        hue: Largest shift, in turns of the colour circle (0 to 0.5).
    """

    flips: bool = True
    brightness: float = 0.15
    contrast: float = 0.15
    saturation: float = 0.15
    hue: float = 0.03


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training, beside the data.

    Attributes:
        model: Network and encoder.
        weights: Encoder weights to start from: None for random, "imagenet".
        window: How inference will look at slides with the model.
        data: Which pixels are seen.
        loss: What is minimised.
        optimizer: By what.
        schedule: For how long.
        augment: Random changes of the crops.
        batch: Crops a step, over all workers together.
        precision: auto, float32, bfloat16 or float16.
        seed: Of initial weights, order, crops and augmentation.
        workers: Processes (GPUs) that train together.
    """

    model: Architecture = field(default_factory=Architecture)
    weights: str | None = None
    window: Windows = field(default_factory=Windows)
    data: Data = field(default_factory=Data)
    loss: Loss = field(default_factory=Loss)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    augment: Augment = field(default_factory=Augment)
    batch: int = 8
    precision: str = "auto"
    seed: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        """Check what concerns several keys."""
        if self.workers < 1 or self.batch % self.workers:
            raise ValueError(
                f"batch: expected a multiple of workers ({self.workers}), "
                f"found {self.batch}"
            )
        if self.window.size % 32:
            raise ValueError(
                f"window.size: expected a multiple of 32, found {self.window.size}"
            )


def read_recipe(uri: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, with overrides such as `optimizer.lr=1e-4`.

    Raises:
        ConfigError: An unknown key or a wrong value.
    """
    return read_settings(Recipe, uri, overrides)
