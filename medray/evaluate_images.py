"""A classifier and images that it has not seen -> scores and a report.

The way of an image, top to bottom:

    check     no image of the split was there when the model was trained or chosen
    infer     its sheet goes the way of any slide; classes and probabilities come out
    score     confusion counts, curves, calibration; intervals over patients
    report    metrics.json, images.csv, report.html
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
from markupsafe import Markup
from matplotlib.figure import Figure
from sklearn.metrics import (
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from medray.dataset import (
    holds_images,
    read_dataset,
    read_morphology,
    read_patches,
    slide_uri,
)
from medray.errors import ConfigError, MedrayError
from medray.infer import infer
from medray.metrics import bootstrap, class_scores, confusion, of_images, summary
from medray.models.config import Morphology, Prediction, model_digest, read_config
from medray.models.folder import read_seen
from medray.pages import ACCENT, SOFT, as_png, as_svg, data_uri, finish_axes, render
from medray.run import Options, mask_uri, probabilities_uri
from medray.store import files, omezarr

Row = dict[str, Any]
Floats = npt.NDArray[np.float64]

_BINS = 10  # of the reliability picture
_SHOWN = 12  # errors, the most confident ones


@dataclass(frozen=True)
class ImageEvaluation:
    """What an evaluation of images found.

    Attributes:
        out: Folder of the report.
        report: The page to open.
        f1: Of the second of two classes, or the mean of all.
        interval: Its 95 % bootstrap interval over patients; None of one patient.
        images: That were counted.
        failed: Reason of each sheet that could not be, by its name.
    """

    out: str
    report: str
    f1: float | None
    interval: list[float] | None
    images: int
    failed: dict[str, str]


def evaluate_images(
    model: str, *, data: str, out: str, split: str = "test"
) -> ImageEvaluation:
    """Classify the images of a split of a dataset, and write a report.

    Args:
        model: Folder of a classifier, as `medray train` writes it.
        data: Dataset of images, as `medray ingest --side` writes it.
        out: Folder of the report; made if needed. OUT/run holds the masks.
        split: Which images.

    Raises:
        ConfigError: The request is wrong, or the model was trained or chosen with
            images of the split.
        MedrayError: None of them could be classified.
    """
    model, data, out = (files.absolute(place) for place in (model, data, out))
    config = read_config(model)
    if not holds_images(data):
        raise ConfigError(
            f"{data}: holds slides; give `medray evaluate` a run of them instead of "
            f"the model folder {model}"
        )
    if config.architecture.name != "classifier":
        raise ConfigError(f"{model}: expected a classifier, found a segmenter")
    classes = read_dataset(data).classes
    if classes != config.classes:
        raise ConfigError(
            f"{data}: its classes {list(classes.names)} are not the model's "
            f"{list(config.classes.names)}"
        )
    rows = read_patches(data, split)
    if not rows:
        raise ConfigError(f"{data}: no images in split {split}")
    _check_unseen(model, rows, split)
    if config.morphology is None:
        sheets = sorted({row["slide"] for row in rows})
        done = infer(
            [slide_uri(data, sheet) for sheet in sheets],
            model=model,
            out=files.join(out, "run"),
            options=Options(everywhere=True, prediction=Prediction(probabilities=True)),
        )
        rows, failed = _predicted(rows, files.join(out, "run")), done.failed
    else:
        rows, failed = _predicted_with_measures(rows, model, config.morphology, data)
    if not rows:
        raise MedrayError(
            f"{out}: no image of split {split} could be classified: "
            f"{next(iter(failed.values()), 'nothing is said why')}"
        )
    metrics = score(rows, classes.names)
    metrics |= {"split": split, "model_digest": model_digest(model)}
    _write_table(rows, classes.names, files.join(out, "images.csv"))
    page = render(
        "images.html.jinja",
        title=f"{len(rows)} images of split {split}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=classes,
        metrics=metrics,
        figures=_figures(rows, classes.names),
        errors=_errors(rows, data, classes.names),
        provenance={
            "model": model.rsplit("/", 1)[-1],
            "model digest": metrics["model_digest"],
            "data": data.rsplit("/", 1)[-1],
            "encoder": config.architecture.encoder,
            "input": f"{config.window.size} px",
        },
    )
    report = files.join(out, "report.html")
    files.write_bytes(report, page.encode())
    # Last: a folder with metrics.json is a whole report.
    files.write_json(files.join(out, "metrics.json"), metrics)
    interval = metrics["intervals"]["f1"] if metrics["intervals"] else None
    f1 = metrics["f1"]
    return ImageEvaluation(out, report, f1, interval, len(rows), failed)


def _check_unseen(model: str, rows: list[Row], split: str) -> None:
    """Refuse images whose bytes trained the model or chose its epoch."""
    seen = read_seen(model)
    known = [row["image"] for row in rows if row["digest"] in seen]
    if known:
        raise ConfigError(
            f"{model}: was trained or chosen with {len(known)} of the {len(rows)} "
            f"images of split {split}, such as {known[0]}; scores on them would say "
            f"nothing. Take another split, or train on another dataset"
        )


def _predicted(rows: list[Row], run: str) -> list[Row]:
    """Add `truth` and `predicted` (label values) and `probabilities` (C,).

    Images of sheets that the run has not done are left out.
    """
    by_sheet: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_sheet[row["slide"]].append(row)
    slides = files.read_table(files.join(run, "slides.parquet")).to_pylist()
    found = []
    for sheet in sorted(row["slide"] for row in slides if row["status"] == "done"):
        mask = omezarr.open_level(mask_uri(run, sheet))[...]
        layers = omezarr.open_level(probabilities_uri(run, sheet))[...]
        for row in by_sheet[sheet]:
            # A window is an image: all its pixels have one answer.
            y, x = row["y"], row["x"]
            shares = layers[:, y, x].astype(np.float64)
            found.append(
                row
                | {"truth": int(np.argmax(row["class_px"]))}
                | {"predicted": int(mask[y, x]), "probabilities": shares / 255}
            )
    return found


def _predicted_with_measures(
    rows: list[Row], model: str, how: Morphology, data: str
) -> tuple[list[Row], dict[str, str]]:
    """Add what `_predicted` adds; give why sheets could not be read, too.

    The windows of a run are pixels only, so these images are classified here.
    """
    from medray.models.classify import load_classifier

    names, measures = read_morphology(data, rows)
    if names != how.names:
        raise ConfigError(
            f"{data}: measures {list(names)}, the model was trained with "
            f"{list(how.names)}; ingest the images with contours and --mpp as those "
            f"that it was trained with"
        )
    classify = load_classifier(model)
    found: list[Row] = []
    failed: dict[str, str] = {}
    for row, values in zip(rows, measures, strict=True):
        try:
            pixels = _pixels(row, data)
        except MedrayError as error:
            failed[row["slide"]] = f"{error}"
            continue
        (shares,) = classify(pixels[None], values[None])
        found.append(
            row
            | {"truth": int(np.argmax(row["class_px"]))}
            | {"predicted": int(np.argmax(shares)), "probabilities": shares}
        )
    return found, failed


def _pixels(row: Row, data: str) -> npt.NDArray[np.uint8]:
    """Read an image (H, W, 3) from its sheet."""
    sheet = omezarr.open_level(slide_uri(data, row["slide"]))
    y, x, h, w = (row[name] for name in ("y", "x", "height", "width"))
    pixels: npt.NDArray[np.uint8] = np.moveaxis(sheet[:, y : y + h, x : x + w], 0, 2)
    return pixels


# --- score ----------------------------------------------------------------------------


def score(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Any]:
    """Score predictions of whole images.

    Args:
        rows: With `truth`, `predicted`, `probabilities` (C,) and `patient`.
        names: Of the C classes.

    Returns:
        f1 (of the second of two classes, else the mean of all), precision, recall,
        specificity, accuracy; `intervals` of them over patients; `per_class` with
        `auc` (area under the ROC curve) and `average_precision`; `confusion`;
        `calibration_error` (expected, Guo et al. 2017, 10 bins); `images`, `patients`.
    """
    truth = np.array([row["truth"] for row in rows])
    predicted = np.array([row["predicted"] for row in rows])
    counts = confusion(truth, predicted, len(names))
    patients = sorted({row["patient"] for row in rows})
    place = {patient: i for i, patient in enumerate(patients)}
    each = np.zeros((len(patients), len(names), len(names)), np.int64)
    who = np.array([place[row["patient"]] for row in rows])
    np.add.at(each, (who, truth, predicted), 1)
    per_class = class_scores(counts, names)
    for label, entry in enumerate(per_class):
        shares = np.array([row["probabilities"][label] for row in rows])
        some = 0 < (truth == label).sum() < len(truth)
        entry["auc"] = float(roc_auc_score(truth == label, shares)) if some else None
        entry["average_precision"] = (
            float(average_precision_score(truth == label, shares)) if some else None
        )
        entry["support"] = entry.pop("support_px")
    return {
        **summary(*of_images(counts, names)),
        "intervals": bootstrap(*of_images(each, names)),
        "per_class": per_class,
        "confusion": counts.tolist(),
        "calibration_error": calibration_error(rows),
        "images": len(rows),
        "patients": len(patients),
    }


def _bins(rows: Sequence[Row]) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Give mean confidence, accuracy and count of bins of equal width."""
    sure = np.array([row["probabilities"][row["predicted"]] for row in rows])
    right = np.array([row["truth"] == row["predicted"] for row in rows], np.float64)
    place = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    count = np.bincount(place, minlength=_BINS)
    used = np.maximum(count, 1).astype(np.float64)
    confidence: Floats = np.bincount(place, sure, _BINS) / used
    accuracy: Floats = np.bincount(place, right, _BINS) / used
    return confidence, accuracy, count


def calibration_error(rows: Sequence[Row]) -> float:
    """Give the expected calibration error (Guo et al. 2017), 10 bins of equal width."""
    confidence, accuracy, count = _bins(rows)
    error = (np.abs(confidence - accuracy) * count).sum()
    return float(error / max(1, int(count.sum())))


# --- report ---------------------------------------------------------------------------


def _write_table(rows: list[Row], names: Sequence[str], uri: str) -> None:
    table = [
        {
            "image": row["image"],
            "patient": row["patient"],
            "truth": names[row["truth"]],
            "predicted": names[row["predicted"]],
        }
        | {
            f"p_{name}": round(float(share), 4)
            for name, share in zip(names, row["probabilities"], strict=True)
        }
        for row in rows
    ]
    csv = io.BytesIO()
    pyarrow.csv.write_csv(pa.Table.from_pylist(table), csv)
    files.write_bytes(uri, csv.getvalue())


def _figures(rows: list[Row], names: Sequence[str]) -> dict[str, Markup]:
    truth = np.array([row["truth"] for row in rows])
    shown = [1] if len(names) == 2 else range(len(names))
    roc, pr = Figure(figsize=(4, 3.6)), Figure(figsize=(4, 3.6))
    for label in shown:
        shares = np.array([row["probabilities"][label] for row in rows])
        is_label = truth == label
        if not 0 < is_label.sum() < len(truth):
            continue
        fpr, tpr, _ = roc_curve(is_label, shares)
        precision, recall, _ = precision_recall_curve(is_label, shares)
        color = ACCENT if len(names) == 2 else None
        roc.gca().plot(fpr, tpr, label=names[label], color=color)
        pr.gca().plot(recall, precision, label=names[label], color=color)
    roc.gca().plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=":")
    reliability = Figure(figsize=(4, 3.6))
    confidence, accuracy, count = _bins(rows)
    axes = reliability.gca()
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=0.8, linestyle=":")
    axes.plot(confidence[count > 0], accuracy[count > 0], "o-", color=ACCENT)
    figures = {
        "ROC": (roc, "false positive rate", "recall (sensitivity)"),
        "Precision and recall": (pr, "recall", "precision"),
        "Reliability": (reliability, "confidence", "share that is right"),
    }
    return {
        name: _finished(figure, x, y, legend=name != "Reliability")
        for name, (figure, x, y) in figures.items()
    }


def _finished(figure: Figure, x: str, y: str, *, legend: bool) -> Markup:
    axes = figure.gca()
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    finish_axes(axes, x, y)
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    return as_svg(figure)


def _errors(rows: list[Row], data: str, names: Sequence[str]) -> list[Row]:
    """Give the most confident errors, with their pictures."""
    wrong = [row for row in rows if row["truth"] != row["predicted"]]
    wrong.sort(key=lambda row: -row["probabilities"][row["predicted"]])
    shown = []
    for row in wrong[:_SHOWN]:
        shown.append(
            {
                "image": row["image"],
                "picture": data_uri(as_png(_pixels(row, data))),
                "truth": names[row["truth"]],
                "predicted": names[row["predicted"]],
                "confidence": float(row["probabilities"][row["predicted"]]),
            }
        )
    return shown
