"""How well classifiers do on cells and X-rays that they have never seen.

K-fold over patients: each image is a test image once. The other folds train, but for
one that chooses the epoch and the temperature. `medray evaluate` refuses a model that
has seen a test image. All test images are pooled; intervals are 95 % bootstrap
intervals over patients.

Running it again goes on where it was killed: a finished fold has its result.json. With
--records the folds that are there, of the same recipe and deal, are not run again, and
those that are run are added.

    python benchmarks/results_images.py malaria --out results [--recipe cells-small]
    python benchmarks/results_images.py malaria-random --out results
    python benchmarks/results_images.py xray --out results [key=value ...]
    python benchmarks/results_images.py sipakmed --out results weights=FILE
    python benchmarks/results_images.py table --out results

X-rays and SIPaKMeD from random weights: weights=null schedule.phases=[].
"""

import argparse
import csv
import json
import logging
import re
import shutil
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch
from results import ROOT, digest_of, number, read_record, write_record
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from medray.datasets.image_folder import find_images, ingest_images
from medray.evaluation.evaluate_images import evaluate_images
from medray.evaluation.image_metrics import score
from medray.execution import cluster
from medray.models.config import Tta
from medray.models.folder import load_model
from medray.storage.yaml_config import to_dict
from medray.training.recipe import read_recipe
from medray.training.train import read_history, train


@dataclass(frozen=True)
class Cells:
    """Images in class folders.

    Attributes:
        folder: Of class folders, or of train and test with class folders.
        classes: By label value; of two the second is looked for.
        patients: Finds the patient in an image's name; "": each image is one.
        recipe: That is taken if no other is asked for.
    """

    folder: Path
    classes: tuple[str, ...]
    patients: str
    recipe: str


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
        "^(.*?)_?[Tt]hin",
        "malaria-resnet50v2",
    )


def malaria_random(data: Path, out: Path) -> Cells:
    cells = malaria(data, out)
    return Cells(cells.folder, cells.classes, "", cells.recipe)


def xray(data: Path, out: Path) -> Cells:
    return Cells(
        unpacked(data / "chest_xray.zip", out) / "chest_xray",
        ("NORMAL", "PNEUMONIA"),
        r"^(person\d+|(?:NORMAL2-)?IM-\d+)",
        "pneumonia-transfer",
    )


def sipakmed(data: Path, out: Path) -> Cells:
    del out
    folder = data / "sipakmed" / "jpeg128"
    names = tuple(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    return Cells(folder, names, r"^(\d+)_", "cervical-resnet50v2-attention")


SETS = {
    "malaria": malaria,
    "malaria-random": malaria_random,
    "xray": xray,
    "sipakmed": sipakmed,
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
    for row in find_images(str(cells.folder), cells.classes):
        kind = (row["class"], row["split"])
        counts[kind] = counts.get(kind, 0) + 1
        if limit is not None and counts[kind] > limit:
            continue
        name = row["image"].rpartition("/")[2]
        match = re.search(cells.patients, name) if cells.patients else None
        patient = match[1] if match else row["image"]
        found.append(Image(row["image"], row["class"], patient, row["split"]))
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


def splits_of(name: str, images: Sequence[Image], folds: int) -> list[dict[str, str]]:
    """Give what is train, val and test in each fold, by image."""
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
    path = str(ROOT / "recipes" / f"{recipe}.yaml")
    settings = read_recipe(path, overrides)
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
    train(path, data=data, out=model, overrides=overrides)
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
        "seconds": sum(epoch["seconds"] for epoch in read_history(model)),
        "wall": wall,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    write_record(places, values)
    shutil.rmtree(data)  # of thousands of images, a fold each
    return values


def run(name: str, args: argparse.Namespace, out: Path) -> None:
    cells = SETS[name](args.data, out)
    recipe = args.recipe or cells.recipe
    images = list_images(cells, args.limit)
    splits = splits_of(name, images, args.folds)
    title = f"{name}-{recipe}" + (f"-{args.title}" if args.title else "")
    results = [
        one_fold(
            cells,
            images,
            split,
            recipe,
            args.overrides,
            out / title / f"fold{k}",
            args.records / title / f"fold{k}.json" if args.records else None,
            args.tta,
        )
        for k, split in enumerate(splits[: args.only])
    ]
    rows = [row for result in results for row in result["rows"]]
    line = {"title": title, "recipe": recipe, "overrides": args.overrides}
    line |= score(rows, cells.classes)
    line |= {
        "folds": [result["f1"] for result in results],
        "of": len(splits),
        "calibrations": [result["calibration"] for result in results],
        "seconds_a_fold": float(np.median([r["seconds"] for r in results])),
        "parameters": results[0]["parameters"],
    }
    (out / f"{title}.json").write_text(json.dumps(line, indent=2))
    print(json.dumps(line), flush=True)


def table(out: Path) -> None:
    """Print what is there as Markdown."""

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=[*SETS, "table"])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", help="another than the set's own")
    parser.add_argument("--title", default="", help="of a training with overrides")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--only", type=int, help="so many of the folds")
    parser.add_argument(
        "--records", type=Path, metavar="DIR", help="results of earlier sittings"
    )
    parser.add_argument("--tta", choices=["none", "flips", "all"], default="none")
    parser.add_argument("--limit", type=int, help="so many images a class, to try it")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_intermixed_args()
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("medray").setLevel(logging.INFO)
    out = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if args.what == "table":
        table(out)
        return
    cluster.connect()
    run(args.what, args, out)
    ray.shutdown()
    print(torch.__version__)


if __name__ == "__main__":
    main()
