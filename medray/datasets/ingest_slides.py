"""Slides and annotations -> a dataset that training reads straight from.

The way of a slide, top to bottom:

    plan     its size, tissue and annotation; the empty OME-Zarr; a row a region
    cut      a region is read, labelled and written: one shard of pixels, one of labels;
             of a slide annotated in part only patches that lie within are listed
    commit   the driver notes the region and its patches; with the last one the
             pyramids are built and the slide is done
    split    slides go to train, val and test, never two of one patient apart

One file, because plan, cut and commit of a slide pass on one row.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from medray.annotations import Annotation, match_annotations, rasterise, read_marks
from medray.classes import AnyClass, Classes
from medray.datasets.dataset import (
    LABELS,
    DatasetSettings,
    labels_uri,
    open_dataset,
    slide_uri,
    write_patches,
)
from medray.datasets.overrides import with_overrides
from medray.datasets.splits import (
    check_fractions,
    read_groups,
    read_splits,
    split_slides,
)
from medray.errors import SlideError
from medray.execution import Stage, Summary, run_stage
from medray.geometry import Rectangle, plan_regions
from medray.slides import (
    MOST_UNREADABLE,
    MPP_COLUMNS,
    ArraySlide,
    Slide,
    SlideFile,
    check_readable,
    check_unchanged,
    find_slides,
    mpp_columns,
    opened,
    read_readable,
    settle_mpp,
    tissue_share,
)
from medray.storage import (
    Ledger,
    add_note,
    digests_below,
    files,
    group_attributes,
    locked,
    ome_zarr,
    slide_key,
)
from medray.types import Executor, Row, UInt8


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
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    executor: Executor = "ray",
) -> Summary:
    """Turn slides and their annotations into a dataset of zarr-tiled patches.

    Running the same command again finishes what is missing; slides that are done and
    have not changed are skipped.

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
        splits: CSV (slide,split) that says train, val or test itself.
        fractions: Shares of slides in train, val and test.
        seed: Decides the splits.
        executor: On a Ray cluster, or in this process, one thing after the other.

    Raises:
        ConfigError: The request is wrong, OUT was made with other settings, or another
            process works there.
    """
    mpp = files.absolute(mpp) if isinstance(mpp, str) else mpp
    settings = DatasetSettings(classes=Classes(tuple(classes)), mpp=mpp)
    out = files.absolute(out)
    check_fractions(fractions)
    wanted = with_overrides(find_slides(slides), mpp=mpp, scene=scene, plane=plane)
    matched = match_annotations(wanted, annotations)
    group_of = read_groups(groups, "group") if groups else {}
    split_of = read_splits(splits) if splits else None
    with locked(out, "ingest") as check:
        open_dataset(out, settings)
        assign = functools.partial(
            _assign_splits,
            group_of=group_of,
            split_of=split_of,
            fractions=fractions,
            seed=seed,
        )
        return _ingest(wanted, matched, settings, out, assign, executor, check)


def _ingest(
    wanted: list[SlideFile],
    matched: dict[str, str],
    settings: DatasetSettings,
    out: str,
    assign_splits: Callable[[Ledger], None],
    executor: Executor,
    check: Callable[[], None],
) -> Summary:
    # The regions of all slides become patches.parquet at the end.
    ledger = Ledger(out, keep_finished=True)
    summary = run_stage(
        stage_of(settings, out),
        wanted,
        ledger,
        annotations=matched,
        executor=executor,
        check=check,
    )
    assign_splits(ledger)
    _write_patches(out, ledger)
    ledger.close()
    return summary


def stage_of(settings: DatasetSettings, out: str) -> Stage:
    """Return what ingest does with slides."""
    return Stage(
        name="ingest",
        out=out,
        plan=functools.partial(_plan_slide, settings=settings),
        create=functools.partial(_create_slide, settings=settings, out=out),
        read=functools.partial(_read, settings=settings),
        write=functools.partial(_write, settings=settings, out=out),
        finish=functools.partial(_finish, out=out),
        slide_row=_slide_row,
    )


# --- plan -----------------------------------------------------------------------------


def _plan_slide(
    header: Row, slide: Slide, settings: DatasetSettings
) -> tuple[Row, list[Row]]:
    """Return a slide's facts, and its regions that hold tissue or annotation."""
    check_readable(slide)
    height, width = slide.levels[0].height, slide.levels[0].width
    marks = Annotation([], [], ())
    if header["annotation"]:
        marks = _marks(
            header["annotation"],
            header["uri"],
            header["digest"],
            height,
            width,
            settings,
        )
    regions = list(plan_regions(height, width, settings.region))
    # A flat slide of one region is decoded once: its tissue is found when it is read.
    at_cutting = len(regions) == 1 and len(slide.levels) == 1
    share = None
    if not at_cutting:
        share = tissue_share(slide, height, width, settings.patch)
    bounds = [area.polygon.bounds for area in marks.areas]
    rows = []
    for index, region in enumerate(regions):
        part = _patches_of(region, share, settings.patch)
        labelled = any(
            x0 < region.right and x1 > region.x and y0 < region.bottom and y1 > region.y
            for x0, y0, x1, y1 in bounds
        )
        if labelled or part is None or part.any():
            place = [region.y, region.x, region.height, region.width]
            tissue = None if part is None else part.tolist()
            rows.append({"index": index, "region": place, "tissue": tissue})
    facts = {
        "height": height,
        "width": width,
        "magnification": slide.magnification,
        "format": slide.format,
        "annotated": bool(header["annotation"]),
        "partly": bool(marks.extent),
        "areas": len(marks.areas),
        "regions": len(rows),
        "classes": settings.classes.names,
    }
    mpp, said = settle_mpp(slide, header["given_mpp"])
    facts |= {"mpp": mpp.x if mpp else None} | mpp_columns(mpp)
    notes = [*([slide.note] if slide.note else []), *marks.notes]
    if said:
        notes.append(said)
    if mpp is None:
        notes.append("no mpp in the file (give --mpp); unknown to all that follows")
    if notes:
        facts["note"] = "; ".join(notes)
    return facts, rows


def _patches_of(
    region: Rectangle, share: npt.NDArray[np.float64] | None, patch: int
) -> npt.NDArray[np.float64] | None:
    """Return a region's part of the slide's tissue shares by patch."""
    if share is None:
        return None
    rows = slice(region.y // patch, -(-region.bottom // patch))
    return share[rows, region.x // patch : -(-region.right // patch)]


@functools.lru_cache(maxsize=4)
def _marks(
    uri: str,
    slide: str,
    digest: str,
    height: int,
    width: int,
    settings: DatasetSettings,
) -> Annotation:
    """Return what is annotated and where; the digest tells a replaced file apart."""
    return read_marks(
        uri, height=height, width=width, classes=settings.classes, slide=slide
    )


def _create_slide(header: Row, settings: DatasetSettings, out: str) -> None:
    """Make the empty OME-Zarr; it is kept if it is there for this very slide."""
    uri = slide_uri(out, header["slide"])
    attributes = {
        "kind": "slide",
        "slide": header["slide"],
        "digest": header["digest"],
        "format": header["format"],
    }
    size = (header["height"], header["width"])
    ome_zarr.create_image(
        uri, *size, mpp=header["mpp"], name=header["slide"], attributes=attributes
    )
    if header["annotated"]:
        ome_zarr.list_labels(uri, [LABELS])
        ome_zarr.create_labels(
            labels_uri(out, header["slide"]),
            *size,
            mpp=header["mpp"],
            name=LABELS,
            classes=settings.classes,
            attributes=attributes,
            source="../../",
        )


# --- cut ------------------------------------------------------------------------------


def _read(row: Row, settings: DatasetSettings) -> tuple[Row, dict[str, UInt8]]:
    """Read and label one region.

    Returns:
        The row with the tissue of its patches; and `pixels` (height, width, 3),
        `labels` and `known` (height, width; 0: no label is known there), uint8.
    """
    start = time.time()
    region = Rectangle(*row["region"])
    place = {"y": region.y, "x": region.x}
    place |= {"height": region.height, "width": region.width}
    pixels, damaged, why = read_readable(opened(row), **place)
    labels = np.zeros(pixels.shape[:2], np.uint8)
    known = np.ones(pixels.shape[:2], np.uint8)
    if row["annotated"]:
        size = (row["height"], row["width"])
        marks = _marks(row["annotation"], row["uri"], row["digest"], *size, settings)
        labels = rasterise(marks.areas, settings.classes, **place)
        if row["partly"]:
            known = rasterise(marks.extent, AnyClass(), **place)
    # What was never seen is no background: no patch that touches it is listed.
    unreadable = []
    for y, x, height, width in damaged:
        labels[y : y + height, x : x + width] = 0
        known[y : y + height, x : x + width] = 0
        unreadable.append([region.y + y, region.x + x, height, width])
    tissue = row["tissue"]
    if tissue is None:
        size = (region.height, region.width)
        tissue = tissue_share(ArraySlide(pixels), *size, settings.patch).tolist()
    row = row | {"cut_at": start, "tissue": tissue}
    if unreadable:
        row |= {"unreadable": unreadable, "why": why}
    return row, {"pixels": pixels, "labels": labels, "known": known}


def _write(
    row: Row, arrays: dict[str, UInt8], settings: DatasetSettings, out: str
) -> Row:
    """Write what was read of one region; give its record."""
    region = Rectangle(*row["region"])
    uri, pixels = slide_uri(out, row["slide"]), np.moveaxis(arrays["pixels"], 2, 0)
    written = [(uri, ome_zarr.write_region(uri, region, pixels))]
    if row["annotated"]:
        uri = labels_uri(out, row["slide"])
        written.append((uri, ome_zarr.write_region(uri, region, arrays["labels"])))
    labels, known, tissue = arrays["labels"], arrays["known"], row["tissue"]
    record: Row = {name: row[name] for name in ("unreadable", "why") if name in row}
    record["patches"] = [*_count_patches(region, labels, known, tissue, settings)]
    record["files"] = digests_below(out, written)
    seconds = time.time() - row["cut_at"]
    return record | {"cut_at": row["cut_at"], "cut_s": seconds}


def _count_patches(
    region: Rectangle,
    labels: npt.NDArray[np.uint8],
    known: npt.NDArray[np.uint8],
    tissue: list[list[float]],
    settings: DatasetSettings,
) -> Iterator[Row]:
    """Describe each patch whose labels are all known; pixels of level 0."""
    side, count = settings.patch, len(settings.classes)
    for part in plan_regions(region.height, region.width, side):
        if not known[part.slices()].all():
            continue
        share = tissue[part.y // side][part.x // side]
        pixels = np.bincount(labels[part.slices()].ravel(), minlength=count)
        yield {
            "y": region.y + part.y,
            "x": region.x + part.x,
            "height": part.height,
            "width": part.width,
            "tissue": round(float(share), 4),
            "class_px": pixels.tolist(),
        }


def _finish(header: Row, out: str) -> Row:
    """Fill the coarser levels, once all regions are written."""
    check_unchanged(header)
    slide = header["slide"]
    if unreadable := _unreadable(header["records"].values()):
        group_attributes.note_unreadable(slide_uri(out, slide), unreadable)
    ome_zarr.build_pyramid(slide_uri(out, slide))
    if group_attributes.read_attributes(labels_uri(out, slide)):
        ome_zarr.build_pyramid(labels_uri(out, slide))
    return {}


def _unreadable(records: Iterable[Row]) -> list[list[int]]:
    """Return what of a slide could not be read: (y, x, height, width), level 0."""
    return [place for record in records for place in record.get("unreadable", ())]


# --- commit ---------------------------------------------------------------------------

_FACTS = (
    "height",
    "width",
    "mpp",
    *MPP_COLUMNS,
    "magnification",
    "format",
    "annotated",
    "partly",
    "areas",
    "regions",
    "note",
)


def _slide_row(header: Row, regions: list[Row]) -> Row:
    """Sum up a finished slide for slides.parquet.

    Raises:
        SlideError: Too much of it could not be read.
    """
    row: Row = {key: header.get(key) for key in _FACTS}
    if unreadable := _unreadable(regions):
        pixels = sum(height * width for _, _, height, width in unreadable)
        share = pixels / (header["height"] * header["width"])
        why = next(region["why"] for region in regions if "why" in region)
        said = f"{share:.2%} of its pixels cannot be read: {why}"
        if share > MOST_UNREADABLE:
            raise SlideError(f"{header['uri']}: {said}")
        add_note(row, f"{said}; no patch touches them")
        # Its labels are not known all over, as those of a slide annotated in part.
        row["partly"] = row["annotated"]
    patches = [patch for region in regions for patch in region["patches"]]
    counts = np.zeros(len(header["classes"]), np.int64)
    for patch in patches:
        counts += np.asarray(patch["class_px"])
    if not row["partly"]:
        counts[0] += header["height"] * header["width"] - counts.sum()
    if header["annotated"]:
        names = zip(header["classes"], counts.tolist(), strict=True)
        row |= {f"px_{name}": count for name, count in names}
    row["patches"] = len(patches)
    row["cut_s"] = sum(region["cut_s"] for region in regions)
    row["first_cut_at"] = min((r["cut_at"] for r in regions), default=None)
    ends = (region["cut_at"] + region["cut_s"] for region in regions)
    row["last_cut_at"] = max(ends, default=None)
    return row


# --- split ----------------------------------------------------------------------------


def _assign_splits(
    ledger: Ledger,
    group_of: dict[str, str],
    split_of: dict[str, str] | None,
    fractions: tuple[float, float, float],
    seed: int,
) -> None:
    """Assign splits to finished, annotated slides; those that have one keep it."""
    rows = [row for row in ledger.slides.values() if row["status"] == "done"]
    for row in rows:
        row["group"] = group_of.get(row["slide"], row.get("group") or row["slide"])
        present = (key for key in sorted(row) if key.startswith("px_") and row[key])
        row["stratum"] = "+".join(key.removeprefix("px_") for key in present)
    usable = [row for row in rows if row["annotated"]]
    if split_of is None:
        keep = {row["group"]: row["split"] for row in usable if row.get("split")}
        split_of = split_slides(usable, fractions=fractions, seed=seed, keep=keep)
    for row in rows:
        row["split"] = split_of.get(row["slide"], "") if row["annotated"] else ""
        ledger.commit_slide(row)


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
