"""A classifier and images that it has not seen -> scores and a report.

The way of an image, top to bottom:

    check     no image of the split was there when the model was trained or chosen
    classify  logits of each model; several become one prediction
    calibrate a temperature, fitted on validation images
    score     confusion counts, curves, calibration; intervals over patients
    report    metrics.json, images.csv, report.html
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt

from medray.datasets import (
    holds_images,
    read_dataset,
    read_morphology,
    read_patches,
    slide_uri,
)
from medray.errors import ConfigError, MedrayError
from medray.evaluation.figures import draw_image_curves
from medray.evaluation.html import check_folder, render
from medray.evaluation.image_errors import confident_errors
from medray.evaluation.image_metrics import at_threshold, calibrate, combine, score
from medray.evaluation.metrics import f1_line
from medray.evaluation.significance import (
    beside,
    read_image_predictions,
    write_image_predictions,
)
from medray.execution import settle_executor
from medray.inference import DatasetImage, classify, image_of_row
from medray.models import (
    ModelConfig,
    Tta,
    check_runtime,
    model_digest,
    read_config,
    read_seen,
)
from medray.storage import files
from medray.types import Executor, Row

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ImageEvaluation:
    """What an evaluation of images found.

    Attributes:
        out: Folder of the report.
        report: The page to open.
        f1: Of the second of two classes, or the mean of all.
        interval: Its 95 % bootstrap interval over patients; None of one patient.
        images: That were counted.
        calibration: `error` as it is; where a `temperature` could be fitted, it, the
            `images` that it was fitted on and `error_scaled` with it; else `why` not.
        at_threshold: Of two classes the scores with the `threshold` that validation
            images choose, see medray.evaluation.image_metrics; None: too few of them.
        beside: The comparison with another report, see
            medray.evaluation.significance; None: unasked.
        failed: Reason of each sheet that could not be, by its name.
    """

    out: str
    report: str
    f1: float | None
    interval: list[float] | None
    images: int
    calibration: Row
    at_threshold: Row | None
    beside: Row | None
    failed: dict[str, str]

    def __str__(self) -> str:
        found, beside = self.calibration, self.beside
        scaled = (
            f"{found['error_scaled']:.4f} at temperature {found['temperature']:.2f}"
            if "temperature" in found
            else f"no temperature: {found['why']}"
        )
        lines = [
            f1_line(self.f1, self.interval),
            f"calibration error  {found['error']:.4f}; {scaled}",
        ]
        if (at := self.at_threshold) is not None:
            lines.append(
                f"threshold          {at['threshold']:.3f}, chosen on {at['images']} "
                f"validation images: accuracy {at['accuracy']:.4f}, sensitivity "
                f"{at['recall']:.4f}, specificity {at['specificity']:.4f}"
            )
        if beside:
            lines.append(
                f"beside {beside['report']}  accuracy {beside['accuracy']:.4f} and "
                f"{beside['other_accuracy']:.4f} of {beside['images']} images; only "
                f"this right {beside['only_this']}, only that {beside['only_other']}; "
                f"McNemar p = {beside['p_value']:.3g}"
            )
        lines += [f"report  {self.report}", f"out     {self.out}"]
        counts = f"{self.images} images evaluated, {len(self.failed)} sheets failed"
        return "\n".join([*lines, counts])


def evaluate_images(
    model: str | Sequence[str],
    *,
    data: str,
    out: str,
    split: str = "test",
    vote: bool = False,
    tta: Tta = "none",
    compare: str | None = None,
    executor: Executor = "auto",
) -> ImageEvaluation:
    """Classify the images of a split of a dataset, and write a report.

    Args:
        model: Folder of a classifier, as `medray train` writes it, or several: an
            ensemble, whose probabilities are the mean of theirs.
        data: Dataset of images, as `medray ingest --side` writes it.
        out: Folder of the report; made if needed.
        split: Which images.
        vote: Of several classifiers take the commonest class, not the mean. Of equally
            many votes the class of higher mean probability.
        tta: Predict mirrored (flips), turned (all) images too. Takes the mean.
        compare: Report of another classifier on the same images, to compare with.
        executor: On the Ray of RAY_ADDRESS, in processes here, or in this one (local).
            `auto`: Ray, but processes where no cluster is named and the files are few.

    Raises:
        ConfigError: The request is wrong, or a model was trained or chosen with
            images of the split.
        MedrayError: None of them could be classified.
    """
    models = [model] if isinstance(model, str) else list(model)
    models = [files.absolute(folder) for folder in models]
    data, out = files.absolute(data), files.absolute(out)
    check_folder(out, "images.csv")
    configs = _common_configs(models, data, vote=vote)
    config, classes = configs[0], configs[0].classes
    others = read_image_predictions(compare, classes.names) if compare else None
    rows = read_patches(data, split)
    if not rows:
        raise ConfigError(f"{data}: no images in split {split}")
    for folder in models:
        _check_unseen(folder, rows, split)
    validation = _for_temperature(models, data, rows)
    wanted = _images([*rows, *validation], configs, data)
    sheets = {slide_uri(data, image.sheet) for image in wanted}
    executor = settle_executor(executor, sheets)
    classified, failed = classify(models, data, wanted, tta, executor)
    pairs = [(one.image.split, combine(one, vote=vote)) for one in classified]
    found = [row for of, row in pairs if of == split]
    if not found:
        raise MedrayError(
            f"{out}: no image of split {split} could be classified: "
            f"{next(iter(failed.values()), 'nothing is said why')}"
        )
    metrics = score(found, classes.names)
    choosing = [row for of, row in pairs if of != split]
    calibration = calibrate(found, choosing)
    threshold = at_threshold(found, choosing, classes.names)
    digests = ", ".join(model_digest(folder) for folder in models)
    metrics |= {"split": split, "model_digest": digests}
    metrics |= {"vote": vote, "tta": tta, "calibration": calibration, "beside": None}
    metrics["at_threshold"] = threshold
    if others is not None and compare:
        metrics["beside"] = beside(found, others, classes.names, compare)
    write_image_predictions(found, classes.names, files.join(out, "images.csv"))
    names = ", ".join(folder.rsplit("/", 1)[-1] for folder in models)
    how = "majority vote" if vote else "mean probability"
    page = render(
        "images.html.jinja",
        title=f"{len(found)} images of split {split}",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=classes,
        metrics=metrics,
        figures=draw_image_curves(found, classes.names, calibration.get("temperature")),
        errors=confident_errors(
            found,
            wanted,
            data,
            classes.names,
            models[0] if len(models) == 1 else None,
        ),
        provenance={
            "model": names,
            "model digest": digests,
            "data": data.rsplit("/", 1)[-1],
            "encoder": config.architecture.encoder,
            "input": f"{config.window.size} px",
        }
        | ({"ensemble": f"{len(models)} models, {how}"} if len(models) > 1 else {})
        | ({"test-time augmentation": tta} if tta != "none" else {}),
    )
    report = files.join(out, "report.html")
    files.write_bytes(report, page.encode())
    # Last: a folder with metrics.json is a whole report.
    files.write_json(files.join(out, "metrics.json"), metrics)
    interval = metrics["intervals"]["f1"] if metrics["intervals"] else None
    return ImageEvaluation(
        out,
        report,
        metrics["f1"],
        interval,
        len(found),
        calibration,
        threshold,
        metrics["beside"],
        failed,
    )


# --- check ----------------------------------------------------------------------------


def _common_configs(
    models: Sequence[str], data: str, *, vote: bool
) -> list[ModelConfig]:
    """Check that models fit the dataset and each other; return their configurations."""
    configs = [read_config(folder) for folder in models]
    settings = read_dataset(data)
    if not holds_images(data):
        raise ConfigError(
            f"{data}: holds slides; give `medray evaluate` a run of them instead of "
            f"the model folder {models[0]}"
        )
    if vote and len(models) < 2:
        raise ConfigError("vote: expected several models, found one")
    if len(set(models)) < len(models):
        raise ConfigError(f"expected different models, found one twice in {models}")
    for folder, config in zip(models, configs, strict=True):
        check_runtime(folder)
        if not config.classifies:
            raise ConfigError(f"{folder}: expected a classifier, found a segmenter")
        if config.classes != settings.classes:
            raise ConfigError(
                f"{data}: its classes {list(settings.classes.names)} are not the "
                f"model's {list(config.classes.names)} ({folder})"
            )
        if config.window.size != settings.patch:
            raise ConfigError(
                f"{folder}: takes images of {config.window.size} px, those of {data} "
                f"have {settings.patch}; ingest them with --side {config.window.size}"
            )
    return configs


def _check_unseen(model: str, rows: list[Row], split: str) -> None:
    """Raise an error for images whose bytes trained the model or chose its epoch."""
    seen = read_seen(model)
    known = [row["image"] for row in rows if row["digest"] in seen]
    if known:
        raise ConfigError(
            f"{model}: was trained or chosen with {len(known)} of the {len(rows)} "
            f"images of split {split}, such as {known[0]}; scores on them would say "
            f"nothing. Take another split, or train on another dataset"
        )


def _for_temperature(models: Sequence[str], data: str, rows: list[Row]) -> list[Row]:
    """Return validation images that no model was trained on and that are not scored.

    That they chose an epoch does little harm to one number.
    """
    taken = {row["digest"] for row in rows}
    for folder in models:
        seen = read_seen(folder)
        taken |= {digest for digest, how in seen.items() if how == "train"}
    return [row for row in read_patches(data, "val") if row["digest"] not in taken]


def _images(
    rows: list[Row], configs: Sequence[ModelConfig], data: str
) -> list[DatasetImage]:
    """Return the images of rows, with measures where a model takes them."""
    asked = [config.morphology for config in configs if config.morphology]
    if not asked:
        return [image_of_row(row) for row in rows]
    names, measures = read_morphology(data, rows)
    for morphology in asked:
        if names != morphology.names:
            raise ConfigError(
                f"{data}: measures {list(names)}, the model was trained with "
                f"{list(morphology.names)}; ingest the images with contours and --mpp "
                f"as those that it was trained with"
            )
    return [image_of_row(*both) for both in zip(rows, measures, strict=True)]
