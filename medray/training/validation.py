"""Validation of a model on patches: counts, scores and pictures."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn

from medray.classes import Classes
from medray.datasets import read_dataset
from medray.evaluation import (
    class_scores,
    confusion,
    draw_overlay,
    of_images,
    small_objects,
    small_scores,
    summary,
)
from medray.models import first_kernels, score_maps
from medray.training.crops import Batch, read_val, val_batch_size
from medray.training.distillation import Distillation
from medray.training.loggers import Tracker
from medray.training.model import TrainingModel
from medray.training.sampler import Sampling, usable_patches
from medray.training.world import World
from medray.types import Row, UInt8

_EXAMPLES = 4  # validation patches that are shown
_COMPARED = 64  # validation patches on which student and teacher are compared


class Picture(NamedTuple):
    """A validation patch: as it is shown (JPEG), and its pixels (3, S, S)."""

    shown: bytes
    pixels: UInt8


@dataclass
class Validation:
    """What is counted of the validation patches, as the batches come in.

    Attributes:
        classes: Names by label value.
        of_images: Whether a patch has one class as a whole.
        shown: Indices of the patches that are drawn.
        counts: (C, C) truth against prediction, see medray.evaluation.metrics.
        small: (4,) of small objects, see there.
        loss: Its sum over the patches.
        patches: How many were predicted.
        pictures: Of those that are shown.
        seconds: That it took.
    """

    classes: Classes
    of_images: bool
    shown: Sequence[int] = ()
    counts: npt.NDArray[np.int64] = field(init=False)
    small: npt.NDArray[np.int64] = field(init=False)
    loss: float = 0.0
    patches: int = 0
    pictures: list[Picture] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Start to count from 0."""
        self.counts = np.zeros((len(self.classes),) * 2, np.int64)
        self.small = np.zeros(4, np.int64)

    def add(self, batch: Batch, predicted: UInt8, loss: float) -> None:
        """Count a batch: its classes (N, S, S), of images (N, 1, 1), and mean loss."""
        self.loss += loss * len(batch.images)
        self.patches += len(batch.images)
        rows = zip(batch.patches, batch.masks, predicted, batch.sizes, strict=True)
        for at, (index, truth, guess, (h, w)) in enumerate(rows):
            truth, guess = truth[:h, :w], guess[:h, :w]
            if self.of_images:
                truth = np.full_like(guess, np.bincount(truth.ravel()).argmax())
            self.counts += confusion(truth, guess, len(self.classes))
            if not self.of_images:
                self.small += small_objects(truth, guess)
            if index in self.shown:
                pixels = np.moveaxis(batch.images[at][:, :h, :w], 0, 2)
                shown = draw_overlay(pixels, truth, guess, self.classes)
                self.pictures.append(Picture(shown, batch.images[at].copy()))

    def gather(self, world: World) -> None:
        """Sum the counts of all ranks."""
        mine = (self.counts, self.small, self.loss, self.patches)
        totals = [sum(part) for part in zip(*world.gather(mine), strict=True)]
        self.counts, self.small, self.loss, self.patches = totals

    def scores(self) -> Row:
        """Return an epoch's scores, with a warning where they hide that all is one."""
        names = self.classes.names
        counted = (
            of_images(self.counts, names) if self.of_images else (self.counts, names)
        )
        scores: Row = dict(summary(*counted)) | small_scores(self.small)
        loss = self.loss / max(self.patches, 1)
        scores["val_loss"] = loss if np.isfinite(loss) else None
        true, predicted = (np.flatnonzero(self.counts.sum(axis=a)) for a in (1, 0))
        if len(predicted) == 1 and len(true) > 1:
            scores["warning"] = (
                f"everything was predicted as {names[predicted[0]]}; if that goes on, "
                f"lower optimizer.lr, or set data.balance"
            )
        return scores

    def metrics(self) -> Row:
        """Return what the best epoch keeps in addition to its entry."""
        return {
            "per_class": class_scores(self.counts, self.classes.names),
            "confusion": self.counts.tolist(),
        }


def choose_examples(data: str, sampling: Sampling, world: World) -> list[int]:
    """Choose patches of rank 0 to show: large ones with something to find, spread."""
    if world.rank:
        return []
    patches, size = usable_patches(data, "val", sampling.data), val_batch_size(data)
    mine = [i for i in range(len(patches)) if i // size % world.size == 0]
    found = [i for i in mine if any(patches[i]["class_px"][1:])] or mine
    most = max(patches[i]["height"] * patches[i]["width"] for i in found)
    candidates = [
        i for i in found if 2 * patches[i]["height"] * patches[i]["width"] >= most
    ]
    chosen = np.linspace(0, len(candidates) - 1, _EXAMPLES).round().astype(int)
    return list(dict.fromkeys(candidates[i] for i in chosen))


def show_pictures(
    tracker: Tracker, step: int, pictures: Sequence[Picture], model: TrainingModel
) -> None:
    """Log predictions to TensorBoard; with the first, kernels and score maps."""
    for number, picture in enumerate(pictures):
        drawn = np.asarray(Image.open(io.BytesIO(picture.shown)))
        tracker.picture(step, f"validation/{number}", drawn)
        if number == 0:
            kernels = first_kernels(model.kept)
            if kernels is not None:
                tracker.picture(step, "network/first_kernels", kernels)
            pixels = torch.from_numpy(picture.pixels)[None].to(model.device)
            maps = score_maps(model.kept.eval(), model.normalise(pixels))
            for name, drawn in maps.items():
                tracker.picture(step, f"network/{name}", drawn)


def compare_with_teacher(data: str, model: TrainingModel, teacher: Distillation) -> Row:
    """Return scores and speed of teacher and student on validation patches.

    Returns:
        By `teacher` and `student`: f1, parameters, patches_per_second; of the student
        as it is after the last epoch.
    """
    models: dict[str, tuple[nn.Module, Callable[[Batch], UInt8]]] = {
        "teacher": (teacher.network, teacher.predict),
        "student": (model.kept, lambda batch: model.predict(batch)[0]),
    }
    sampling = model.recipe.sampling
    classes = read_dataset(data).classes
    counts = {name: np.zeros((len(classes), len(classes)), np.int64) for name in models}
    seconds = dict.fromkeys(models, 0.0)
    patches = len(usable_patches(data, "val", sampling.data))
    seen, size = 0, val_batch_size(data)
    for first in range(0, min(patches, _COMPARED), size):
        batch = read_val(data, sampling, first, size)
        if not len(batch.images):
            continue
        for name, (_, predict) in models.items():
            if not seen:
                predict(batch)  # what is chosen at first use is then chosen
            start = time.perf_counter()
            predicted = predict(batch)
            seconds[name] += time.perf_counter() - start
            rows = zip(batch.masks, predicted, batch.sizes, strict=True)
            for truth, guess, (h, w) in rows:
                counts[name] += confusion(truth[:h, :w], guess[:h, :w], len(classes))
        seen += len(batch.images)
    return {
        name: {
            "f1": summary(counts[name], classes.names)["f1"],
            "parameters": sum(p.numel() for p in network.parameters()),
            "patches_per_second": seen / max(seconds[name], 1e-9),
        }
        for name, (network, _) in models.items()
    }
