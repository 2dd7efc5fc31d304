"""The whole way on generated slides: what `make demo` runs."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from medray.datasets import generate, ingest
from medray.evaluation import Evaluation, evaluate
from medray.inference import Options, infer
from medray.storage import write_settings
from medray.training import Recipe, train

log = logging.getLogger(__name__)

# Enough for an F1 above 0.9 in a few minutes on two cores.
_SLIDES, _NEW_SLIDES, _EPOCHS = 12, 4, 5


def demo(
    out: str = "demo", *, recipe: Recipe | None = None, options: Options | None = None
) -> Evaluation:
    """Generate slides, ingest, train, infer on slides never seen, and evaluate.

    Args:
        out: Folder to work in; what is finished there is not done again.
        recipe: How to train; by default a U-Net for minutes.
        options: How to infer; by default the model's way.

    Returns:
        The evaluation on the new slides.
    """
    folder = Path(out).absolute()
    known, new = folder / "known", folder / "new"
    log.info("generating %d slides to learn from, %d new ones", _SLIDES, _NEW_SLIDES)
    generate(known, slides=_SLIDES, seed=1)
    generate(new, slides=_NEW_SLIDES, seed=1000, prefix="new")
    ingest(
        [str(known / "slides")],
        annotations=str(known / "annotations"),
        groups=str(known / "groups.csv"),
        fractions=(0.8, 0.2, 0.0),
        out=str(folder / "dataset"),
    )
    if recipe is None:
        recipe = Recipe()
        schedule = replace(recipe.schedule, epochs=_EPOCHS)
        recipe = replace(recipe, schedule=schedule)
    write_settings(str(folder / "recipe.yaml"), recipe)
    train(
        str(folder / "recipe.yaml"),
        data=str(folder / "dataset"),
        out=str(folder / "model"),
    )
    infer(
        [str(new / "slides")],
        model=str(folder / "model"),
        out=str(folder / "run"),
        options=options,
    )
    return evaluate(
        str(folder / "run"),
        truth=str(new / "annotations"),
        out=str(folder / "report"),
    )
