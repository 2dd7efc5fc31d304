"""Images in class folders -> a dataset of contact sheets.

The way of an image, top to bottom:

    find     FOLDER/CLASS/IMAGE, or FOLDER/SPLIT/CLASS/IMAGE
    look     its digest, and whether it can be read: processes that may die of it
    split    of equal images one is taken; patients stay together
    place    images of one split side by side, each resized into a patch of its own

A sheet is a slide of the dataset as any other, in which each image is just one patch,
and the patch's labels are all of the image's class: training and inference go the way
that they go with slides.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from PIL import Image

from medray.annotations.morphology import feature_names
from medray.classes import Classes
from medray.datasets.cells import (
    look_at_cell,
    read_cell,
    with_contours,
    without_clusters,
)
from medray.datasets.dataset import (
    LABELS,
    SPLITS,
    DatasetSettings,
    check_fractions,
    images_uri,
    labels_uri,
    morphology_uri,
    open_dataset,
    read_groups,
    read_splits,
    slide_uri,
    split_slides,
    write_morphology,
    write_patches,
)
from medray.errors import ConfigError, MedrayError
from medray.execution import cluster
from medray.execution.actor_pool import LostError, Pool, poll
from medray.execution.failures import bound_memory, too_large
from medray.execution.progress import Progress
from medray.execution.signals import StoppedError, stopping
from medray.geometry import Rectangle
from medray.slides.discovery import find_files
from medray.slides.fingerprint import fingerprint_of, slide_digest
from medray.storage import files, ome_zarr
from medray.storage.digests import content_digest
from medray.storage.lock import locked
from medray.types import Row, UInt8

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_SHEET_PX = 2048  # side of a sheet, at most
_BATCH = 64  # images that a process looks at in one call
_TIMEOUT_S = 300.0  # for one of them, or for a sheet


@dataclass(frozen=True)
class Images:
    """What became of images in class folders.

    Attributes:
        out: Folder of the dataset.
        images: That are in it now, and were not before.
        skipped: That were in it before; then nothing was done.
        copies: That were left out, for their bytes were there twice.
        failed: Reason of each image that could not be read, by its name.
        seconds: Wall time, Ray's start apart.
    """

    out: str
    images: int
    skipped: int
    copies: int
    failed: dict[str, str]
    seconds: float


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
    contours: bool = False,
    mpp: float | None = None,
) -> Images:
    """Turn images in class folders into a dataset to train a classifier on.

    Images whose bytes are there twice count once, those of `test` before those of
    `val` and `train`, so that no image is in two splits. The same command again does
    nothing, unless images or what was said of them have changed; then the dataset is
    made anew.

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
        seed: Decides the splits.
        contours: Measure the cells by the contours beside them (see
            medray.datasets.cells), for classifiers that take this beside the pixels
            (see medray.annotations.morphology).
        mpp: Microns per pixel of the images, for those measures; None: in pixels.

    Raises:
        ConfigError: The request is wrong, a class has no image, OUT was made with
            other settings, or another process works there.
        StoppedError: SIGTERM or Ctrl-C.
    """
    check_fractions(fractions)
    if side < 32 or side % 32 or side > _SHEET_PX:
        raise ConfigError(
            f"side: expected a multiple of 32 up to {_SHEET_PX}, found {side}"
        )
    images = find_images(folder, classes, contours=contours)
    if contours:
        images = [row | {"mpp": mpp} for row in images]
    elif mpp is not None:
        raise ConfigError("--mpp: of images it is only for the measures of --contours")
    names = classes or tuple(sorted({row["class"] for row in images}))
    settings = DatasetSettings(
        classes=Classes(names), patch=side, region=side * (_SHEET_PX // side)
    )
    out = files.absolute(out)
    _set_patients(images, patients, read_groups(groups, "group") if groups else {})
    if splits is not None:
        wanted = read_splits(splits)
        for row in images:
            row["split"] = wanted.get(row["image"], "")
    said = {row["split"] for row in images}
    if splits is None and "train" in said and "val" not in said and not fractions[1]:
        raise ConfigError(
            f"{folder}: has no folder val; its share of train (the second of "
            f"fractions, {list(fractions)}) must be above 0"
        )
    given = splits is not None
    deal = functools.partial(_deal_out, given=given, fractions=fractions, seed=seed)
    request = _digest_of([images, list(fractions), seed, given])
    with locked(out, "ingest") as check:
        open_dataset(out, settings)
        if (before := _ingested_before(out, request)) is not None:
            return before
        features = feature_names(mpp) if contours else ()
        return _ingest(images, settings, out, deal, request, features, check)


def _digest_of(values: Any) -> str:
    return content_digest(json.dumps(values).encode())


def _ingested_before(out: str, request: str) -> Images | None:
    if not files.exists(images_uri(out)):
        return None
    table = files.read_table(images_uri(out))
    if (table.schema.metadata or {}).get(b"request") != request.encode():
        return None
    done = _counted(out, table.to_pylist(), 0.0)
    return Images(out, 0, done.images, done.copies, done.failed, 0.0)


def _counted(out: str, images: list[Row], seconds: float) -> Images:
    failed = {r["image"]: r["message"] for r in images if r["status"] == "failed"}
    done = sum(row["status"] == "done" for row in images)
    return Images(out, done, 0, len(images) - done - len(failed), failed, seconds)


def _ingest(
    images: list[Row],
    settings: DatasetSettings,
    out: str,
    deal: Callable[[list[Row]], None],
    request: str,
    features: tuple[str, ...],
    check: Callable[[], None],
) -> Images:
    """Look at the images, deal them out and place them; the tables come last."""
    cluster.connect()
    start = time.perf_counter()
    tables = (images_uri(out), morphology_uri(out))
    others = [
        files.join(out, n) for n in ("patches.parquet", "slides.parquet", "slides")
    ]
    for place in (*tables, *others):
        files.remove(place)  # of other images
    columns = settings.region // settings.patch
    with stopping() as asked, _start_readers(settings, out) as readers:

        def go_on() -> None:
            check()
            if asked.signal:
                raise StoppedError(asked.signal, "nothing of it is kept")

        _look(images, readers, go_on)
        _leave_out_copies(images)
        deal(images)
        sheets = list(_sheets(images, columns))
        with Progress("ingest", len(sheets)) as progress:
            for sheet, result in _work_off(sheets, readers, 1, go_on):
                if isinstance(result, LostError):
                    raise MedrayError(f"{sheet['slide']}: {result}, three times")
                for row, (y, x) in zip(sheet["images"], result, strict=True):
                    row |= {"sheet": sheet["slide"], "y": y, "x": x}
                progress.slide(sheet["slide"], "done")
    write_patches(out, list(_patches(images, settings)))
    rows = [_sheet_row(sheet, settings, columns) for sheet in sheets]
    files.write_table(files.join(out, "slides.parquet"), pa.Table.from_pylist(rows))
    if features:
        write_morphology(out, features, [row for row in images if "sheet" in row])
    kept = ("image", "class", "patient", "split", "digest", "status", "message")
    table = pa.Table.from_pylist([{k: row[k] for k in kept} for row in images])
    table = table.replace_schema_metadata({"request": request})
    files.write_table(images_uri(out), table)
    return _counted(out, images, time.perf_counter() - start)


# --- find -----------------------------------------------------------------------------


def find_images(
    folder: str, classes: Sequence[str] = (), *, contours: bool = False
) -> list[Row]:
    """Return one row per image: `image` (name), `uri`, `class`, `split` ("" if unsaid).

    With `contours` it is a row a cell, and says what
    medray.datasets.cells.with_contours does.

    Raises:
        ConfigError: There are no class folders, or one has no image; there are no
            contours.
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
                "fingerprint": fingerprint_of(uri),
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
    cells = without_clusters(rows)
    if contours:
        cells = with_contours(root, cells, rows)
    return sorted(cells, key=lambda row: row["image"])


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


# --- look -----------------------------------------------------------------------------


class _Reader:
    """Looks at images, and then puts them side by side."""

    def __init__(self, settings: DatasetSettings, out: str) -> None:
        bound_memory()
        self._settings, self._out = settings, out

    def work(self, rows: list[Row]) -> Iterator[list[Any]]:
        """Return what there is to say of an image, or where a sheet's images are."""
        for row in rows:
            if "images" in row:
                yield [_write_sheet(row, self._settings, self._out)]
            else:
                yield [_look_at(row, self._settings.patch)]


def _start_readers(settings: DatasetSettings, out: str) -> Pool:
    """Start a reader a core."""
    actor = ray.remote(_Reader).options(num_cpus=0.75)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    start = functools.partial(actor.remote, settings, out)
    return Pool(start, "work", max(1, cpus), timeout=lambda _: _TIMEOUT_S)


def _work_off(
    rows: list[Row], readers: Pool, batch: int, go_on: Callable[[], None]
) -> Iterator[tuple[Row, Any]]:
    """Return each row with what came of it, as it comes."""
    todo = deque(itertools.batched(rows, batch))
    while todo or readers.busy:
        go_on()
        while todo and readers.room > 0:
            readers.give(list(todo.popleft()))
        for _, row, result in poll(readers):
            yield row, result


def _look(images: list[Row], readers: Pool, go_on: Callable[[], None]) -> None:
    """Add `digest`, `status` and `message` to each image.

    It is decoded as well, though only to be decoded again when it is placed: which
    images can be is to be known before they are dealt out and given their places.
    """
    for row, result in _work_off(images, readers, _BATCH, go_on):
        if isinstance(result, LostError):
            why = f"{row['uri']}: quarantined: opening it: {result}, three times"
            result = _failed(why)
        row |= result
        if row["status"] == "failed":
            said = (row["image"], row["message"])
            log.warning("stage=ingest image=%s failed: %s", *said)


def _look_at(row: Row, side: int) -> Row:
    try:
        if "mpp" in row:  # its contours were asked for
            seen = look_at_cell(row)
        else:
            seen = {"digest": slide_digest(row["uri"])}
        read_resized(row | seen, side)
    except (MedrayError, OSError) as error:
        return _failed(f"{error}")
    except MemoryError as error:
        return _failed(too_large(row, error))
    return seen | {"status": "done", "message": ""}


def _failed(why: str) -> Row:
    return {"digest": "", "status": "failed", "message": why}


def read_resized(row: Row, side: int) -> UInt8:
    """Read an image as (side, side, 3) uint8 RGB; it may be stretched.

    Args:
        row: With `uri`; and `box`, if it is a cell within that image.
        side: Pixels.

    Raises:
        SlideError: It is no image, or damaged.
    """
    image = Image.fromarray(read_cell(row))
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image)


# --- split ----------------------------------------------------------------------------


def _leave_out_copies(images: list[Row]) -> None:
    """Note which images are copies; those that test stay, that nothing of it leaks."""
    first: dict[str, Row] = {}
    across: dict[tuple[str, str], list[str]] = {}
    order = {"test": 0, "val": 1, "train": 2, "": 3}
    for row in sorted(images, key=lambda row: order[row["split"]]):
        if row["status"] != "done":
            continue
        kept = first.setdefault(row["digest"], row)
        if kept is row:
            continue
        row |= {"status": "copy", "message": f"the same bytes as {kept['image']}"}
        if row["split"] and kept["split"] != row["split"]:
            pair = f"{row['image']} and {kept['image']}"
            across.setdefault((row["split"], kept["split"]), []).append(pair)
        if kept["class"] != row["class"]:
            log.warning(
                "%s (%s) has the same bytes as %s (%s); the first is left out",
                row["image"],
                row["class"],
                kept["image"],
                kept["class"],
            )
    for (split, other), pairs in across.items():
        log.warning(
            "%d images of %s are copies of images of %s, such as %s; they are left "
            "out of %s",
            len(pairs),
            split,
            other,
            pairs[0],
            split,
        )


def _set_patients(images: list[Row], patients: str, known: dict[str, str]) -> None:
    try:
        pattern = re.compile(patients)
    except re.error as error:
        raise ConfigError(
            f"patients: {patients!r} is no regular expression: {error}"
        ) from error
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


def _deal_out(
    images: list[Row],
    *,
    given: bool,
    fractions: tuple[float, float, float],
    seed: int,
) -> None:
    """Return a split to every image that has none; with `given` they stay without."""
    good = [row for row in images if row["status"] == "done"]
    if not given and not any(row["split"] for row in images):
        _deal(good, fractions, seed)
    elif not given and not any(row["split"] == "val" for row in images):
        train = fractions[0] / (fractions[0] + fractions[1])
        rest = [row for row in good if row["split"] == "train"]
        _deal(rest, (train, 1 - train, 0.0), seed)
    where: dict[str, set[str]] = {}
    for row in good:
        if row["split"]:
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
    ]
    split_of = split_slides(rows, fractions=fractions, seed=seed)
    for row in images:
        row["split"] = split_of[row["image"]]


# --- place ----------------------------------------------------------------------------


def _sheets(images: list[Row], columns: int) -> Iterator[Row]:
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
                "digest": _digest_of([(row["digest"], row["class"]) for row in part]),
            }


def _size(count: int, columns: int, side: int) -> tuple[int, int]:
    """Return height and width of a sheet of so many images, in pixels."""
    return math.ceil(count / columns) * side, min(count, columns) * side


def _write_sheet(
    sheet: Row, settings: DatasetSettings, out: str
) -> list[tuple[int, int]]:
    """Write a sheet and its labels; give where (y, x) its images are."""
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


def _sheet_row(sheet: Row, settings: DatasetSettings, columns: int) -> Row:
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


def _patches(images: list[Row], settings: DatasetSettings) -> Iterator[Row]:
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
