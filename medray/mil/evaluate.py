"""Predictions of slides and their labels -> scores and a report.

Slides that trained or chose the model do not count, nor do others of their patients.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa

from medray.classes import Classes
from medray.errors import ConfigError, MedrayError
from medray.evaluation import (
    Predicted,
    as_png,
    bootstrap,
    check_folder,
    data_uri,
    draw_image_curves,
    f1_line,
    render,
    score,
)
from medray.mil.config import read_seen_slides
from medray.mil.features import read_features, read_slide
from medray.mil.infer import Predictions, attention_uri, heatmap_uri, read_predictions
from medray.mil.labels import SlideLabel, join_labels
from medray.slides import choose_level, open_row, read_working, scan_digest
from medray.storage import files
from medray.types import Row

log = logging.getLogger(__name__)

_SHOWN = 6  # errors, the most confident ones
_TILES = 4  # of each, the most attended ones


@dataclass(frozen=True)
class SlideEvaluation:
    """What an evaluation of slides' labels found.

    Attributes:
        out: Folder of the report.
        report: The page to open.
        f1: Mean F1 of the classes.
        interval: Its 95 % bootstrap interval over patients; None of one patient.
        unseen: Slides that were counted.
        seen: Slides that were not, as the model has seen them or their patients.
        failed: Reason of each labelled slide that has no prediction.
    """

    out: str
    report: str
    f1: float | None
    interval: list[float] | None
    unseen: int
    seen: int
    failed: dict[str, str]

    def __str__(self) -> str:
        return (
            f"{f1_line(self.f1, self.interval)}\n"
            f"report  {self.report}\n"
            f"out     {self.out}\n"
            f"{self.unseen} slides evaluated, {self.seen} left out that the model has "
            f"seen, {len(self.failed)} failed"
        )


def evaluate_slides(
    run: str, *, truth: str, out: str, ignore_unknown: bool = False
) -> SlideEvaluation:
    """Compare predictions of slides with their labels.

    Args:
        run: Folder that `medray infer FEATURES --model SLIDEMODEL` wrote.
        truth: CSV with the columns slide, label and, if known, patient.
        out: Folder of the report; made if needed.
        ignore_unknown: Leave out labels of slides that are not in the run. Without it
            they are refused.

    Raises:
        ConfigError: The labels do not suit the run, or none of its slides is new to
            the model.
    """
    run, truth, out = (files.absolute(place) for place in (run, truth, out))
    check_folder(out, "slides.csv")
    what = read_predictions(run)
    table = files.read_table(files.join(run, "slides.parquet")).to_pylist()
    slides = {row["slide"]: row for row in table}
    labels, matched = join_labels(truth, slides, ignore_unknown=ignore_unknown)
    strange = sorted({known.label for known in labels.values()} - {*what.classes})
    if strange:
        raise ConfigError(
            f"{truth}: the model knows the classes {list(what.classes)}, not {strange}"
        )
    rows, failed, seen = _predicted(slides, labels, what, run)
    if not rows:
        raise ConfigError(
            f"{truth}: the model has seen all of its {seen} slides, or "
            f"others of their patients; scores on them would say nothing. Label slides "
            f"that are new to it, or leave some to split test in training"
        )
    metrics = _score(rows, what.classes)
    metrics |= {"seen": seen, "model_digest": what.model_digest, "notes": [matched]}
    _write_table(rows, what.classes, files.join(out, "slides.csv"))
    page = render(
        "slide_labels.html.jinja",
        title=f"{len(rows)} slides",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        classes=Classes(what.classes),
        metrics=metrics,
        figures=draw_image_curves(rows, what.classes),
        errors=_errors(rows, slides, what, run),
        provenance={
            "model": what.model.rsplit("/", 1)[-1],
            "model digest": what.model_digest,
            "encoder digest": what.encoder_digest,
            "features": what.features.rsplit("/", 1)[-1],
        },
    )
    report = files.join(out, "report.html")
    files.write_bytes(report, page.encode())
    # Last: a folder with metrics.json is a whole report.
    files.write_json(files.join(out, "metrics.json"), metrics)
    interval = metrics["intervals"]["macro_f1"] if metrics["intervals"] else None
    return SlideEvaluation(
        out, report, metrics["macro_f1"], interval, len(rows), seen, failed
    )


def _predicted(
    slides: dict[str, Row], labels: dict[str, SlideLabel], what: Predictions, run: str
) -> tuple[list[Predicted], dict[str, str], int]:
    """Return the slides that count, why others failed, and how many were seen."""
    seen = [
        row
        for row in read_seen_slides(files.join(run, "seen.csv"))
        if row["split"] != "test"
    ]
    digests = {scan_digest(row["digest"]) for row in seen}
    patients = {row["patient"] for row in seen}
    rows, failed, left_out = [], {}, 0
    for slide, known in sorted(labels.items()):
        row = slides[slide]
        if scan_digest(row["digest"] or "") in digests or known.patient in patients:
            left_out += 1
        elif row["status"] != "done":
            failed[slide] = row["message"]
        else:
            shares = np.array([row[f"p_{name}"] for name in what.classes])
            rows.append(
                Predicted(
                    name=slide,
                    digest=row["digest"],
                    patient=known.patient,
                    truth=what.classes.index(known.label),
                    predicted=int(shares.argmax()),
                    probabilities=shares,
                    log_probabilities=np.log(np.maximum(shares, 1e-12)),
                )
            )
    return rows, failed, left_out


def _score(rows: Sequence[Predicted], names: Sequence[str]) -> Row:
    """Score as for images; and the mean F1 and area under ROC of all classes."""
    found = score(rows, names)
    found["slides"] = found.pop("images")
    for name in ("f1", "auc"):
        values = [row[name] for row in found["per_class"] if row[name] is not None]
        found[f"macro_{name}"] = float(np.mean(values)) if values else None
    if found["intervals"] is not None:
        # A class before the others makes their mean, of two classes as well.
        patients = sorted({row.patient for row in rows})
        shape = (len(patients), len(names) + 1, len(names) + 1)
        counts = np.zeros(shape, np.int64)
        for row in rows:
            place = patients.index(row.patient)
            counts[place, row.truth + 1, row.predicted + 1] += 1
        drawn = bootstrap(counts, ["", *names])
        found["intervals"]["macro_f1"] = drawn["f1"] if drawn else None
    return found


def _write_table(rows: Sequence[Predicted], names: Sequence[str], uri: str) -> None:
    table = [
        {
            "slide": row.name,
            "patient": row.patient,
            "truth": names[row.truth],
            "predicted": names[row.predicted],
        }
        | {
            f"p_{name}": round(float(share), 4)
            for name, share in zip(names, row.probabilities, strict=True)
        }
        for row in rows
    ]
    files.write_csv(uri, pa.Table.from_pylist(table))


@dataclass(frozen=True)
class ConfidentError:
    """A slide that was taken for another class, as the report shows it.

    Attributes:
        slide: Its id.
        heatmap: Data URI of where the model looked; "": not known.
        tiles: Data URIs of the most attended tiles.
        truth: Its label.
        predicted: The label that was predicted.
        confidence: Probability of that label.
    """

    slide: str
    heatmap: str
    tiles: list[str]
    truth: str
    predicted: str
    confidence: float


def _errors(
    rows: Sequence[Predicted], slides: dict[str, Row], what: Predictions, run: str
) -> list[ConfidentError]:
    """Return the most confident errors, with heatmaps and the most attended tiles."""
    wrong = [row for row in rows if row.truth != row.predicted]
    wrong.sort(key=lambda row: -row.probabilities[row.predicted])
    shown = []
    for row in wrong[:_SHOWN]:
        heatmap = heatmap_uri(run, row.name)
        attends = files.exists(heatmap)
        shown.append(
            ConfidentError(
                slide=row.name,
                heatmap=data_uri(files.read_bytes(heatmap)) if attends else "",
                tiles=_most_attended(slides[row.name], what, run) if attends else [],
                truth=what.classes[row.truth],
                predicted=what.classes[row.predicted],
                confidence=float(row.probabilities[row.predicted]),
            )
        )
    return shown


def _most_attended(row: Row, what: Predictions, run: str) -> list[str]:
    """Return pictures of the most attended tiles; none if the slide is not there."""
    tiles = files.read_table(attention_uri(run, row["slide"])).to_pylist()
    tiles.sort(key=lambda tile: -tile["attention"])
    try:
        settings, _ = read_features(what.features)
        attributes = read_slide(what.features, row["slide"]).attributes
        side, pictures = settings.encoder.tile, []
        with open_row(row) as slide:
            working = choose_level(slide, settings.encoder.mpp, row.get("given_mpp"))
            for tile in tiles[:_TILES]:
                y, x = (round(tile[a] / attributes["downsample"]) for a in ("y", "x"))
                size = (min(side, working.height - y), min(side, working.width - x))
                pixels, _, _ = read_working(slide, working, y, x, *size)
                pictures.append(data_uri(as_png(pixels)))
    except (MedrayError, OSError) as error:
        log.warning("slide=%s its tiles are not shown: %s", row["slide"], error)
        return []
    return pictures
