"""Segment slides by a plain loop in one process; print what it took as JSON.

What one writes in a notebook: read a whole slide, predict it by medray's predictor,
write the mask. Run by compare.py as a process of its own, as the other systems are.
"""

from collections.abc import Iterator
from pathlib import Path

from benchmarks import harness
from benchmarks.throughput.infer import loop
from medray.models.config import Precision, Prediction
from medray.models.predict import Predictor


def main(
    model: Path, out: Path, slides: tuple[Path, ...], precision: Precision = "auto"
) -> Iterator[harness.Result]:
    """Segment slides by a plain loop; the last line is what it took, as JSON.

    Args:
        model: Model folder.
        out: Folder for masks.
        slides: Files.
        precision: As of `medray infer`.
    """
    how = Prediction(precision=precision)
    predictor = Predictor.from_folders([str(model)], how)
    yield {"seconds": loop(predictor, list(slides), out)}


if __name__ == "__main__":
    harness.run(main)
