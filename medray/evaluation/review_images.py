"""The images that classifiers find hardest: labels to look at again.

read      images.csv of the reports of cross-validation, each of a model that has
          not seen its images
rank      the loss of each image: -log of the probability of its label
write     hardest.csv and a page with the pictures
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.csv

from medray.datasets import holds_images, read_dataset, read_patches
from medray.errors import ConfigError
from medray.evaluation.html import as_png, check_folder, data_uri, render
from medray.evaluation.image_errors import read_pixels
from medray.evaluation.significance import read_image_predictions
from medray.inference import image_of_row
from medray.storage import files
from medray.types import Row

SURE = 0.95
"""Probability of another class from which on a label is doubted."""

_LEAST = 5e-5  # images.csv has four digits


@dataclass(frozen=True)
class ImageReview:
    """Which images are hardest.

    Attributes:
        out: Folder of the page and the table.
        page: The page to open.
        images: That the reports have.
        shown: How many of them are shown, the hardest first.
        doubted: How many another class is surer of than 0.95.
        accuracy: Of all images.
        undoubted_accuracy: Without the doubted ones, which is too high: what is left
            out was wrong by the model's own word.
    """

    out: str
    page: str
    images: int
    shown: int
    doubted: int
    accuracy: float
    undoubted_accuracy: float

    def __str__(self) -> str:
        return "\n".join(
            (
                f"accuracy  {self.accuracy:.4f} of all {self.images} images; "
                f"{self.undoubted_accuracy:.4f} without {self.doubted} whose label is "
                f"doubted (too high: they were left out for being wrong)",
                f"page      {self.page}",
                f"{self.shown} images shown, the hardest first",
            )
        )


def review_images(
    reports: Sequence[str], *, by_loss: str, out: str, count: int = 60
) -> ImageReview:
    """Write a page of the hardest images, by their loss where no model had seen them.

    Args:
        reports: Reports of `medray evaluate`, one of each fold. The loss of an image
            that several have is the mean.
        by_loss: Dataset of images that has them all, in whatever splits.
        out: Folder for hardest.html and hardest.csv.
        count: Images to show, the hardest first.

    Raises:
        ConfigError: No images, reports of other classes, or too small a count.
    """
    data, out = files.absolute(by_loss), files.absolute(out)
    check_folder(out, "hardest.csv")
    if count < 1:
        raise ConfigError(f"count: expected at least one image, found {count}")
    if not holds_images(data):
        raise ConfigError(f"{data}: expected a dataset of images, found one of slides")
    ranked = rank([files.absolute(report) for report in reports], data)
    shown = ranked[:count]
    right = np.array([row["predicted"] == row["truth"] for row in ranked])
    doubted = np.array([row["doubted"] for row in ranked])
    found = ImageReview(
        out=out,
        page=files.join(out, "hardest.html"),
        images=len(ranked),
        shown=len(shown),
        doubted=int(doubted.sum()),
        accuracy=float(right.mean()),
        undoubted_accuracy=float(right[~doubted].mean()) if not doubted.all() else 0.0,
    )
    names = [*ranked[0]]
    table = {name: [row[name] for row in ranked] for name in names}
    files.write_csv(files.join(out, "hardest.csv"), pa.table(table))
    page = render(
        "hardest.html.jinja",
        title=f"The {len(shown)} hardest of {len(ranked)} images",
        found=found,
        sure=SURE,
        images=_with_pictures(shown, data),
    )
    files.write_bytes(found.page, page.encode())
    return found


def rank(reports: Sequence[str], data: str) -> list[Row]:
    """Return the images of reports, the greatest mean loss first.

    Raises:
        ConfigError: A report has no images.csv, or other classes than the dataset.
    """
    classes = read_dataset(data).classes.names
    shares: dict[str, list[Mapping[str, float]]] = {}
    known: dict[str, Row] = {}
    for report in reports:
        rows = read_image_predictions(report, classes)
        table = pyarrow.csv.read_csv(
            io.BytesIO(files.read_bytes(files.join(report, "images.csv")))
        )
        of_classes = table.select([f"p_{name}" for name in classes]).to_pylist()
        for row, share in zip(rows, of_classes, strict=True):
            key = {"image": row.image, "patient": row.patient, "digest": row.digest}
            known[row.digest] = key | {"truth": row.truth}
            shares.setdefault(row.digest, []).append(share)
    found = []
    for digest, of in known.items():
        mean = {
            k: float(np.mean([s[f"p_{k}"] for s in shares[digest]])) for k in classes
        }
        logs = [-np.log(max(s[f"p_{of['truth']}"], _LEAST)) for s in shares[digest]]
        predicted = max(mean, key=lambda name: mean[name])
        doubted = predicted != of["truth"] and mean[predicted] >= SURE
        found.append(
            of
            | {"predicted": predicted, "probability": round(mean[predicted], 4)}
            | {"loss": round(float(np.mean(logs)), 4), "doubted": doubted}
        )
    if not found:
        raise ConfigError(f"{reports[0]}: expected images in images.csv, found none")
    return sorted(found, key=lambda row: (-row["loss"], row["image"]))


def _with_pictures(rows: Sequence[Row], data: str) -> list[Row]:
    there = {
        row["digest"]: image_of_row(row)
        for split in ("train", "val", "test")
        for row in read_patches(data, split)
    }
    pictures = (
        data_uri(as_png(read_pixels(there[row["digest"]], data)))
        if row["digest"] in there
        else None
        for row in rows
    )
    return [
        row | {"picture": picture} for row, picture in zip(rows, pictures, strict=True)
    ]
