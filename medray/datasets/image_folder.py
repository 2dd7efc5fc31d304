"""Images in class folders -> a dataset of contact sheets.

The way of an image, top to bottom:

    find     FOLDER/CLASS/IMAGE, or FOLDER/SPLIT/CLASS/IMAGE (find_images)
    check    its digest, and whether it can be read: processes that may die of it
             (image_readers)
    split    of equal images one is taken; patients stay together (split_images)
    write    images of one split side by side, each resized into a patch of its own
             (contact_sheets)

A sheet is a slide of the dataset as any other, in which each image is just one patch,
and the patch's labels are all of the image's class: training and inference go the way
that they go with slides.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from medray.datasets.contact_sheets import patch_row, sheet_row, write_sheet
from medray.datasets.dataset import (
    images_uri,
    morphology_uri,
    open_dataset,
    write_morphology,
    write_patches,
)
from medray.datasets.images import CheckedImage
from medray.datasets.images_request import (
    TIMEOUT_S,
    ImagesRequest,
    deal_images,
    settle_images,
)
from medray.errors import MedrayError, StoppedError
from medray.execution import Progress, map_rows, settle_executor, stopping
from medray.storage import files, locked
from medray.types import Columns, Executor, Row


@dataclass(frozen=True)
class Images:
    """The result of an ingest of images in class folders.

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

    def __str__(self) -> str:
        return (
            f"out     {self.out}\n"
            f"{self.images} images done, {self.skipped} done before, "
            f"{self.copies} copies left out, {len(self.failed)} failed, "
            f"{self.seconds:.1f} s"
        )


def ingest_images(
    folder: str,
    *,
    out: str,
    side: int,
    classes: tuple[str, ...] = (),
    patients: str = "",
    groups: str | None = None,
    splits: str | None = None,
    ignore_unknown: bool = False,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    contours: bool = False,
    mpp: float | None = None,
    executor: Executor = "auto",
) -> Images:
    """Turn images in class folders into a dataset to train a classifier on.

    Images whose bytes are there twice count once, those of `test` before those of
    `val` and `train`, so that no image is in two splits. The same command again does
    nothing, unless images or what was said of them have changed; then the dataset is
    made again.

    Args:
        folder: Holds one folder per class, or folders train, val or test with them.
        out: Folder of the dataset; made if needed.
        side: Of images in class folders: side to resize them to, pixels. A multiple of
            32.
        classes: Names by label value; by default the folders' names in their order.
            Of two classes the second is the one that is looked for.
        patients: Regular expression that finds the patient in an image's name. Its
            first group, if it has one. Without it, an image is a patient.
        groups: CSV (slide,group) with patients by image instead.
        splits: CSV (slide,split) that says train, val or test of each image itself.
            Images that it does not name are left out.
        ignore_unknown: Leave out rows of the tables that name no image. Without it they
            are refused.
        fractions: Shares of train, val and test; where the folders say which images
            are test, the share of val is taken from train.
        seed: Decides the splits.
        contours: Measure nucleus and cytoplasm by SIPaKMeD's .dat contours. For
            classifiers that take this with the pixels, see
            medray.annotations.morphology.
        mpp: Microns per pixel of the images, for those measures; None: in pixels.
        executor: On the Ray of RAY_ADDRESS, in processes here, or in this one (local).
            `auto`: Ray, but processes where no cluster is named and the files are few.

    Raises:
        ConfigError: The request is wrong, a class has no image, OUT was made with
            other settings, or another process works there.
        StoppedError: SIGTERM or Ctrl-C.
    """
    request = settle_images(
        folder,
        out=out,
        side=side,
        classes=classes,
        patients=patients,
        groups=groups,
        splits=splits,
        ignore_unknown=ignore_unknown,
        fractions=fractions,
        seed=seed,
        contours=contours,
        mpp=mpp,
    )
    with locked(request.out, "ingest") as check:
        open_dataset(request.out, request.settings)
        if (before := ingested_before(request.out, request.digest)) is not None:
            return before
        uris = [image.uri for image in request.images]
        return _ingest(request, settle_executor(executor, uris), check)


def ingested_before(out: str, request: str) -> Images | None:
    """Return the result of an earlier ingest, if it was made by the same request.

    Args:
        out: Folder of the dataset.
        request: Its digest.
    """
    if not files.exists(images_uri(out)):
        return None
    table = files.read_table(images_uri(out))
    if (table.schema.metadata or {}).get(b"request") != request.encode():
        return None
    done = _counted(out, table.to_pylist(), 0.0)
    return Images(out, 0, done.images, done.copies, done.failed, 0.0)


def _counted(out: str, rows: Sequence[Row], seconds: float) -> Images:
    """Return the counts of the images of images.parquet."""
    failed = {r["image"]: r["message"] for r in rows if r["status"] == "failed"}
    done = sum(row["status"] == "done" for row in rows)
    return Images(out, done, 0, len(rows) - done - len(failed), failed, seconds)


def _ingest(
    request: ImagesRequest, executor: Executor, check: Callable[[], None]
) -> Images:
    """Check the images, split them and write the sheets; the tables come last."""
    out, settings = request.out, request.settings
    if executor == "ray":
        # Imported here: with it comes Ray. A cluster that is not there costs nothing.
        from medray.execution import cluster

        cluster.connect()
    start = time.perf_counter()
    tables = (images_uri(out), morphology_uri(out))
    others = ("patches.parquet", "slides.parquet", "slides")
    for place in (*tables, *(files.join(out, name) for name in others)):
        files.remove(place)  # of other images
    with stopping() as asked:

        def go_on() -> None:
            check()
            if asked.signal:
                raise StoppedError(asked.signal, "nothing of it is kept")

        def map_them[R](
            function: Callable[[R], Any], rows: Iterable[R]
        ) -> Iterator[tuple[R, Any]]:
            return map_rows(
                function,
                rows,
                executor=executor,
                check=go_on,
                timeout=TIMEOUT_S,
                bounded=True,
            )

        images, sheets = deal_images(request, map_them)
        with Progress("ingest", len(sheets)) as progress:
            write = functools.partial(write_sheet, settings=settings, out=out)
            for sheet, result in map_them(write, sheets):
                if isinstance(result, Exception):
                    raise MedrayError(f"{sheet.slide}: {result}") from result
                progress.slide(sheet.slide, "done")
    placed = [one for sheet in sheets for one in sheet.images]
    placed.sort(key=lambda one: one.image.file.image)
    write_patches(out, [patch_row(one, settings) for one in placed])
    rows = [sheet_row(sheet) for sheet in sheets]
    files.write_table(files.join(out, "slides.parquet"), pa.Table.from_pylist(rows))
    if request.features:
        measured = [(one.image.file.image, one.image.features) for one in placed]
        write_morphology(out, request.features, measured)
    rows = [_image_row(image) for image in images]
    table = pa.Table.from_pylist(rows)
    table = table.replace_schema_metadata({"request": request.digest})
    files.write_table(images_uri(out), table)
    return _counted(out, rows, time.perf_counter() - start)


def _image_row(image: CheckedImage) -> Columns:
    """Return the row of an image for images.parquet."""
    return {
        "image": image.file.image,
        "class": image.file.class_name,
        "patient": image.file.patient,
        "split": image.split,
        "digest": image.digest,
        "status": image.status,
        "message": image.message,
    }
