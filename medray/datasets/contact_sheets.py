"""Images of one split side by side in one slide of a dataset, each in its own patch."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from medray.datasets.cells import read_resized
from medray.datasets.dataset import LABELS, DatasetSettings, labels_uri, slide_uri
from medray.datasets.splits import SPLITS
from medray.geometry import Rectangle
from medray.storage import content_digest, ome_zarr
from medray.types import Row, UInt8


def digest_of_values(values: Any) -> str:
    """Return the digest of JSON values."""
    return content_digest(json.dumps(values).encode())


def plan_sheets(images: list[Row], columns: int) -> Iterator[Row]:
    """Return the sheets: each up to `columns` times as many images of one split.

    Their order does not matter: training draws its own.
    """
    for split in SPLITS:
        some = [r for r in images if r["split"] == split and r["status"] == "done"]
        for number, part in enumerate(itertools.batched(some, columns**2)):
            yield {
                "slide": f"{split}-{number:04d}",
                "split": split,
                "images": list(part),
                "digest": digest_of_values(
                    [(row["digest"], row["class"]) for row in part]
                ),
            }


def _size(count: int, columns: int, side: int) -> tuple[int, int]:
    """Return height and width of a sheet of so many images, in pixels."""
    return math.ceil(count / columns) * side, min(count, columns) * side


def write_sheet(
    sheet: Row, settings: DatasetSettings, out: str
) -> list[tuple[int, int]]:
    """Write a sheet and its labels; return where (y, x) its images are."""
    side, columns = settings.patch, settings.region // settings.patch
    height, width = _size(len(sheet["images"]), columns, side)
    pixels = np.full((height, width, 3), 255, np.uint8)
    labels = np.zeros((height, width), np.uint8)
    places = []
    for index, row in enumerate(sheet["images"]):
        y, x = index // columns * side, index % columns * side
        pixels[y : y + side, x : x + side] = read_resized(row, side)
        labels[y : y + side, x : x + side] = settings.classes.value(row["class"])
        places.append((y, x))
    _store(sheet, pixels, labels, settings, out)
    return places


def _store(
    sheet: Row, pixels: UInt8, labels: UInt8, settings: DatasetSettings, out: str
) -> None:
    height, width = labels.shape
    name = sheet["slide"]
    attributes = {"kind": "sheet", "slide": name, "digest": sheet["digest"]}
    image, annotation = slide_uri(out, name), labels_uri(out, name)
    ome_zarr.create_image(
        image,
        height,
        width,
        mpp=None,
        name=name,
        attributes=attributes,
        region=settings.region,
        patch=settings.patch,
    )
    ome_zarr.list_labels(image, [LABELS])
    ome_zarr.create_labels(
        annotation,
        height,
        width,
        mpp=None,
        name=LABELS,
        classes=settings.classes,
        attributes=attributes,
        source="../../",
        region=settings.region,
        patch=settings.patch,
    )
    whole = Rectangle(y=0, x=0, height=height, width=width)
    for uri, values in ((image, np.moveaxis(pixels, 2, 0)), (annotation, labels)):
        ome_zarr.write_region(uri, whole, values)
        ome_zarr.build_pyramid(uri)


def sheet_row(sheet: Row, settings: DatasetSettings, columns: int) -> Row:
    """Describe a sheet for slides.parquet."""
    height, width = _size(len(sheet["images"]), columns, settings.patch)
    return {
        "slide": sheet["slide"],
        "digest": sheet["digest"],
        "status": "done",
        "annotated": True,
        "split": sheet["split"],
        "height": height,
        "width": width,
        "patches": len(sheet["images"]),
    }


def patch_rows(images: list[Row], settings: DatasetSettings) -> Iterator[Row]:
    """Describe each image as a patch, for patches.parquet."""
    side, names = settings.patch, settings.classes.names
    for row in images:
        if "sheet" in row:
            yield {
                "slide": row["sheet"],
                "split": row["split"],
                "mpp": None,
                "y": row["y"],
                "x": row["x"],
                "height": side,
                "width": side,
                "tissue": 1.0,
                "class_px": [side**2 * (name == row["class"]) for name in names],
                "image": row["image"],
                "patient": row["patient"],
                "digest": row["digest"],
            }
