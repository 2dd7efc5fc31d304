"""How well recipes do on images that neither training nor model selection has seen.

K-fold: each field is a test image once. The other folds train, but for half of the one
after it, which chooses the epoch, and of several ways to train (see CHOICES) the one
whose model is tested. Fields of one source stay together. Masks come from
`medray infer`; all test fields are pooled, intervals are 95 % bootstrap intervals over
fields.

Running it again goes on where it was killed. With --earlier the folds that are there,
of the same recipe and deal, are not run again, and those that are run are added: folds
of half an hour each need not be one sitting.

    python -m benchmarks.quality.segmentation nuclei --data DATA --out results
    python -m benchmarks.quality.segmentation regions --data DATA --out results
    python -m benchmarks.quality.segmentation lesions --kind gastric --out results
    python -m benchmarks.quality.segmentation lesions --kind nests --out results
    python -m benchmarks.quality.segmentation ablation --out results
    python -m benchmarks.quality.segmentation table --out results  # of what is there
"""

import csv
import json
import logging
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import ray

from benchmarks import harness
from benchmarks.harness import ROOT
from benchmarks.quality.folds import digest_of, number, read_record, write_record
from medray import open_mask
from medray.datasets.dataset import labels_uri
from medray.datasets.ingest_slides import ingest
from medray.datasets.synthetic import generate
from medray.datasets.synthetic_scene import Lesions
from medray.evaluation.metrics import (
    bootstrap,
    class_scores,
    confusion,
    small_objects,
    small_scores,
    summary,
)
from medray.execution import cluster
from medray.inference.infer_run import infer
from medray.inference.run import Options, mask_uri
from medray.models.config import Prediction, model_digest
from medray.models.folder import load_model
from medray.storage.yaml_config import to_dict
from medray.training.checkpoint import read_history
from medray.training.recipe import read_recipe
from medray.training.train_model import train

DATA = ROOT.parent / "shared" / "data"


@dataclass(frozen=True)
class Fields:
    """Images with their truth.

    Attributes:
        images: Files.
        annotations: Folder of annotations named like them.
        classes: By label value.
        source: Of each image, by its name; those of one source stay together.
    """

    images: Sequence[Path]
    annotations: Path
    classes: tuple[str, ...]
    source: dict[str, str] = field(default_factory=dict)


def folds_of(fields: Fields, count: int, seed: int = 0) -> dict[str, int]:
    """Deal sources out to folds, at random but so that none is much larger."""
    sources: dict[str, list[str]] = {}
    for image in fields.images:
        sources.setdefault(fields.source.get(image.stem, image.stem), []).append(
            image.stem
        )
    order = sorted(sources)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda source: -len(sources[source]))
    sizes, fold = [0] * count, {}
    for source in order:
        smallest = sizes.index(min(sizes))
        sizes[smallest] += len(sources[source])
        fold |= dict.fromkeys(sources[source], smallest)
    return fold


def roles_of(fields: Fields, fold: dict[str, int], test: int) -> dict[str, str]:
    """Return each image's split: half of the sources of the next fold are val."""
    source = {
        image.stem: fields.source.get(image.stem, image.stem) for image in fields.images
    }
    after = (test + 1) % (max(fold.values()) + 1)
    chosen = sorted({source[name] for name, k in fold.items() if k == after})[::2]
    return {
        name: "test" if k == test else "val" if source[name] in chosen else "train"
        for name, k in sorted(fold.items())
    }


def one_fold(
    fields: Fields,
    fold: dict[str, int],
    test: int,
    recipe: str,
    overrides: Sequence[str],
    choices: Mapping[str, Sequence[str]],
    ways: Mapping[str, Prediction],
    out: Path,
    record: Path | None = None,
) -> dict[str, object]:
    """Train without fold `test`, and count what the model finds in it.

    `choices` are further overrides by a name: each is trained, and the model of the
    best validation F1 is tested; also the ensemble of all, with flips. `ways` are
    those of inference, by a name; each is counted. `record` is a file of the fold's
    result from an earlier sitting, or where to put it.
    """
    role = roles_of(fields, fold, test)
    recipes = [
        to_dict(read_recipe(recipe, [*overrides, *more])) for more in choices.values()
    ]
    made_of = digest_of([*recipes, sorted(role.items())])
    out.mkdir(parents=True, exist_ok=True)
    places = [out / "result.json", *([record] if record else [])]
    if (before := read_record(places, made_of)) is not None:
        return before
    with (out / "splits.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide", "split"])
        writer.writerows(role.items())
    data = out / "data"
    ingest(
        [str(image) for image in fields.images],
        annotations=str(fields.annotations),
        classes=fields.classes,
        splits=str(out / "splits.csv"),
        mpp=0.5,  # of most it is not known; one value for all makes it not matter
        out=str(data),
    )
    start = time.perf_counter()
    scores: dict[str, float] = {}
    seconds = 0.0
    for name, more in choices.items():
        model = str(out / name)
        trained = train(
            recipe, data=str(data), out=model, overrides=[*overrides, *more]
        )
        scores[name] = trained.f1 or 0.0
        seconds += sum(epoch["seconds"] for epoch in read_history(model))
    wall = time.perf_counter() - start
    chosen = max(scores, key=lambda name: scores[name])
    tests = [image for image in fields.images if fold[image.stem] == test]
    network, _ = load_model(str(out / chosen))
    tested = {way: ([chosen], prediction) for way, prediction in ways.items()}
    if len(scores) > 1:
        tested[ENSEMBLE] = (list(scores), Prediction(tta="flips"))
    found = {}
    for way, (names, prediction) in tested.items():
        run = str(out / f"run{way}")
        options = Options(everywhere=True, mpp=0.5, prediction=prediction)
        slides = [str(image) for image in tests]
        models = [str(out / name) for name in names]
        infer(slides, model=models, out=run, options=options)
        found[way] = {
            image.stem: _count(
                labels_uri(str(data), image.stem),
                mask_uri(run, image.stem),
                len(fields.classes),
            )
            for image in tests
        }
    values = {
        "made_of": made_of,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "fields": found,
        "chosen": chosen,
        "validation": scores,
        "digest": model_digest(str(out / chosen)),
        "seconds": seconds,
        "wall": wall,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    write_record(places, values)
    return values


def _count(truth: str, found: str, classes: int) -> dict[str, list]:
    labels, mask = (np.asarray(open_mask(uri)) for uri in (truth, found))
    return {
        "counts": confusion(labels, mask, classes).tolist(),
        "small": small_objects(labels, mask).tolist(),
    }


def pooled(
    results: Sequence[dict], names: Sequence[str], way: str = ""
) -> dict[str, object]:
    """Pool the test fields of all folds."""
    rows = [row for result in results for row in result["fields"][way].values()]
    counts = np.array([row["counts"] for row in rows], np.int64)
    dice = [summary(c, names)["f1"] for c in counts]
    interval = bootstrap(counts, names)
    small = np.array([row["small"] for row in rows], np.int64).sum(axis=0)
    return {
        "fields": len(rows),
        **summary(counts.sum(axis=0), names),
        "f1_interval": interval["f1"] if interval else None,
        "iou_interval": interval["iou"] if interval else None,
        "mean_dice_of_fields": float(np.mean([d for d in dice if d is not None])),
        "per_class": class_scores(counts.sum(axis=0), names),
        **small_scores(small),
        "seconds_a_fold": float(np.median([r["seconds"] for r in results])),
        "parameters": results[0]["parameters"],
    }


def run(
    title: str,
    fields: Fields,
    recipe: str,
    overrides: Sequence[str],
    folds: int,
    out: Path,
    only: int | None = None,
    ways: Mapping[str, Prediction] | None = None,
    earlier: Path | None = None,
) -> Iterator[harness.Result]:
    out = out.absolute()
    overrides = [*LIGHTER.get(recipe, []), *overrides]
    choices = CHOICES.get(recipe, {"model": []})
    fold = folds_of(fields, folds)
    numbers = range(folds) if only is None else range(only)
    ways = {"": Prediction()} | dict(ways or {})
    results = [
        one_fold(
            fields,
            fold,
            k,
            recipe,
            overrides,
            choices,
            ways,
            out / title / f"fold{k}",
            earlier / title / f"fold{k}.json" if earlier else None,
        )
        for k in numbers
    ]
    for way in results[0]["fields"]:
        line = {"title": title + way, "recipe": recipe, "overrides": list(overrides)}
        line |= {"chosen": [result["chosen"] for result in results]}
        line |= pooled(results, fields.classes, way)
        (out / f"{title}{way}.json").write_text(json.dumps(line, indent=2))
        yield row_of(line, results, way)


def row_of(line: dict, results: Sequence[dict], way: str) -> dict[str, object]:
    """Return a row of docs/results.md, and what the table leaves out below it."""

    def cell(name: str) -> str:
        low, high = line[f"{name}_interval"] or (None, None)
        return f"{number(line[name])} [{number(low)}, {number(high)}]"

    counts = [
        np.sum([row["counts"] for row in result["fields"][way].values()], axis=0)
        for result in results
    ]
    of_folds = [summary(count, [""] * len(count))["f1"] for count in counts]
    # Folds of earlier sittings may be from before the digest was kept.
    digests = [result["digest"] for result in results if "digest" in result]
    return {
        "trained": line["title"],
        "fields": line["fields"],
        "F1 [95 %]": cell("f1"),
        "IoU [95 %]": cell("iou"),
        "precision": number(line["precision"]),
        "recall": number(line["recall"]),
        "mean Dice of fields": number(line["mean_dice_of_fields"]),
        "small: found": number(line["small_recall"], 2),
        "F1 by fold": ", ".join(number(f1) for f1 in of_folds),
        "weights": ", ".join(digest.split(":")[1][:8] for digest in digests),
        "s per training": round(line["seconds_a_fold"]),
        "overrides": line["overrides"],
        "digests": digests,
        "fields of folds": [result["fields"][way] for result in results],
    }


def nuclei_fields(data: Path) -> Fields:
    images = sorted((data / "nuclei_he" / "images").glob("*.png"))
    folder = data / "nuclei_he" / "instances"
    return Fields(images, folder, ("background", "nucleus"))


def region_fields(data: Path) -> dict[str, Fields]:
    found = {}
    for name in ("camelyon", "ebhi_seg", "glomeruli_pas"):
        folder = data / "he_seg" / name
        images = sorted(p for p in (folder / "images").iterdir() if p.is_file())
        classes = ("background", "glomerulus" if name == "glomeruli_pas" else "tumour")
        # Numbers in a row (10063 and 10064) may be of one slide.
        source = {} if name == "ebhi_seg" else {p.stem: p.stem[:-1] for p in images}
        found[name] = Fields(images, folder / "masks", classes, source)
    return found


def generated(out: Path, count: int, side: int, lesions: Lesions) -> Fields:
    folder = out.absolute() / f"{lesions}-lesions"
    generate(folder, slides=count, seed=77, height=side, width=side, lesions=lesions)
    images = sorted((folder / "slides").glob("*.tif*"))
    return Fields(images, folder / "annotations", ("background", "tumour"))


RECIPES = ("gastric-fcn8s", "unet", "highres-unet")

# Crops of 1024 px take two cores too long.
LIGHTER = {"highres-unet": ["data.crop=[256,512]"]}


ENSEMBLE = "-ensemble"

# Ways to train of which each fold's own validation fields choose.
CHOICES = {
    "nuclei": {"imagenet": ["scaling=imagenet"], "zscore": ["scaling=zscore"]},
}


# What each part of highres-unet is worth: the recipe without it.
ABLATION = {
    "whole": [],
    "smp's U-Net on this encoder": ["model.name=unet"],
    "no balance": ["data.balance=false"],
    "no hard pixels": ["loss.hardest=1.0"],
    "no growing crops": ["data.crop=256"],
    "no focal loss": ["loss.focal=0", "loss.cross_entropy=1"],
    "no elastic, no stain": ["augment.elastic=0", "augment.stain=0"],
}


def table(out: Path) -> None:
    """Print the results that are there as Markdown.

    Args:
        out: Folder of results.
    """
    print("| training | fields | F1 (Dice) [95 %] | IoU | small: found, IoU | s | M |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in sorted(out.glob("*.json"), key=lambda p: p.stat().st_mtime):
        line = json.loads(path.read_text())
        low, high = line["f1_interval"] or (None, None)
        print(
            f"| {line['title']} | {line['fields']} "
            f"| {number(line['f1'])} [{number(low)}, {number(high)}] "
            f"| {number(line['iou'])} "
            f"| {number(line['small_recall'], 2)}, {number(line['small_iou'], 2)} "
            f"| {line['seconds_a_fold']:.0f} | {line['parameters'] / 1e6:.2f} |"
        )


AT_INFERENCE = {
    "-flips": Prediction(tta="flips"),
    "-crf": Prediction(crf=5),
    "-flips-crf": Prediction(tta="flips", crf=5),
}


def nuclei(
    out: Path,
    data: Path = DATA,
    folds: int = 5,
    only: int | None = None,
    earlier: Path | None = None,
    overrides: tuple[str, ...] = (),
) -> Iterator[harness.Result]:
    """Segment the nuclei of H&E fields, by the recipe `nuclei`.

    Args:
        out: Folder of results.
        data: Folder with nuclei_he.
        folds: Number of folds.
        only: Run so many of them.
        earlier: Folder of the results of folds that were run earlier.
        overrides: Changed keys of the recipe, key=value.
    """
    with ready():
        yield from run(
            "nuclei",
            nuclei_fields(data),
            "nuclei",
            overrides,
            folds,
            out,
            only,
            {"-flips": Prediction(tta="flips")},
            earlier,
        )


def regions(
    out: Path,
    data: Path = DATA,
    folds: int = 5,
    only: int | None = None,
    overrides: tuple[str, ...] = (),
) -> Iterator[harness.Result]:
    """Segment tumours and glomeruli of three sets, by three recipes.

    Args:
        out: Folder of results.
        data: Folder with he_seg.
        folds: Number of folds.
        only: Run so many of them.
        overrides: Changed keys of the recipes, key=value.
    """
    with ready():
        for name, fields in region_fields(data).items():
            for recipe in RECIPES:
                title = f"{name}-{recipe}"
                yield from run(title, fields, recipe, overrides, folds, out, only)


def lesions(
    kind: Literal["gastric", "nests"],
    out: Path,
    slides: int = 10,
    folds: int = 5,
    only: int | None = None,
    overrides: tuple[str, ...] = (),
) -> Iterator[harness.Result]:
    """Segment generated lesions, by three recipes.

    Args:
        kind: Large lesions on slides of 2048 px, or small ones on slides of 1024 px.
        out: Folder of results.
        slides: Number of generated slides.
        folds: Number of folds.
        only: Run so many of them.
        overrides: Changed keys of the recipes, key=value.
    """
    with ready():
        if kind == "gastric":
            fields = generated(out, slides, 2048, "large")
        else:
            fields = generated(out, slides, 1024, "small")
        for recipe in RECIPES:
            title = f"{kind}-{recipe}"
            yield from run(title, fields, recipe, overrides, folds, out, only)


def ablation(
    out: Path,
    slides: int = 10,
    folds: int = 5,
    only: int | None = None,
    overrides: tuple[str, ...] = (),
) -> Iterator[harness.Result]:
    """Train the recipe `highres-unet` without each of its parts, on small lesions.

    Args:
        out: Folder of results.
        slides: Number of generated slides of 1024 px.
        folds: Number of folds.
        only: Run so many of them.
        overrides: Changed keys of the recipe, key=value.
    """
    with ready():
        fields = generated(out, slides, 1024, "small")
        for name, without in ABLATION.items():
            title = "ablation-" + re.sub(r"\W+", "-", name)
            changed = [*overrides, *without]
            ways = AT_INFERENCE if name == "whole" else None
            yield from run(
                title, fields, "highres-unet", changed, folds, out, only, ways
            )


@contextmanager
def ready() -> Iterator[None]:
    """Log how trainings go, on a local Ray of this machine."""
    logging.basicConfig(format="%(asctime)s %(message)s")
    logging.getLogger("medray").setLevel(logging.INFO)
    cluster.connect()
    yield
    ray.shutdown()


if __name__ == "__main__":
    harness.run(nuclei, regions, lesions, ablation, table)
