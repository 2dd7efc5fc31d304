"""How well classifiers do on cells and X-rays that they have never seen.

K-fold over patients: each image is a test image once. The other folds train, but for
one that chooses the epoch and the temperature. `medray evaluate` refuses a model that
has seen a test image. All test images are pooled; intervals are 95 % bootstrap
intervals over patients.

Running it again goes on where it was killed: a finished fold has its result.json. With
--earlier the folds that are there, of the same recipe and deal, are not run again, and
those that are run are added.

    python -m benchmarks.quality.classification folds --dataset malaria --out results
    python -m benchmarks.quality.classification table --out results

From random weights: --overrides weights=null. With --record FILE the page's row, and
what it was made of, is written; `make figures` puts it into docs/results.md.

One file, because a set, its deal and its recipe belong together.
"""

import csv
import json
import logging
import re
import shutil
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import ray
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from benchmarks import harness
from benchmarks.harness import ROOT
from benchmarks.quality.folds import digest_of, number, read_record, write_record
from medray.datasets.find_images import find_images
from medray.datasets.image_folder import ingest_images
from medray.evaluation.evaluate_image_folder import evaluate_images
from medray.evaluation.image_metrics import Predicted, score
from medray.evaluation.review_images import SURE
from medray.execution import cluster
from medray.models.config import Tta, model_digest
from medray.models.folder import load_model
from medray.storage.yaml_config import to_dict
from medray.training.checkpoint import read_history
from medray.training.recipe import read_recipe
from medray.training.train_model import train


@dataclass(frozen=True)
class Cells:
    """Images in class folders.

    Attributes:
        folder: Of class folders, or of train and test with class folders.
        classes: By label value; of two the second is looked for.
        patients: Finds the patient in CLASS/IMAGE; "": each image is one.
        recipe: That is taken if no other is asked for.
        many: Images enough for an eighth of what is not tested to choose; else a fold.
    """

    folder: Path
    classes: tuple[str, ...]
    patients: str
    recipe: str
    many: bool = False


def unpacked(archive: Path, out: Path) -> Path:
    """Unpack an archive, once."""
    folder = out / "unpacked" / archive.stem
    if not folder.exists():
        part = folder.with_suffix(".part")
        shutil.rmtree(part, ignore_errors=True)
        with zipfile.ZipFile(archive) as file:
            file.extractall(part)
        part.rename(folder)
    return folder


def malaria(data: Path, out: Path) -> Cells:
    return Cells(
        unpacked(data / "malaria.zip", out) / "cell_images",
        ("Uninfected", "Parasitized"),
        "/(.*?)_?[Tt]hin",
        "malaria-resnet50v2",
    )


def malaria_random(data: Path, out: Path) -> Cells:
    cells = malaria(data, out)
    return Cells(cells.folder, cells.classes, "", cells.recipe)


def xray(data: Path, out: Path) -> Cells:
    return Cells(
        unpacked(data / "chest_xray.zip", out) / "chest_xray",
        ("NORMAL", "PNEUMONIA"),
        r"/(person\d+|(?:NORMAL2-)?IM-\d+)",
        "pneumonia",
    )


def sipakmed(data: Path, out: Path) -> Cells:
    del out
    folder = data / "sipakmed" / "jpeg128"
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    return Cells(folder, names, r"/(\d+)_", "cervical-resnet50v2-attention")


def sipakmed_full(data: Path, out: Path) -> Cells:
    folder = unpacked(data / "sipakmed_full128.zip", out) / "sipakmed"
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    # The images of each class are numbered by themselves.
    return Cells(folder, names, r"^([^/]+/\d+)_", "cervical", many=True)


def sipakmed_full_random(data: Path, out: Path) -> Cells:
    return replace(sipakmed_full(data, out), patients="")


def malaria_colour(data: Path, out: Path) -> Cells:
    return Cells(
        unpacked(data / "malaria_rgb80.zip", out) / "cell_images",
        ("Uninfected", "Parasitized"),
        "/(.*?)_?[Tt]hin",
        "malaria",
        many=True,
    )


SETS = {
    "malaria": malaria,
    "malaria-random": malaria_random,
    "xray": xray,
    "sipakmed": sipakmed,
    "sipakmed-full": sipakmed_full,
    "sipakmed-full-random": sipakmed_full_random,
    "malaria-colour": malaria_colour,
}


@dataclass(frozen=True)
class Image:
    """Its name in the folder, class, patient, and split where the folders say one."""

    name: str
    label: str
    patient: str
    split: str


def list_images(cells: Cells, limit: int | None) -> list[Image]:
    """List the images, or the first so many of each class (and split)."""
    found: list[Image] = []
    counts: dict[tuple[str, str], int] = {}
    for file in find_images(str(cells.folder), cells.classes):
        kind = (file.class_name, file.split)
        counts[kind] = counts.get(kind, 0) + 1
        if limit is not None and counts[kind] > limit:
            continue
        name = "/".join(file.image.split("/")[-2:])
        match = re.search(cells.patients, name) if cells.patients else None
        patient = match[1] if match else file.patient
        found.append(Image(file.image, file.class_name, patient, file.split))
    return found


def folds_of(images: Sequence[Image], count: int, seed: int = 0) -> dict[str, int]:
    """Deal patients out to folds of like size and like shares of the classes."""
    folds = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    labels = [image.label for image in images]
    patients = [image.patient for image in images]
    found = {}
    for fold, (_, test) in enumerate(folds.split(labels, labels, patients)):
        found |= {images[k].name: fold for k in test}
    return found


def splits_of(
    name: str, images: Sequence[Image], folds: int, many: bool
) -> list[dict[str, str]]:
    """Return the split (train, val, test) of each image, in each fold."""
    if name == "malaria-random":  # as published: 70 to 30 by image, patients mixed
        ten = StratifiedKFold(10, shuffle=True, random_state=0)
        labels = [image.label for image in images]
        part = {}
        for k, (_, some) in enumerate(ten.split(labels, labels)):
            part |= {images[i].name: k for i in some}
        role = dict.fromkeys((0, 1, 2), "test") | {3: "val"}
        return [{name: role.get(k, "train") for name, k in part.items()}]
    if name == "xray":  # the official test images; a tenth of the rest chooses
        tests = {image.name: "test" for image in images if image.split == "test"}
        rest = [image for image in images if image.name not in tests]
        patients = {image.patient for image in images if image.name in tests}
        # Patients who are in the official test set too would leak.
        rest = [image for image in rest if image.patient not in patients]
        tenths = folds_of(rest, 10)
        chosen = {name: "train" if k else "val" for name, k in tenths.items()}
        return [tests | chosen]
    fold = folds_of(images, folds)
    if many:
        found = []
        for k in range(folds):
            rest = [image for image in images if fold[image.name] != k]
            eighths = folds_of(rest, 8, seed=1)
            chosen = {
                name: "train" if part else "val" for name, part in eighths.items()
            }
            tests = {image.name: "test" for image in images if fold[image.name] == k}
            found.append(tests | chosen)
        return found
    return [
        {
            name: {k: "test", (k + 1) % folds: "val"}.get(part, "train")
            for name, part in fold.items()
        }
        for k in range(folds)
    ]


def one_fold(
    cells: Cells,
    images: Sequence[Image],
    split: dict[str, str],
    recipe: str,
    overrides: Sequence[str],
    out: Path,
    record: Path | None = None,
    tta: Tta = "none",
) -> dict:
    """Train and choose without the test images, and classify them.

    `record` is a file of the fold's result from an earlier sitting, or where to put it.
    """
    settings = read_recipe(recipe, overrides)
    parts = [to_dict(settings), sorted(split.items())]
    made_of = digest_of(parts if tta == "none" else [*parts, tta])
    places = [out / "result.json", *([record] if record else [])]
    if (before := read_record(places, made_of)) is not None:
        return before
    out.mkdir(parents=True, exist_ok=True)
    for name, column in (("splits", "split"), ("groups", "group")):
        with (out / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["slide", column])
            patient = {image.name: image.patient for image in images}
            chosen = split if name == "splits" else patient
            writer.writerows(sorted(chosen.items()))
    data, model = str(out / "data"), str(out / "model")
    ingest_images(
        str(cells.folder),
        out=data,
        side=settings.window.size,
        classes=cells.classes,
        groups=str(out / "groups.csv"),
        splits=str(out / "splits.csv"),
    )
    start = time.perf_counter()
    train(recipe, data=data, out=model, overrides=overrides)
    wall = time.perf_counter() - start
    found = evaluate_images(model, data=data, out=str(out / "report"), tta=tta)
    network, _ = load_model(model)
    with (out / "report" / "images.csv").open(newline="") as file:
        rows = [
            {
                "image": row["image"],
                "patient": row["patient"],
                "truth": cells.classes.index(row["truth"]),
                "predicted": cells.classes.index(row["predicted"]),
                "probabilities": [float(row[f"p_{name}"]) for name in cells.classes],
            }
            for row in csv.DictReader(file)
        ]
    values = {
        "made_of": made_of,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "rows": rows,
        "f1": found.f1,
        "calibration": found.calibration,
        "at_threshold": found.at_threshold,
        "digest": model_digest(model),
        "seconds": sum(epoch["seconds"] for epoch in read_history(model)),
        "wall": wall,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    write_record(places, values)
    shutil.rmtree(data)  # of thousands of images, a fold each
    return values


def predicted(row: dict[str, Any]) -> Predicted:
    """Return the prediction of a row of a fold's record."""
    shares = np.array(row["probabilities"])
    return Predicted(
        name=row["image"],
        digest="",
        patient=row["patient"],
        truth=row["truth"],
        predicted=row["predicted"],
        probabilities=shares,
        log_probabilities=np.log(np.maximum(shares, 1e-12)),
    )


def without_doubted(rows: Sequence[Predicted]) -> dict[str, Any]:
    """Return how many labels `medray review --by-loss` doubts, and the rest's accuracy.

    That accuracy is no result: what is left out was wrong by the model's own word.
    """
    right = np.array([row.predicted == row.truth for row in rows])
    surest = np.array([row.probabilities.max() for row in rows])
    doubted = ~right & (surest >= SURE)
    left = float(right[~doubted].mean()) if not doubted.all() else None
    return {"doubted": int(doubted.sum()), "undoubted": left}


def folds(
    dataset: Literal[
        "malaria",
        "malaria-random",
        "malaria-colour",
        "xray",
        "sipakmed",
        "sipakmed-full",
        "sipakmed-full-random",
    ],
    out: Path,
    data: Path = ROOT.parent / "shared" / "data",
    recipe: str | None = None,
    title: str = "",
    folds: int = 5,
    only: int | None = None,
    earlier: Path | None = None,
    tta: Tta = "none",
    limit: int | None = None,
    overrides: tuple[str, ...] = (),
) -> Iterator[harness.Result]:
    """Train and test a classifier of images by folds over patients.

    Args:
        dataset: Which images.
        out: Folder of results.
        data: Folder with the archives of images.
        recipe: Another than the dataset's own, by name.
        title: Added to the result's name, of a training with overrides.
        folds: Number of folds.
        only: Run so many of them.
        earlier: Folder of the results of folds that were run earlier.
        tta: Test-time augmentation.
        limit: Images per class, to try it.
        overrides: Changed keys of the recipe, key=value.
    """
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("medray").setLevel(logging.INFO)
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    cluster.connect()
    cells = SETS[dataset](data, out)
    recipe = recipe or cells.recipe
    images = list_images(cells, limit)
    splits = splits_of(dataset, images, folds, cells.many)
    name = f"{dataset}-{recipe}" + (f"-{title}" if title else "")
    results = [
        one_fold(
            cells,
            images,
            split,
            recipe,
            overrides,
            out / name / f"fold{k}",
            earlier / name / f"fold{k}.json" if earlier else None,
            tta,
        )
        for k, split in enumerate(splits[:only])
    ]
    rows = [predicted(row) for result in results for row in result["rows"]]
    line = {"title": name, "recipe": recipe, "overrides": overrides}
    line |= score(rows, cells.classes)
    line |= without_doubted(rows)
    line |= {
        "folds": [result["f1"] for result in results],
        "of": len(splits),
        "calibrations": [result["calibration"] for result in results],
        "seconds_a_fold": float(np.median([r["seconds"] for r in results])),
        "parameters": results[0]["parameters"],
    }
    (out / f"{name}.json").write_text(json.dumps(line, indent=2))
    ray.shutdown()
    yield row_of(line, results, cells)
    if len(cells.classes) == 2 and all(result["at_threshold"] for result in results):
        moved = [
            replace(row, predicted=int(row.probabilities[1] >= threshold))
            for result in results
            for threshold in [result["at_threshold"]["threshold"]]
            for row in map(predicted, result["rows"])
        ]
        line |= score(moved, cells.classes)
        line["title"] += ", threshold chosen on validation"
        yield row_of(line, results, cells)


def row_of(line: dict, results: Sequence[dict], cells: Cells) -> dict[str, object]:
    """Return a row of docs/results.md, and what the table leaves out below it."""

    def cell(name: str) -> str:
        low, high = (line["intervals"] or {}).get(name) or (None, None)
        return f"{number(line[name])} [{number(low)}, {number(high)}]"

    shown = (
        *(("accuracy", "accuracy"), ("f1", "F1"), ("recall", "sensitivity")),
        *(("specificity", "specificity"), ("auc", "AUC")),
    )
    scaled = [result["calibration"].get("error_scaled") for result in results]
    return {
        "trained": line["title"],
        "images, groups": f"{line['images']}, {line['patients']}",
        **{f"{title} [95 %]": cell(name) for name, title in shown},
        "ECE": number(line["calibration_error"]),
        "ECE at the temperature": ", ".join(number(error) for error in scaled),
        "labels doubted": line["doubted"],
        "accuracy without them, which is too high": number(line["undoubted"]),
        "folds": f"{len(results)} of {line['of']}",
        "weights": ", ".join(result["digest"].split(":")[1][:8] for result in results),
        "s per training": round(line["seconds_a_fold"]),
        "confusion": {
            truth: {"truth": truth} | dict(zip(cells.classes, counts, strict=True))
            for truth, counts in zip(cells.classes, line["confusion"], strict=True)
        },
        "per_class": line["per_class"],
        "at_threshold": [result["at_threshold"] for result in results],
        "overrides": list(line["overrides"]),
        "digests": [result["digest"] for result in results],
    }


def table(out: Path) -> None:
    """Print the results that are there as Markdown.

    Args:
        out: Folder of results.
    """

    def cell(line: dict, name: str) -> str:
        interval = (line["intervals"] or {}).get(name)
        low, high = interval or (None, None)
        return f"{number(line[name])} [{number(low)}, {number(high)}]"

    names = ("accuracy", "f1", "recall", "specificity", "auc")
    print(
        "| training | images, patients | accuracy [95 %] | F1 | sensitivity | "
        "specificity | AUC | folds | s | M |"
    )
    print("| --- " * 10 + "|")
    for path in sorted(out.glob("*.json"), key=lambda p: p.stat().st_mtime):
        line = json.loads(path.read_text())
        scores = " | ".join(cell(line, name) for name in names)
        print(
            f"| {line['title']} | {line['images']}, {line['patients']} | {scores} "
            f"| {len(line['folds'])} of {line['of']} | {line['seconds_a_fold']:.0f} "
            f"| {line['parameters'] / 1e6:.2f} |"
        )


if __name__ == "__main__":
    harness.run(folds, table)
