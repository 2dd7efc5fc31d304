"""Features of slides and their labels -> a model of slides.

One process: a slide is some thousand vectors, a training takes minutes. Killed, the
same command starts again and makes the same model.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

from medray.evaluation import class_scores, confusion
from medray.mil.config import write_seen_slides
from medray.mil.settled import (
    SlideRequest,
    SlideTraining,
    read_request,
    settle_slide_training,
)
from medray.storage import files, locked
from medray.types import Row

log = logging.getLogger(__name__)


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
    request = read_request(recipe, data, labels, out, overrides)
    with locked(request.out, "train"):
        return _train(request, ignore_unknown)


def _train(request: SlideRequest, ignore_unknown: bool) -> SlideTraining:
    start = time.perf_counter()
    settled = settle_slide_training(request, ignore_unknown)
    if isinstance(settled, SlideTraining):
        return settled
    of, truth, classes = settled.of, settled.truth, settled.model.classes
    log.info(
        "training on %d slides, validating on %d", len(of["train"]), len(of["val"])
    )
    # Imported here: with it comes torch, and what is wrong is said sooner without.
    from medray.mil.network import fit, save_slide_model

    network, history, predicted = fit(
        settled.model, request.recipe, settled.bags, truth, of["train"], of["val"]
    )
    counts = confusion(np.array(truth)[of["val"]], predicted, len(classes))
    scores = [row["f1"] for row in class_scores(counts, classes)]
    known = [value for value in scores if value is not None]
    metrics: Row = {
        "f1": float(np.mean(known)) if known else None,
        "confusion": counts.tolist(),
        "history": history,
        "slides": {split: len(numbers) for split, numbers in of.items()},
        "left_out": settled.left_out,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    write_seen_slides(files.join(request.out, "slides.csv"), settled.slides)
    save_slide_model(request.out, settled.model, network, metrics)
    seconds = time.perf_counter() - start
    return SlideTraining(request.out, True, len(history), metrics["f1"], seconds)
