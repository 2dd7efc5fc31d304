"""Slides and annotations -> a dataset that training reads straight from.

The way of a slide, top to bottom:

    plan     its size, tissue and annotation; the empty OME-Zarr; a row a region
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

from medray.annotations import match_annotations
from medray.classes import Classes
from medray.datasets.dataset import (
    DatasetSettings,
    open_dataset,
    write_patches,
)
from medray.datasets.earlier_request import names_of, note_request, take_stock
from medray.datasets.join_tables import Unknown, join_divisions
from medray.datasets.names import names_of_slides
from medray.datasets.overrides import with_overrides
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
from medray.datasets.splits import (
    check_fractions,
    copies_apart,
    joined_groups,
    kept_splits,
    split_slides,
)
from medray.execution import (
    Stage,
    Summary,
    run_stage,
    settle_executor,
)
from medray.slides import (
    SlideFile,
    find_slides,
)
from medray.storage import (
    Ledger,
    files,
    locked,
    slide_key,
)
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
        mpp: Microns per pixel of level 0, over what the files say; or a CSV (slide,mpp)
            with those of some.
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
        executor: Where it runs: Ray, processes of this machine, or this one (local).
            `auto`: Ray, but processes where no cluster is named and the files are few.

    Raises:
        ConfigError: The request is wrong, OUT was made with other settings, or another
            process works there.
    """
    mpp = files.absolute(mpp) if isinstance(mpp, str) else mpp
    settings = DatasetSettings(classes=Classes(tuple(classes)), mpp=mpp)
    out = files.absolute(out)
    check_fractions(fractions)
    found = find_slides(slides)
    before = _ingested_before(out, found)
    unknown: Unknown = "ignore" if ignore_unknown else "refuse"
    wanted = with_overrides(
        found, mpp=mpp, scene=scene, plane=plane, unknown=unknown, known=before
    )
    matched = match_annotations(wanted, annotations)
    group_of, split_of = join_divisions(
        groups,
        splits,
        names_of_slides(wanted),
        unknown=unknown,
        known=names_of_slides(before),
    )
    with locked(out, "ingest") as check:
        open_dataset(out, settings)
        assign = functools.partial(
            _assign_splits,
            group_of=group_of,
            split_of=split_of,
            fractions=fractions,
            seed=seed,
        )
        shares = ",".join(f"{share:g}" for share in fractions)
        dealt = f"fractions {shares} and seed {seed}"
        kept = note_request(out, "--splits" if splits is not None else dealt)
        gone = take_stock(wanted, out, remove=remove_missing)
        executor = settle_executor(executor, [slide.uri for slide in wanted])
        done = _ingest(wanted, matched, settings, out, assign, executor, check)
    done = replace(done, warnings=(*kept, *gone, *done.warnings))
    for said in done.warnings:
        log.warning("%s", said)
    return done


def _ingest(
    wanted: list[SlideFile],
    matched: dict[str, str],
    settings: DatasetSettings,
    out: str,
    assign_splits: Callable[[Ledger], list[str]],
    executor: Executor,
    check: Callable[[], None],
) -> Summary:
    # The regions of all slides become patches.parquet at the end.
    ledger = Ledger(out, keep_finished=True)
    splits = {slide: row.get("split") for slide, row in ledger.slides.items()}
    splits |= _splits_before(out)  # the ledger forgets a slide that changes
    summary = run_stage(
        stage_of(settings, out),
        wanted,
        ledger,
        annotations=matched,
        executor=executor,
        check=check,
    )
    for slide, row in ledger.slides.items():
        row.setdefault("split", splits.get(slide))  # of a slide that was replaced
    warnings = assign_splits(ledger)
    _write_patches(out, ledger)
    ledger.close()
    return replace(summary, warnings=tuple(warnings))


type IngestStage = Stage[IngestFacts, Share | None, SeenPatches, PatchesRecord, None]


def stage_of(settings: DatasetSettings, out: str) -> IngestStage:
    """Return what ingest does with slides."""
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


# --- split ----------------------------------------------------------------------------


def _ingested_before(out: str, wanted: Sequence[SlideFile]) -> list[SlideFile]:
    """Return the slides of an earlier request, which tables may name too."""
    uri = files.join(out, "slides.parquet")
    if not files.exists(uri):
        return []
    asked = {file.slide for file in wanted}
    rows = files.read_table(uri).to_pylist()
    return [
        SlideFile(row["slide"], row.get("uri") or row["slide"])
        for row in rows
        if row["slide"] not in asked
    ]


def _assign_splits(
    ledger: Ledger,
    group_of: dict[str, str],
    split_of: dict[str, str] | None,
    fractions: tuple[float, float, float],
    seed: int,
) -> list[str]:
    """Assign splits to finished, annotated slides; those that have one keep it.

    With `split_of` that are the slides of earlier requests which it does not have.

    Returns:
        Warnings.
    """
    rows = [row for row in ledger.slides.values() if row["status"] == "done"]
    for row in rows:
        group = group_of.get(row["slide"], row.get("group"))
        row["group"] = group or row["slide"]
        present = (key for key in sorted(row) if key.startswith("px_") and row[key])
        row["stratum"] = "+".join(key.removeprefix("px_") for key in present)
    usable = [row for row in rows if row["annotated"]]
    moved = []
    if split_of is None:
        dealt = joined_groups(usable)
        keep = kept_splits(dealt)
        split_of = split_slides(dealt, fractions=fractions, seed=seed, keep=keep)
        moved = [
            f"{row['slide']} from {row['split']} to {split_of[row['slide']]}"
            for row in usable
            if row.get("split") not in (None, "", split_of[row["slide"]])
        ]
    for row in rows:
        split = split_of.get(row["slide"], row.get("split") or "")
        row["split"] = split if row["annotated"] else ""
        ledger.commit_slide(row)
    if not moved:
        return copies_apart(rows)
    return [
        f"{len(moved)} slides change their split, to be with others of their patient "
        f"or with the same scan: {names_of(moved)}"
    ]


def _splits_before(out: str) -> dict[str, str]:
    """Return the split of each slide that has patches from an earlier command."""
    uri = files.join(out, "patches.parquet")
    table = files.read_table(uri) if files.exists(uri) else None
    if table is None or "split" not in table.column_names:
        return {}
    pairs = table.group_by(["slide", "split"]).aggregate([]).to_pylist()
    return {pair["slide"]: pair["split"] for pair in pairs}


def _write_patches(out: str, ledger: Ledger) -> None:
    """Write a row a patch of all finished slides, new ones and those of before."""
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
