"""Build a dataset from slides and their annotations; training reads it directly.

A slide goes through these steps, the first four in worker processes:

    plan     read its size, find its tissue, load its annotation, list its regions
    create   create its empty OME-Zarr
    read     read a region and draw its labels; list its patches (of a slide that is
             annotated only in part those that lie wholly inside the annotated area)
    write    write one shard of pixels and one of labels
    commit   the main process records the region and its patches in the ledger
    finish   after its last region: build the pyramids; the slide is done
    split    assign slides to train, val and test: slides of one group (patient), and
             copies of the same scan, get the same one

In OUT lie one OME-Zarr per slide, slides.parquet, patches.parquet (where each patch
lies in them) and dataset.yaml. The steps are in `medray.datasets.patches`, the splits
in `medray.datasets.deal_splits`; `medray.execution` runs the steps.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from medray.datasets.dataset import DatasetSettings, open_dataset, write_patches
from medray.datasets.deal_splits import assign_splits, earlier_splits
from medray.datasets.earlier_request import note_request, take_stock
from medray.datasets.ingest_request import IngestRequest, settle_ingest
from medray.datasets.patches import (
    IngestFacts,
    PatchesRecord,
    SeenPatches,
    Share,
    create_slide,
    finish_slide,
    plan_slide,
    read_region,
    slide_row,
    write_region,
)
from medray.execution import Stage, Summary, run_stage, settle_executor
from medray.storage import Ledger, files, locked, slide_key
from medray.types import Executor, Row

log = logging.getLogger(__name__)


def ingest(
    slides: Sequence[str],
    *,
    out: str,
    annotations: str | None = None,
    classes: tuple[str, ...] = ("background", "tumour"),
    mpp: float | str | None = None,
    scene: int | None = None,
    plane: int | None = None,
    groups: str | None = None,
    splits: str | None = None,
    ignore_unknown: bool = False,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    remove_missing: bool = False,
    executor: Executor = "auto",
) -> Summary:
    """Build a dataset from slides: one OME-Zarr per slide, and a table of patches.

    Running the same command again computes what is missing; finished slides that have
    not changed are skipped. Slides that are in the dataset but not in the request are
    kept, and a slide that has a split keeps it unless `splits` names another; a warning
    says so.

    Args:
        slides: Files, globs, folders, s3:// or gs:// addresses.
        out: Folder of the dataset; made if needed.
        annotations: Folder of SVG, GeoJSON, ASAP or ImageScope XML or mask images,
            named like their slides.
        classes: Names by label value, the background first.
        mpp: Microns per pixel of level 0, instead of the file's: a number, or a CSV
            (slide,mpp).
        scene: Which of several slides in a file, from 0 in the file's order.
        plane: Which of several focal planes, from 0.
        groups: CSV (slide,group): slides of one group (patient) stay in one split.
            Where the group is blank a slide is one by itself.
        splits: CSV (slide,split) that assigns train, val or test, instead of
            `fractions`. Slides that it does not name are in none.
        ignore_unknown: Leave out rows of the tables that name no slide. Without it they
            are refused.
        fractions: Shares of slides in train, val and test.
        seed: Decides the splits.
        remove_missing: Take slides that are not named out of OUT, with their pixels.
        executor: On the Ray of RAY_ADDRESS, in processes here, or in this one (local).
            `auto`: Ray, but processes where no cluster is named and the files are few.

    Returns:
        How many slides were done, which failed and why, and warnings.

    Raises:
        ConfigError: The request is wrong, OUT was made with other settings, or another
            process works there.

    Examples:
        >>> summary = medray.ingest(
        ...     ["slides"],
        ...     annotations="annotations",
        ...     fractions=(0.5, 0.25, 0.25),
        ...     out="patches",
        ...     executor="local",
        ... )
        >>> summary.done, summary.failed
        (4, {})
    """
    request = settle_ingest(
        slides,
        out=out,
        annotations=annotations,
        classes=classes,
        mpp=mpp,
        scene=scene,
        plane=plane,
        groups=groups,
        splits=splits,
        ignore_unknown=ignore_unknown,
        fractions=fractions,
        seed=seed,
        remove_missing=remove_missing,
    )
    with locked(request.out, "ingest") as check:
        open_dataset(request.out, request.settings)
        executor = settle_executor(executor, [file.uri for file in request.slides])
        # What was taken out of OUT is logged before the long work, not after it.
        before = [*note_request(request.out, request.dealt_by)]
        before += take_stock(request.slides, request.out, remove=remove_missing)
        _log(before)
        summary = ingest_settled(request, executor, check)
    _log(summary.warnings)
    return replace(summary, warnings=(*before, *summary.warnings))


def _log(warnings: Sequence[str]) -> None:
    for warning in warnings:
        log.warning("%s", warning)


def ingest_settled(
    request: IngestRequest, executor: Executor, check: Callable[[], None]
) -> Summary:
    """Ingest what is missing of a request, in a dataset that is open and locked."""
    # The ledger keeps the regions of finished slides: patches.parquet is made of them.
    out, ledger = request.out, Ledger(request.out, keep_finished=True)
    earlier = earlier_splits(ledger.slides, out)
    summary = run_stage(
        ingest_stage(request.settings, out),
        request.slides,
        ledger,
        annotations=request.annotations,
        executor=executor,
        check=check,
    )
    for slide, row in ledger.slides.items():
        # A slide whose file was replaced has a new row, without the split it had.
        row.setdefault("split", earlier.get(slide))
    rows = [row for row in ledger.slides.values() if row["status"] == "done"]
    warnings = assign_splits(rows, request)  # into rows
    for row in rows:
        ledger.commit_slide(row)
    _write_patches(out, ledger)
    ledger.close()
    return replace(summary, warnings=(*summary.warnings, *warnings))


type IngestStage = Stage[IngestFacts, Share | None, SeenPatches, PatchesRecord, None]


def ingest_stage(settings: DatasetSettings, out: str) -> IngestStage:
    """Return the stage of `medray ingest`."""
    return Stage(
        name="ingest",
        out=out,
        record=PatchesRecord,
        plan=functools.partial(plan_slide, settings=settings),
        create=functools.partial(create_slide, settings=settings, out=out),
        read=functools.partial(read_region, settings=settings),
        write=functools.partial(write_region, settings=settings, out=out),
        finish=functools.partial(finish_slide, out=out),
        slide_row=functools.partial(slide_row, classes=settings.classes),
    )


def _write_patches(out: str, ledger: Ledger) -> None:
    """Write one row per patch of all finished slides, also of earlier runs."""
    uri = files.join(out, "patches.parquet")
    before: dict[str, list[Row]] = {}
    if files.exists(uri):
        for patch in files.read_table(uri).to_pylist():
            before.setdefault(patch["slide"], []).append(patch)
    patches: list[Row] = []
    for slide, row in sorted(ledger.slides.items()):
        if row["status"] != "done":
            continue
        regions = ledger.regions.get(slide_key(slide, row["digest"]), {})
        found = [p for i in sorted(regions) for p in regions[i]["patches"]]
        if not found and row["patches"]:  # finished by an earlier run
            found = before[slide]
        common = {"slide": slide, "split": row["split"], "mpp": row["mpp"]}
        # Twice: first for the order of columns; an old row may have an old split.
        patches += [common | patch | {"split": row["split"]} for patch in found]
    write_patches(out, patches)
