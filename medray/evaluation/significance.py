"""Two classifiers on the same images: which one is better, and is it chance?"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from scipy.stats import binomtest

from medray.errors import ConfigError
from medray.evaluation.image_metrics import Predicted, patients_of
from medray.evaluation.metrics import draws
from medray.storage import files
from medray.types import Row


@dataclass(frozen=True)
class ReportedImage:
    """An image of another report.

    Attributes:
        image: Its name.
        digest: Of its bytes.
        patient: Whose it is.
        truth: Name of its class.
        predicted: Name of the class that was predicted.
    """

    image: str
    digest: str
    patient: str
    truth: str
    predicted: str


def write_image_predictions(
    rows: Sequence[Predicted], names: Sequence[str], uri: str
) -> None:
    """Write images.csv: one line per image, its truth, class and probabilities."""
    table = [
        {
            "image": row.name,
            "digest": row.digest,
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


def read_image_predictions(report: str, names: Sequence[str]) -> list[ReportedImage]:
    """Read the images.csv of a report of the same classes.

    Args:
        report: Folder of an evaluation of images.
        names: Of the classes, by label value.

    Raises:
        ConfigError: There is none, or it is of other classes.
    """
    uri = files.join(files.absolute(report), "images.csv")
    if not files.exists(uri):
        raise ConfigError(
            f"{report}: expected the report of a classifier with an images.csv; "
            f"`medray evaluate MODEL` writes one"
        )
    needed = [one.name for one in dataclasses.fields(ReportedImage)]
    try:
        strings = pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(needed, pa.string())
        )
        table = pyarrow.csv.read_csv(
            io.BytesIO(files.read_bytes(uri)), convert_options=strings
        )
    except pa.ArrowInvalid as error:
        raise ConfigError(f"{uri}: expected a CSV file ({error})") from error
    found = table.column_names
    missing = [name for name in needed if name not in found]
    if missing:
        raise ConfigError(
            f"{uri}: expected the column {missing[0]}, found {found}; an older medray "
            f"may have written it: run that evaluation again"
        )
    classes = [name.removeprefix("p_") for name in found if name.startswith("p_")]
    if classes != list(names):
        raise ConfigError(
            f"{uri}: its classes {classes} are not those of this model, {list(names)}"
        )
    rows = [ReportedImage(**row) for row in table.select(needed).to_pylist()]
    strange = [r for r in rows if not {r.truth, r.predicted} <= set(classes)]
    if strange:
        raise ConfigError(
            f"{uri}: image {strange[0].image}: expected classes of {classes}, found "
            f"{strange[0].truth} and {strange[0].predicted}"
        )
    return rows


def beside(
    rows: Sequence[Predicted],
    others: Sequence[ReportedImage],
    names: Sequence[str],
    report: str,
) -> Row:
    """Compare two classifiers on the images that both have seen.

    Images are the same if their bytes are. The test is McNemar's, exact: of the images
    of which just one classifier is right, each is as likely to be on either side
    (McNemar 1947; binomial, two sided).

    Args:
        rows: Of this one.
        others: Of the other, as `read_image_predictions` gives them.
        names: Of the classes.
        report: Folder of the other's report.

    Returns:
        images (that both have), accuracy and other_accuracy, difference (this minus
        the other), interval (its 95 % bootstrap interval over patients; None of one
        patient), only_this and only_other (images of which just that one is right),
        p_value.

    Raises:
        ConfigError: They have no image in common, or differ in an image's class.
    """
    by_digest = {row.digest: row for row in others}
    common = [row for row in rows if row.digest in by_digest]
    if not common:
        raise ConfigError(
            f"{report}: has no image in common with this evaluation ({len(others)} "
            f"images there, {len(rows)} here); evaluate both models on one split"
        )
    pairs = [(row, by_digest[row.digest]) for row in common]
    for row, other in pairs:
        if names[row.truth] != other.truth:
            raise ConfigError(
                f"{report}: image {other.image} is {other.truth} there and "
                f"{names[row.truth]} here; evaluate both models on one dataset"
            )
    right = np.array(
        [
            (row.predicted == row.truth, other.predicted == other.truth)
            for row, other in pairs
        ]
    )
    only_this = int((right[:, 0] & ~right[:, 1]).sum())
    only_other = int((right[:, 1] & ~right[:, 0]).sum())
    one_only = only_this + only_other
    ours, theirs = right.mean(axis=0)
    return {
        "report": report.rstrip("/").rsplit("/", 1)[-1],
        "images": len(common),
        "accuracy": float(ours),
        "other_accuracy": float(theirs),
        "difference": float(ours - theirs),
        "interval": _interval(common, right),
        "only_this": only_this,
        "only_other": only_other,
        "p_value": float(binomtest(only_this, one_only).pvalue) if one_only else 1.0,
    }


def _interval(rows: Sequence[Predicted], right: Any) -> list[float] | None:
    who, patients = patients_of([row.patient for row in rows])
    if patients < 2:
        return None
    images = np.bincount(who, minlength=patients)
    gained = np.bincount(who, right[:, 0].astype(float) - right[:, 1], patients)
    found = [drawn @ gained / (drawn @ images) for drawn in draws(patients)]
    low, high = np.quantile(np.concatenate(found), [0.025, 0.975])
    return [float(low), float(high)]
