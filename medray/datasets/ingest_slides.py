"""Slides and annotations -> a dataset that training reads straight from.

The way of a slide, top to bottom:

    plan     its size, tissue and annotation; the empty OME-Zarr; one row per region
    cut      a region is read, labelled and written: one shard of pixels, one of labels;
             of a slide annotated in part only patches that lie within are listed
    commit   the driver notes the region and its patches; with the last one the
             pyramids are built and the slide is done
    split    slides go to train, val and test, never two of one patient apart, nor
             two of the same scan

Plan, cut and commit are in `medray.datasets.patches`.
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
    """Turn slides and their annotations into a dataset of zarr-tiled patches.

    Running the same command again finishes what is missing; slides that are done and
    have not changed are skipped. Slides of the dataset that the request does not name
    stay, and so do the splits of all that had one; both is warned of.

    Args:
        slides: Files, globs, folders, s3:// or gs:// addresses.
        out: Folder of the dataset; made if needed.
        annotations: Folder of SVG, GeoJSON, ASAP or ImageScope XML or mask images,
            named like their slides.
        classes: Names by label value, the background first.
        mpp: Microns per pixel of level 0, instead of the files', or CSV (slide,mpp).
        scene: Which of several slides in a file, from 0 in the file's order.
        plane: Which of several focal planes, from 0.
        groups: CSV (slide,group): slides of one group (patient) stay in one split.
            Where the group is blank a slide is one by itself.
        splits: CSV (slide,split) that says train, val or test itself. Slides that it
            does not name are in none.
        ignore_unknown: Leave out rows of the tables that name no slide. Without it they
            are refused.
        fractions: Shares of slides in train, val and test.
        seed: Decides the splits.
        remove_missing: Take slides that are not named out of OUT, with their pixels.
        executor: On the Ray of RAY_ADDRESS, in processes here, or in this one (local).
            `auto`: Ray, but processes where no cluster is named and the files are few.

    Raises:
        ConfigError: The request is wrong, OUT was made with other settings, or another
            process works there.

    Examples:
        >>> dataset = medray.ingest(
        ...     ["slides"],
        ...     annotations="annotations",
        ...     fractions=(0.5, 0.25, 0.25),
        ...     out="patches",
        ...     executor="local",
        ... )
        >>> dataset.done, dataset.failed
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
        kept = note_request(request.out, request.dealt_by)
        gone = take_stock(request.slides, request.out, remove=remove_missing)
        executor = settle_executor(executor, [file.uri for file in request.slides])
        done = ingest_settled(request, executor, check)
    done = replace(done, warnings=(*kept, *gone, *done.warnings))
    for said in done.warnings:
        log.warning("%s", said)
    return done


def ingest_settled(
    request: IngestRequest, executor: Executor, check: Callable[[], None]
) -> Summary:
    """Ingest what is missing of a request, in a dataset that is open and locked."""
    # The regions of all slides become patches.parquet at the end.
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
        row.setdefault("split", earlier.get(slide))  # of a slide that was replaced
    rows = [row for row in ledger.slides.values() if row["status"] == "done"]
    warnings = assign_splits(rows, request)
    for row in rows:
        ledger.commit_slide(row)
    _write_patches(out, ledger)
    ledger.close()
    return replace(summary, warnings=tuple(warnings))


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
    """Write one row per patch of all finished slides, new ones and those of before."""
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
        patches += [common | patch | {"split": row["split"]} for patch in found]
    write_patches(out, patches)
