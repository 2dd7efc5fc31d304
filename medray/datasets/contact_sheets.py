"""Contact sheets: images of one split as one slide of a dataset, one per patch."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from medray.datasets.cells import read_checked
from medray.datasets.dataset import LABELS, DatasetSettings, labels_uri, slide_uri
from medray.datasets.images import CheckedImage, PlacedImage, Sheet
from medray.datasets.splits import SPLITS
from medray.geometry import Rectangle
from medray.storage import content_digest, ome_zarr
from medray.types import Columns, UInt8


def digest_of_values(values: Any) -> str:
    """Return the digest of JSON values."""
    return content_digest(json.dumps(values).encode())


def plan_sheets(
    images: Sequence[CheckedImage], columns: int, side: int
) -> Iterator[Sheet]:
    """Return the sheets: each up to `columns` times as many images of one split.

    Their order does not matter: training draws its own.
    """
    for split in SPLITS:
        some = [image for image in images if image.split == split and image.taken]
        for number, part in enumerate(itertools.batched(some, columns**2)):
            name = f"{split}-{number:04d}"
            digests = [(image.digest, image.file.class_name) for image in part]
            yield Sheet(
                slide=name,
                split=split,
                digest=digest_of_values(digests),
                height=math.ceil(len(part) / columns) * side,
                width=min(len(part), columns) * side,
                images=tuple(
                    PlacedImage(
                        image, name, index // columns * side, index % columns * side
                    )
                    for index, image in enumerate(part)
                ),
            )


def write_sheet(sheet: Sheet, settings: DatasetSettings, out: str) -> None:
    """Write a sheet and its labels."""
    side = settings.patch
    pixels = np.full((sheet.height, sheet.width, 3), 255, np.uint8)
    labels = np.zeros((sheet.height, sheet.width), np.uint8)
    for placed in sheet.images:
        place = Rectangle(placed.y, placed.x, side, side).slices()
        pixels[place] = read_checked(placed.image, side)
        labels[place] = settings.classes.value(placed.image.file.class_name)
    _store(sheet, pixels, labels, settings, out)


def _store(
    sheet: Sheet, pixels: UInt8, labels: UInt8, settings: DatasetSettings, out: str
) -> None:
    height, width = labels.shape
    name = sheet.slide
    attributes = {"kind": "sheet", "slide": name, "digest": sheet.digest}
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


def sheet_row(sheet: Sheet) -> Columns:
    """Describe a sheet for slides.parquet."""
    return {
        "slide": sheet.slide,
        "digest": sheet.digest,
        "status": "done",
        "annotated": True,
        "split": sheet.split,
        "height": sheet.height,
        "width": sheet.width,
        "patches": len(sheet.images),
    }


def patch_row(placed: PlacedImage, settings: DatasetSettings) -> Columns:
    """Describe an image as a patch, for patches.parquet."""
    side, names = settings.patch, settings.classes.names
    image, file = placed.image, placed.image.file
    return {
        "slide": placed.sheet,
        "split": image.split,
        "mpp": None,
        "y": placed.y,
        "x": placed.x,
        "height": side,
        "width": side,
        "tissue": 1.0,
        "class_px": [side**2 * (name == file.class_name) for name in names],
        "image": file.image,
        "patient": file.patient,
        "digest": image.digest,
    }
