"""A recipe, features and labels of slides, checked together before a training."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medray.datasets import SPLITS, joined_groups, split_slides
from medray.errors import ConfigError
from medray.evaluation import f1_line
from medray.mil.config import SlideModel, SlideRecipe, read_slide_model
from medray.mil.features import read_features, read_slide
from medray.mil.labels import SlideLabel, classes_of, join_labels
from medray.storage import files, named_digest, read_settings, to_dict
from medray.training import find_slide_recipe
from medray.types import Row

log = logging.getLogger(__name__)

# Features up to so many bytes are kept in memory, more are read in every epoch.
_HELD_BYTES = 8 << 30


@dataclass(frozen=True)
class SlideTraining:
    """What a training on slides' labels did.

    Attributes:
        out: The model folder.
        trained: Whether it was made now; it was there already otherwise.
        epochs: That were gone through.
        f1: Mean F1 of the classes on the validation slides, at the best epoch.
        seconds: Wall time.
    """

    out: str
    trained: bool
    epochs: int
    f1: float | None
    seconds: float

    def __str__(self) -> str:
        state = "trained" if self.trained else "was there already"
        return f"{f1_line(self.f1)}\nout     {self.out}\n{state}, {self.epochs} epochs"


@dataclass(frozen=True)
class SlideRequest:
    """The request of a training on slides' labels, with absolute paths.

    Attributes:
        recipe: How.
        data: Features.
        labels: CSV.
        out: Model folder.
    """

    recipe: SlideRecipe
    data: str
    labels: str
    out: str


@dataclass(frozen=True)
class SettledSlides:
    """A training on slides' labels that may start.

    Attributes:
        model: The configuration.
        slides: Those that take part, with `label`, `patient`, `tiles` and `split`.
        left_out: Why others do not, by slide.
        truth: Class of each of the slides.
        of: Numbers of the slides of each split.
        bags: Gives the (N, D) float32 features of a slide by its number.
    """

    model: SlideModel
    slides: list[Row]
    left_out: dict[str, str]
    truth: list[int]
    of: Mapping[str, list[int]]
    bags: Callable[[int], npt.NDArray[np.float32]]


def read_request(
    recipe: str, data: str, labels: str, out: str, overrides: Sequence[str]
) -> SlideRequest:
    """Read the recipe of a training on slides' labels.

    Raises:
        ConfigError: There is none of this name, an unknown key or a wrong value.
    """
    settings = read_settings(SlideRecipe, find_slide_recipe(recipe), overrides)
    return SlideRequest(settings, *map(files.absolute, (data, labels, out)))


def settle_slide_training(
    request: SlideRequest, ignore_unknown: bool
) -> SettledSlides | SlideTraining:
    """Return a training that may start, or the one that was done before.

    Nothing is written.

    Raises:
        ConfigError: The features or the labels are wrong, or OUT holds another model.
    """
    settings, data, labels = request.recipe, request.data, request.labels
    features, rows = read_features(data)
    label_of, _ = join_labels(labels, rows, ignore_unknown=ignore_unknown)
    slides, left_out = _slides(rows, label_of, labels, data)
    classes = classes_of(labels, [row["label"] for row in slides], settings.classes)
    provenance = _provenance(settings, features.encoder.digest(), slides, data)
    if files.exists(files.join(request.out, "model.yaml")):
        return _trained_before(request.out, provenance)
    splits = split_slides(
        joined_groups(
            [row | {"group": row["patient"], "stratum": row["label"]} for row in slides]
        ),
        fractions=settings.fractions,
        seed=settings.seed,
    )
    for row in slides:
        row["split"] = splits[row["slide"]]
    _check_splits(slides, classes, labels)
    model = SlideModel(
        head=settings.head,
        classes=classes,
        encoder=features.encoder,
        provenance=provenance,
    )

    def read(number: int) -> npt.NDArray[np.float32]:
        found = read_slide(data, slides[number]["slide"]).features
        return found.astype(np.float32)

    size = 4 * features.encoder.dimensions * sum(row["tiles"] for row in slides)
    return SettledSlides(
        model=model,
        slides=slides,
        left_out=left_out,
        truth=[classes.index(row["label"]) for row in slides],
        of={
            split: [i for i, row in enumerate(slides) if row["split"] == split]
            for split in SPLITS
        },
        bags=functools.cache(read) if size <= _HELD_BYTES else read,
    )


def _slides(
    rows: dict[str, Row], labels: dict[str, SlideLabel], uri: str, data: str
) -> tuple[list[Row], dict[str, str]]:
    """Return the slides that have features and a label, and why others are left out."""
    found, left_out = [], {}
    for slide, row in sorted(rows.items()):
        if slide not in labels:
            left_out[slide] = "no label"
        elif row["status"] != "done":
            left_out[slide] = row["message"]
        elif not row["tiles"]:
            left_out[slide] = "no tissue"
        else:
            known = labels[slide]
            found.append(
                {name: row[name] for name in ("slide", "digest", "tiles")}
                | {"label": known.label, "patient": known.patient}
            )
    for slide, why in left_out.items():
        log.warning("slide=%s is left out: %s", slide, why)
    if not found:
        raise ConfigError(
            f"{uri}: none of its slides has features in {data}; such as "
            f"{next(iter(left_out.items()), 'none there')}"
        )
    return found, left_out


def _check_splits(slides: list[Row], classes: Sequence[str], uri: str) -> None:
    """Raise an error, before training, for splits that would make it pointless."""
    if not any(row["split"] == "val" for row in slides):
        patients = len({row["patient"] for row in slides})
        raise ConfigError(
            f"{uri}: {patients} patients are too few for a validation split; label "
            f"more, or set fractions, such as fractions=[0.5,0.5,0]"
        )
    there = {row["label"] for row in slides if row["split"] == "train"}
    if missing := [name for name in classes if name not in there]:
        raise ConfigError(
            f"{uri}: no slide of {missing} is in split train, as too few patients have "
            f"it; label more, try another seed, or leave the class out"
        )


def _provenance(
    settings: SlideRecipe, encoder_digest: str, slides: list[Row], data: str
) -> Row:
    """Return a training's provenance; its digest names recipe, features and labels."""
    plain = [to_dict(settings), encoder_digest, slides]
    return {
        "digest": named_digest(json.dumps(plain).encode()),
        "data": data.rsplit("/", 1)[-1],
        "recipe": to_dict(settings),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


_PACKAGES = ("medray", "torch", "timm")


def _trained_before(out: str, provenance: Row) -> SlideTraining:
    before = read_slide_model(out).provenance
    if before.get("digest") != provenance["digest"]:
        raise ConfigError(
            f"{out}: holds a model of another recipe, of other features or labels; "
            f"choose another --out, or delete this model"
        )
    metrics = files.read_json(files.join(out, "metrics.json"))
    return SlideTraining(out, False, len(metrics["history"]), metrics["f1"], 0.0)
