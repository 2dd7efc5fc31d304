"""The model to hand out: a recipe trained on all images that are given, and its export.

The figures of docs/results.md are of trainings that have not seen the tested images
(classification.py, segmentation.py). Here nothing is kept for a test but the official
test images of the X-rays; an eighth, whole patients, chooses the epoch.

    python -m benchmarks.quality.whole --recipe cervical --weights FILE --out out
"""

import csv
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import ray

from benchmarks import harness
from benchmarks.harness import ROOT
from benchmarks.quality import classification, segmentation
from benchmarks.quality.folds import number
from medray.apps.export import export
from medray.datasets import read_patches
from medray.datasets.image_folder import ingest_images
from medray.datasets.ingest_slides import ingest
from medray.evaluation.evaluate_image_folder import evaluate_images
from medray.execution import cluster
from medray.models.config import model_digest
from medray.training.checkpoint import read_history
from medray.training.recipe import read_recipe
from medray.training.train_model import train

SETS = {"cervical": "sipakmed-full", "malaria": "malaria-colour", "pneumonia": "xray"}


def main(
    recipe: Literal["cervical", "malaria", "pneumonia", "nuclei"],
    out: Path,
    weights: Path | None = None,
    data: Path = ROOT.parent / "shared" / "data",
    format: Literal["pt2", "onnx"] = "onnx",
    overrides: tuple[str, ...] = (),
) -> Iterator[harness.Result]:
    """Train a recipe on all that is given, and export the model.

    Args:
        recipe: Which one.
        out: Folder of data, model, export and, of X-rays, report.
        weights: File of the encoder's weights; none: random ones.
        data: Folder with the sets.
        format: Of the export.
        overrides: Changed keys of the recipe, key=value.
    """
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("medray").setLevel(logging.INFO)
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    cluster.connect()
    start = [f"weights={weights.absolute()}"] if weights else ["weights=null"]
    changed = [*start, *overrides]
    dataset, model = str(out / "data"), str(out / "model")
    if recipe == "nuclei":
        _nuclei(data, out)
    else:
        _images(recipe, data, out, read_recipe(recipe, changed).window.size)
    trained = train(recipe, data=dataset, out=model, overrides=changed)
    if recipe == "pneumonia":
        evaluate_images(model, data=dataset, out=str(out / "report"))
    shutil.rmtree(out / "export", ignore_errors=True)
    exported = export(model, format=format, out=str(out / "export"), data=dataset)
    ray.shutdown()
    yield {
        "recipe": recipe,
        "trained on": len(read_patches(dataset, "train")),
        "epoch chosen by": len(read_patches(dataset, "val")),
        "F1 of those": number(trained.f1),
        "s": round(sum(epoch["seconds"] for epoch in read_history(model))),
        "weights": model_digest(model),
        "export": exported.format,
        "export agrees on": number(exported.agreement),
        "export, MiB": round(exported.file_bytes / 2**20, 1),
        "overrides": list(overrides),
    }


def _images(recipe: str, data: Path, out: Path, side: int) -> None:
    name = SETS[recipe]
    cells = classification.SETS[name](data, out)
    images = classification.list_images(cells, None)
    if name == "xray":
        (split,) = classification.splits_of(name, images, 1, cells.many)
    else:
        eighths = classification.folds_of(images, 8, seed=1)
        split = {image: "train" if part else "val" for image, part in eighths.items()}
    groups = {image.name: image.patient for image in images if image.name in split}
    ingest_images(
        str(cells.folder),
        out=str(out / "data"),
        side=side,
        classes=cells.classes,
        groups=_table(out / "groups.csv", "group", groups),
        splits=_table(out / "splits.csv", "split", split),
    )


def _nuclei(data: Path, out: Path) -> None:
    fields = segmentation.nuclei_fields(data)
    eighths = segmentation.folds_of(fields, 8)
    split = {name: "train" if part else "val" for name, part in eighths.items()}
    ingest(
        [str(image) for image in fields.images],
        annotations=str(fields.annotations),
        classes=fields.classes,
        splits=_table(out / "splits.csv", "split", split),
        mpp=0.5,
        out=str(out / "data"),
    )


def _table(file: Path, column: str, values: dict[str, str]) -> str:
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["slide", column])
        writer.writerows(sorted(values.items()))
    return str(file)


if __name__ == "__main__":
    harness.run(main)
