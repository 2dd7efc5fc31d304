"""Images in class folders -> a dataset of contact sheets.

The way of an image, top to bottom:

    find     FOLDER/CLASS/IMAGE, or FOLDER/SPLIT/CLASS/IMAGE
    digest   of images that are there twice the first is taken
    split    patients stay together
    place    images of one split side by side, each resized into a patch of its own
    label    the patch's label image is all of the image's class

A sheet is a slide of the dataset as any other, in which each image is just one patch:
training and inference go the way that they go with slides.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
from PIL import Image

from medray import cluster
from medray.classes import Classes
from medray.commit import Summary
from medray.dataset import (
    LABELS,
    SPLITS,
    DatasetSettings,
    images_uri,
    labels_uri,
    open_dataset,
    read_groups,
    slide_uri,
    split_slides,
    write_patches,
)
from medray.errors import ConfigError, MedrayError
from medray.faults import bound_memory
from medray.grid import Rectangle
from medray.progress import Progress
from medray.slides import open_slide
from medray.slides.digest import slide_digest, stamp_of
from medray.slides.listing import find_files
from medray.store import files, omezarr
from medray.store.lock import locked

log = logging.getLogger(__name__)
Row = dict[str, Any]
UInt8 = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_SHEET_PX = 2048  # side of a sheet, at most
_DIGESTS = 256  # images that a task digests


def ingest_images(
    folder: str,
    *,
    out: str,
    side: int,
    classes: tuple[str, ...] = (),
    patients: str = "",
    groups: str | None = None,
    splits: str | None = None,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
) -> Summary:
    """Turn images in class folders into a dataset to train a classifier on.

    Images whose bytes are there twice count once, those of `test` before those of
    `val` and `train`, so that no image is in two splits.

    Args:
        folder: Holds a folder a class, or folders train, val or test that hold them.
        out: Folder of the dataset; made if needed.
        side: To which images are resized, pixels; a multiple of 32.
        classes: Names by label value; by default the folders' names in their order.
            Of two classes the second is the one that is looked for.
        patients: Regular expression; what it finds in an image's name (its first
            group, if it has one) is the patient. Without one, an image is a patient.
        groups: CSV (slide,group) with patients by image instead.
        splits: CSV (slide,split) that says train, val or test of each image itself.
        fractions: Shares of train, val and test; where the folders say which images
            are test, the share of val is taken from train.
        seed: Decides the splits, and the order in the sheets.

    Returns:
        What was done; images count as slides, sheets as regions.

    Raises:
        ConfigError: The request is wrong, a class has no image, OUT was made with
            other settings, or another process works there.
    """
    if side < 32 or side % 32 or side > _SHEET_PX:
        raise ConfigError(
            f"side: expected a multiple of 32 up to {_SHEET_PX}, found {side}"
        )
    images = find_images(folder, classes)
    names = classes or tuple(sorted({row["class"] for row in images}))
    settings = DatasetSettings(
        classes=Classes(names), patch=side, region=side * (_SHEET_PX // side)
    )
    out = files.absolute(out)
    with locked(out, "ingest"):
        open_dataset(out, settings)
        table = images_uri(out)
        before = files.read_table(table).to_pylist() if files.exists(table) else []
        if [(r["image"], r["stamp"]) for r in before] == [
            (r["image"], r["stamp"]) for r in images
        ]:
            return _summary(out, before, 0, 0.0)
        _set_patients(images, patients, groups)
        cluster.connect()
        start = time.perf_counter()
        images = _digested(images)
        _leave_out_copies(images)
        _split(images, splits, fractions, seed)
        images, sheets = _place(images, settings, out, seed)
        write_patches(out, list(_patches(images, settings)))
        files.write_table(
            files.join(out, "slides.parquet"), pa.Table.from_pylist(sheets)
        )
        kept = [{k: v for k, v in row.items() if k != "uri"} for row in images]
        files.write_table(table, pa.Table.from_pylist(kept))
        return _summary(out, kept, len(sheets), time.perf_counter() - start)


def _summary(out: str, images: list[Row], sheets: int, seconds: float) -> Summary:
    failed = {r["image"]: r["message"] for r in images if r["status"] == "failed"}
    good = sum(row["status"] == "done" for row in images)
    copies = len(images) - good - len(failed)
    if copies:
        log.warning("%d images are copies of others and were left out", copies)
    done = good if sheets else 0
    return Summary(out, done, good - done, failed, sheets, seconds)


# --- find -----------------------------------------------------------------------------


def find_images(folder: str, classes: Sequence[str] = ()) -> list[Row]:
    """Give a row an image: `image` (its name), `uri`, `class`, `split` ("" if unsaid).

    Raises:
        ConfigError: There are no class folders, or one has no image.
    """
    root = files.absolute(folder)
    rows = []
    for uri, relative in find_files([root], IMAGE_SUFFIXES):
        parts = relative.split("/")
        split = parts[0] if parts[0] in SPLITS and len(parts) > 2 else ""
        below = parts[1:] if split else parts
        if len(below) < 2:
            raise ConfigError(
                f"{uri}: expected images in a folder for each class "
                f"({folder}/CLASS/IMAGE), found one beside them"
            )
        rows.append(
            {
                "image": relative,
                "uri": uri,
                "class": below[0],
                "split": split,
                "stamp": stamp_of(uri),
            }
        )
    found = {row["class"] for row in rows}
    empty = sorted((set(classes) or _folders(root)) - found)
    if empty:
        raise ConfigError(
            f"{folder}: no image ({', '.join(IMAGE_SUFFIXES)}) of the class "
            f"{empty[0]}; found images of {sorted(found)}"
        )
    if len(found) < 2:
        raise ConfigError(
            f"{folder}: expected a folder for each of two classes or more, found "
            f"{sorted(found)}"
        )
    if classes and found - set(classes):
        raise ConfigError(
            f"{folder}: holds the class {sorted(found - set(classes))[0]}, expected "
            f"{list(classes)}"
        )
    return sorted(rows, key=lambda row: row["image"])


def _folders(root: str) -> set[str]:
    """Name the class folders, those without images too."""
    top = [n for n in files.list_folder(root) if files.is_folder(files.join(root, n))]
    inner = [files.join(root, name) for name in top if name in SPLITS]
    if not inner:
        return {name for name in top if not name.startswith(".")}
    return {
        name
        for place in inner
        for name in files.list_folder(place)
        if files.is_folder(files.join(place, name)) and not name.startswith(".")
    }


# --- digest ---------------------------------------------------------------------------


def _digested(images: list[Row]) -> list[Row]:
    """Add `digest`, `status` and `message`."""
    task = ray.remote(_digest_some)
    parts = [task.remote(list(some)) for some in itertools.batched(images, _DIGESTS)]
    return [row for part in parts for row in ray.get(part)]


def _digest_some(rows: list[Row]) -> list[Row]:
    done = []
    for row in rows:
        try:
            found = {
                "digest": slide_digest(row["uri"]),
                "status": "done",
                "message": "",
            }
        except MedrayError as error:
            found = {"digest": "", "status": "failed", "message": f"{error}"}
        done.append(row | found)
    return done


def _leave_out_copies(images: list[Row]) -> None:
    """Note which images are copies; those that test stay, that nothing of it leaks."""
    first: dict[str, Row] = {}
    order = {"test": 0, "val": 1, "train": 2, "": 2}
    for row in sorted(images, key=lambda row: order[row["split"]]):
        if row["status"] != "done":
            continue
        kept = first.setdefault(row["digest"], row)
        if kept is row:
            continue
        row |= {"status": "copy", "message": f"the same bytes as {kept['image']}"}
        if kept["class"] != row["class"]:
            log.warning(
                "%s (%s) has the same bytes as %s (%s); the first is left out",
                row["image"],
                row["class"],
                kept["image"],
                kept["class"],
            )


# --- split ----------------------------------------------------------------------------


def _set_patients(images: list[Row], patients: str, groups: str | None) -> None:
    try:
        pattern = re.compile(patients)
    except re.error as error:
        raise ConfigError(
            f"patients: {patients!r} is no regular expression: {error}"
        ) from error
    known = read_groups(groups, "group") if groups else {}
    for row in images:
        name = row["image"].rpartition("/")[2]
        found = pattern.search(name) if patients else None
        if patients and found is None:
            raise ConfigError(
                f"patients: {patients!r} finds nothing in the name {name}; it must "
                f"find the patient of every image"
            )
        patient = found[1 if pattern.groups else 0] if found else row["image"]
        row["patient"] = known.get(row["image"], patient)


def _split(
    images: list[Row],
    splits: str | None,
    fractions: tuple[float, float, float],
    seed: int,
) -> None:
    """Give every image its split."""
    if splits is not None:
        wanted = read_groups(splits, "split")
        for row in images:
            row["split"] = wanted.get(row["image"], "")
            if row["split"] not in (*SPLITS, ""):
                raise ConfigError(
                    f"{splits}: expected {SPLITS}, found {row['split']!r} for "
                    f"{row['image']}"
                )
    elif not any(row["split"] for row in images):
        _deal(images, fractions, seed)
    elif not any(row["split"] == "val" for row in images):
        train, val = fractions[0], fractions[1]
        if not val:
            raise ConfigError("fractions: the share of val must be above 0")
        rest = [row for row in images if row["split"] == "train"]
        _deal(rest, (train / (train + val), val / (train + val), 0.0), seed)
    where: dict[str, set[str]] = {}
    for row in images:
        if row["status"] == "done" and row["split"]:
            where.setdefault(row["patient"], set()).add(row["split"])
    both = sorted(patient for patient, found in where.items() if len(found) > 1)
    if both:
        log.warning(
            "%d patients have images in several splits, such as %s in %s",
            len(both),
            both[0],
            sorted(where[both[0]]),
        )


def _deal(images: list[Row], fractions: tuple[float, float, float], seed: int) -> None:
    rows = [
        {"slide": row["image"], "group": row["patient"], "stratum": row["class"]}
        for row in images
        if row["status"] == "done"
    ]
    split_of = split_slides(rows, fractions=fractions, seed=seed)
    for row in images:
        row["split"] = split_of.get(row["image"], "")


# --- place ----------------------------------------------------------------------------


def _place(
    images: list[Row], settings: DatasetSettings, out: str, seed: int
) -> tuple[list[Row], list[Row]]:
    """Write the sheets; give the images with their places, and a row a sheet."""
    columns = settings.region // settings.patch
    rng = np.random.default_rng(seed)
    task = ray.remote(_write_sheet).options(num_cpus=0.75)
    sheets, started = [], []
    for split in SPLITS:
        some = [r for r in images if r["split"] == split and r["status"] == "done"]
        mixed = [some[i] for i in rng.permutation(len(some))]
        for number, part in enumerate(itertools.batched(mixed, columns**2)):
            name = f"{split}-{number:04d}"
            started.append(task.remote(list(part), name, settings, out))
            sheets.append(name)
    placed: dict[str, Row] = {}
    rows = []
    with Progress("ingest", len(sheets)) as progress:
        for name, result in zip(sheets, started, strict=True):
            sheet, found = ray.get(result)
            placed |= {row["image"]: row for row in found}
            rows.append(sheet)
            progress.slide(name, "done")
    nowhere = {"sheet": "", "y": -1, "x": -1}
    return [nowhere | row | placed.get(row["image"], {}) for row in images], rows


def _write_sheet(
    images: list[Row], name: str, settings: DatasetSettings, out: str
) -> tuple[Row, list[Row]]:
    bound_memory()
    side, columns = settings.patch, settings.region // settings.patch
    rows = math.ceil(len(images) / columns)
    height, width = rows * side, min(len(images), columns) * side
    pixels = np.full((height, width, 3), 255, np.uint8)
    labels = np.zeros((height, width), np.uint8)
    placed = []
    for index, row in enumerate(images):
        y, x = index // columns * side, index % columns * side
        label = settings.classes.value(row["class"])
        try:
            pixels[y : y + side, x : x + side] = read_resized(row["uri"], side)
        except (MedrayError, MemoryError, OSError) as error:
            row = row | {"status": "failed", "message": f"{row['uri']}: {error}"}
        else:
            labels[y : y + side, x : x + side] = label
            row = row | {"sheet": name, "y": y, "x": x}
        placed.append(row)
    _store(name, pixels, labels, settings, out)
    sheet = {
        "slide": name,
        "uri": "",
        "status": "done",
        "annotated": True,
        "split": images[0]["split"],
        "height": height,
        "width": width,
        "patches": sum(row["status"] == "done" for row in placed),
    }
    return sheet, placed


def read_resized(uri: str, side: int) -> UInt8:
    """Read an image as (side, side, 3) uint8 RGB; it may be stretched.

    Raises:
        SlideError: It is no image, or damaged.
    """
    with open_slide(uri) as slide:
        level = slide.levels[0]
        pixels = slide.read(y=0, x=0, height=level.height, width=level.width)
    image = Image.fromarray(pixels)
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _store(
    name: str, pixels: UInt8, labels: UInt8, settings: DatasetSettings, out: str
) -> None:
    height, width = labels.shape
    attributes = {"kind": "sheet", "slide": name}
    region, patch = settings.region, settings.patch
    image, annotation = slide_uri(out, name), labels_uri(out, name)
    files.remove(image)
    omezarr.create_image(
        image,
        height,
        width,
        mpp=None,
        name=name,
        attributes=attributes,
        region=region,
        patch=patch,
    )
    omezarr.list_labels(image, [LABELS])
    omezarr.create_labels(
        annotation,
        height,
        width,
        mpp=None,
        name=LABELS,
        classes=settings.classes,
        attributes=attributes,
        source="../../",
        region=region,
        patch=patch,
    )
    whole = Rectangle(y=0, x=0, height=height, width=width)
    omezarr.write_region(image, whole, np.moveaxis(pixels, 2, 0))
    omezarr.write_region(annotation, whole, labels)
    omezarr.build_pyramid(image)
    omezarr.build_pyramid(annotation)


def _patches(images: list[Row], settings: DatasetSettings) -> Iterator[Row]:
    side, names = settings.patch, settings.classes.names
    for row in images:
        if row["status"] == "done" and row["sheet"]:
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
