"""The whole way on generated slides: what `make demo` runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medray.evaluate import Evaluation, evaluate
from medray.infer import infer
from medray.ingest import ingest
from medray.settings import write_settings
from medray.synth import generate
from medray.train import train


@dataclass(frozen=True)
class _Story:
    """How much of everything the demo makes."""

    slides: int = 12
    new_slides: int = 4


def demo(out: str) -> Evaluation:
    """Generate slides, ingest, train, infer on slides never seen, and evaluate.

    Args:
        out: Folder to work in; what is finished there is not done again.

    Returns:
        The evaluation on the new slides.
    """
    folder, story = Path(out).absolute(), _Story()
    generate(folder / "known", slides=story.slides, seed=1)
    generate(folder / "new", slides=story.new_slides, seed=1000, prefix="new")
    ingest(
        [str(folder / "known" / "slides")],
        annotations=str(folder / "known" / "annotations"),
        groups=str(folder / "known" / "groups.csv"),
        fractions=(0.8, 0.2, 0.0),
        out=str(folder / "dataset"),
    )
    train(
        str(folder / "recipe.yaml"),
        data=str(folder / "dataset"),
        out=str(folder / "model"),
    )
    infer(
        [str(folder / "new" / "slides")],
        model=str(folder / "model"),
        out=str(folder / "run"),
    )
    return evaluate(
        str(folder / "run"),
        truth=str(folder / "new" / "annotations"),
        out=str(folder / "report"),
    )


_ = write_settings
