"""Features of slides and their labels -> a model of slides.

One process: a slide is some thousand vectors, a training takes minutes. Killed, the
same command starts again and makes the same model.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medray.datasets import joined_groups, split_slides
from medray.errors import ConfigError
from medray.evaluation import class_scores, confusion, f1_line
from medray.mil.config import (
    SlideModel,
    SlideRecipe,
    read_slide_model,
    write_seen_slides,
)
from medray.mil.features import read_features, read_slide
from medray.mil.labels import SlideLabel, classes_of, join_labels
from medray.storage import files, locked, named_digest, read_settings, to_dict
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


def train_slides(
    recipe: str,
    *,
    data: str,
    labels: str,
    out: str,
    ignore_unknown: bool = False,
    overrides: Sequence[str] = (),
) -> SlideTraining:
    """Train a model of slides as a recipe says.

    Args:
        recipe: Name, see `medray recipes`, or path of a YAML file.
        data: Features, as `medray embed` writes them.
        labels: CSV (slide,label[,patient]): train a model of slides on features.
        out: Model folder to make.
        ignore_unknown: Leave out labels of slides without features. Without it they are
            refused.
        overrides: Keys of the recipe to change, such as `lr=1e-3`.

    Raises:
        ConfigError: The recipe, the features or the labels are wrong, OUT holds another
            model, or another process works there.
        MedrayError: The training cannot go on.
    """
    recipe = find_slide_recipe(recipe)
    settings = read_settings(SlideRecipe, recipe, overrides)
    data, labels, out = (files.absolute(place) for place in (data, labels, out))
    with locked(out, "train"):
        return _train(settings, data, labels, out, ignore_unknown)


def _train(
    settings: SlideRecipe, data: str, labels: str, out: str, ignore_unknown: bool
) -> SlideTraining:
    start = time.perf_counter()
    features, rows = read_features(data)
    label_of, _ = join_labels(labels, rows, ignore_unknown=ignore_unknown)
    slides, left_out = _slides(rows, label_of, labels, data)
    classes = classes_of(labels, [row["label"] for row in slides], settings.classes)
    provenance = _provenance(settings, features.encoder.digest(), slides, data)
    if files.exists(files.join(out, "model.yaml")):
        return _trained_before(out, provenance)
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
    bags = functools.cache(read) if size <= _HELD_BYTES else read
    truth = [classes.index(row["label"]) for row in slides]
    of = {
        split: [i for i, row in enumerate(slides) if row["split"] == split]
        for split in ("train", "val", "test")
    }
    log.info(
        "training on %d slides, validating on %d", len(of["train"]), len(of["val"])
    )
    # Imported here: with it comes torch, and what is wrong is said sooner without.
    from medray.mil.network import fit, save_slide_model

    network, history, predicted = fit(
        model, settings, bags, truth, of["train"], of["val"]
    )
    counts = confusion(np.array(truth)[of["val"]], predicted, len(classes))
    scores = [row["f1"] for row in class_scores(counts, classes)]
    known = [value for value in scores if value is not None]
    metrics: Row = {
        "f1": float(np.mean(known)) if known else None,
        "confusion": counts.tolist(),
        "history": history,
        "slides": {split: len(numbers) for split, numbers in of.items()},
        "left_out": left_out,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    write_seen_slides(files.join(out, "slides.csv"), slides)
    save_slide_model(out, model, network, metrics)
    seconds = time.perf_counter() - start
    return SlideTraining(out, True, len(history), metrics["f1"], seconds)


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
    """Tell early what would make a training pointless."""
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
    """Name a training: equal digests mean equal recipe, features and labels."""
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
