"""The plan of `medray ingest --side` for images in class folders: `--dry-run`.

All images are looked at, as ingest does first: only then is known which are copies and
which cannot be read, and so who goes to which split. Nothing is written into OUT.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from medray.apps.cores import cores_of, span_of
from medray.datasets import (
    SPLITS,
    TIMEOUT_S,
    ImagesRequest,
    check_dataset,
    deal_images,
    ingested_before,
    write_sheet,
)
from medray.execution import map_rows, settle_executor
from medray.types import Executor, Row


@dataclass(frozen=True, kw_only=True)
class ImagesPlan:
    """What an ingest of images in class folders would do.

    Attributes:
        out: Folder of the dataset; nothing is written there.
        classes: In the order of their label values.
        done: Images that the dataset has already, as it was made by the same request;
            then nothing would be done.
        images: That would be in it.
        splits: One row per split (`split`) with its `images`, their `patients`, and of
            each class `images_NAME`.
        left_out: Why images would be left out that can be read, by their names: they
            are copies, or in no split.
        failed: Why images cannot be read, by their names.
        sheets: That images would be put on, each a slide of the dataset.
        output_bytes: At most, if nothing could be compressed.
        cores: That would work.
        seconds: Least and most time.
    """

    out: str
    classes: tuple[str, ...]
    done: int
    images: int
    splits: list[Row]
    left_out: dict[str, str]
    failed: dict[str, str]
    sheets: int
    output_bytes: int
    cores: int
    seconds: tuple[float, float]

    def __str__(self) -> str:
        lines = [f"classes   {', '.join(self.classes)}"]
        for row in self.splits:
            values = (f"{key} {value}" for key, value in row.items() if key != "split")
            lines.append(f"{row['split']:<9} {', '.join(values)}")
        lines += [f"left out  {name}: {why}" for name, why in self.left_out.items()]
        lines += [f"failed    {name}: {why}" for name, why in self.failed.items()]
        least, most = self.seconds
        lines += [
            f"work      {self.images} images onto {self.sheets} sheets",
            f"time      {least:.0f} to {most:.0f} s on {self.cores} cores",
            f"output    at most {self.output_bytes / 2**20:.1f} MiB",
            f"out       {self.out}: nothing was written",
            f"would put in {self.images} images, {self.done} are done, "
            f"{len(self.left_out)} would be left out, {len(self.failed)} would fail",
        ]
        return "\n".join(lines)


def dry_ingest_images(
    request: ImagesRequest, *, executor: Executor = "auto"
) -> ImagesPlan:
    """Return what an ingest of images would do, without doing it.

    Args:
        request: As `medray.datasets.settle_images` returns it.
        executor: Where it would run: on the cores of this machine, or in one process.

    Raises:
        ConfigError: OUT was made with other settings.
    """
    executor = settle_executor(executor, [image.uri for image in request.images])
    settings, cores = request.settings, cores_of(executor)
    check_dataset(request.out, settings)
    plan = ImagesPlan(
        out=request.out,
        classes=settings.classes.names,
        done=0,
        images=0,
        splits=[],
        left_out={},
        failed={},
        sheets=0,
        output_bytes=0,
        cores=cores,
        seconds=(0.0, 0.0),
    )
    if (before := ingested_before(request.out, request.digest)) is not None:
        return replace(plan, done=before.skipped, failed=before.failed)
    start = time.perf_counter()
    images, sheets = deal_images(
        request,
        lambda function, rows: map_rows(
            function, rows, executor="processes", timeout=TIMEOUT_S, bounded=True
        ),
    )
    looking = (time.perf_counter() - start) * cores_of("ray")
    writing = 0.0
    if sheets:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="medray-") as folder:
            write_sheet(sheets[0], settings, folder)
        writing = (time.perf_counter() - start) / len(sheets[0].images)
    taken = [image for image in images if image.taken and image.split]
    left_out = {
        image.file.image: image.message or "in no split"
        for image in images
        if image.status != "failed" and not (image.taken and image.split)
    }
    work = looking + writing * len(taken)
    pixels = sum(sheet.height * sheet.width for sheet in sheets)
    rows = [(image.split, image.file.class_name, image.file.patient) for image in taken]
    return replace(
        plan,
        images=len(taken),
        splits=_splits(rows, settings.classes.names),
        left_out=left_out,
        failed={
            image.file.image: image.message
            for image in images
            if image.status == "failed"
        },
        sheets=len(sheets),
        output_bytes=pixels * 4 * 4 // 3,
        seconds=span_of((work, work), cores, executor),
    )


def _splits(rows: Sequence[tuple[str, str, str]], classes: Sequence[str]) -> list[Row]:
    """Return one row per split, of (split, class, patient) of each image."""
    found = []
    for split in SPLITS:
        some = [row for row in rows if row[0] == split]
        counts = Counter(name for _, name, _ in some)
        found.append(
            {
                "split": split,
                "images": len(some),
                "patients": len({patient for *_, patient in some}),
            }
            | {f"images_{name}": counts[name] for name in classes}
        )
    return found
