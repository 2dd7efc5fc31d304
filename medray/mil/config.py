"""Slide models: their recipe, their configuration, their folder; without torch.

The folder holds model.yaml (SlideModel), weights.safetensors, metrics.json, slides.csv
(which slides trained and chose it) and README.md.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from medray.datasets import check_fractions
from medray.errors import ConfigError
from medray.mil.features import Encoder
from medray.models import digest_of
from medray.storage import files, from_dict, read_yaml


@dataclass(frozen=True)
class SlideHead:
    """What makes a slide's classes of the vectors of its tiles.

    Attributes:
        name: attention (gated attention, Ilse et al. 2018), or linear (one layer over
            the mean of the tiles).
        hidden: Units of the layer (ReLU) before the attention.
        attention: Units of the attention.
        dropout: Share of the hidden units that is dropped in training.
    """

    name: Literal["attention", "linear"] = "attention"
    hidden: int = 256
    attention: int = 128
    dropout: float = 0.25

    def __post_init__(self) -> None:
        """Check the ranges."""
        if min(self.hidden, self.attention) < 1 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"head: expected hidden and attention of 1 or more and dropout from 0 "
                f"to 1, found {self}"
            )


@dataclass(frozen=True)
class SlideRecipe:
    """Everything that decides a training on slides' labels, except the data.

    Attributes:
        head: What is trained.
        lr: Learning rate of AdamW; constant.
        weight_decay: Of AdamW.
        batch: Slides per step.
        epochs: Longest training.
        patience: Epochs without a smaller loss on the validation slides before it
            stops.
        balance: Let each class weigh the same in the loss, however rare.
        fractions: Shares of train, val and test.
        classes: Their order; of two the second is what is looked for. Empty: by name.
        seed: Of initial weights, splits, order and dropout.
    """

    head: SlideHead = field(default_factory=SlideHead)
    lr: float = 2e-4
    weight_decay: float = 1e-2
    batch: int = 8
    epochs: int = 100
    patience: int = 15
    balance: bool = True
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    classes: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_fractions(self.fractions)
        if min(self.fractions[:2]) <= 0:
            raise ValueError(
                f"fractions: train and val need slides, found {self.fractions}"
            )
        if self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"expected lr above 0 and weight_decay of 0 or more, "
                f"found {self.lr} and {self.weight_decay}"
            )
        if min(self.batch, self.epochs, self.patience) < 1:
            raise ValueError(
                f"expected batch, epochs and patience of 1 or more, found "
                f"{self.batch}, {self.epochs} and {self.patience}"
            )


@dataclass(frozen=True, kw_only=True)
class SlideModel:
    """What a model of slides is and what it must be fed; stored as `model.yaml`.

    Attributes:
        head: The network.
        classes: Names, in the order of its outputs.
        encoder: Whose features it takes.
        provenance: Digests, versions and recipe of the training.
    """

    head: SlideHead
    classes: tuple[str, ...]
    encoder: Encoder
    provenance: dict[str, Any] = field(default_factory=dict)

    RENAMED: ClassVar[dict[str, str]] = {"made_from": "provenance"}


def holds_slide_model(folder: str) -> bool:
    """Return whether a folder holds a model of slides, not one of pixels or images."""
    uri = files.join(folder, "model.yaml")
    return files.exists(uri) and "head" in read_yaml(uri)


def read_slide_model(folder: str) -> SlideModel:
    """Read `model.yaml`.

    Raises:
        ConfigError: The folder holds no model of slides.
    """
    if not holds_slide_model(folder):
        raise ConfigError(
            f"{folder}: expected a model of slides; `medray train "
            f"attention-mil --data FEATURES --labels CSV` makes one"
        )
    uri = files.join(folder, "model.yaml")
    return from_dict(SlideModel, read_yaml(uri), uri)


def slide_model_digest(folder: str) -> str:
    """Return the digest of what decides predictions: weights and configuration."""
    weights = files.join(folder, "weights.safetensors")
    return digest_of(read_slide_model(folder), weights)


SEEN = ("slide", "digest", "patient", "label", "split")
"""Columns of slides.csv."""


def write_seen_slides(uri: str, rows: Sequence[dict[str, str]]) -> None:
    """Write which slides trained, chose and were kept from a model."""
    text = io.StringIO()
    writer = csv.DictWriter(text, SEEN, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: row[name] for name in SEEN} for row in rows)
    files.write_bytes(uri, text.getvalue().encode())


def read_seen_slides(uri: str) -> list[dict[str, str]]:
    """Read what `write_seen_slides` wrote."""
    text = files.read_bytes(uri).decode()
    return [dict(row) for row in csv.DictReader(io.StringIO(text))]
