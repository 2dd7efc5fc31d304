"""Regions as patches of a dataset: planned, read and labelled, written, summed up.

What runs in the processes of `medray ingest`; no Ray is imported.

One file, because plan, cut and commit of a slide pass on one another's values.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medray.annotations import Annotation, rasterise, read_marks
from medray.classes import AnyClass, Classes
from medray.datasets.dataset import (
    LABELS,
    DatasetSettings,
    labels_uri,
    slide_uri,
)
from medray.errors import SlideError
from medray.execution import (
    PlannedRegion,
    PlannedSlide,
    RegionTask,
    SlideInput,
    Timing,
)
from medray.geometry import Rectangle, plan_regions
from medray.slides import (
    MOST_UNREADABLE,
    ArraySlide,
    Mpp,
    Slide,
    check_readable,
    check_unchanged,
    mpp_columns,
    opened,
    read_readable,
    settle_mpp,
    tissue_share,
)
from medray.storage import (
    Digests,
    add_note,
    digests_below,
    group_attributes,
    ome_zarr,
)
from medray.types import Columns, Layers, UInt8


@dataclass(frozen=True)
class IngestFacts:
    """What planning found out about a slide; pixels are those of level 0.

    Attributes:
        height: Pixels.
        width: Pixels.
        mpp: Microns per pixel; None: not known.
        magnification: Of the objective; None: the file does not say.
        format: Of the file.
        annotated: Whether there is an annotation.
        partly: Whether only parts of the slide are annotated.
        areas: How many areas are drawn.
        note: What the user should know; "": nothing.
    """

    height: int
    width: int
    mpp: Mpp | None
    magnification: float | None
    format: str
    annotated: bool
    partly: bool
    areas: int
    note: str


Share = npt.NDArray[np.float64]
"""The share of tissue of each patch, (rows, columns), 0 to 1."""


@dataclass(frozen=True)
class SeenPatches:
    """What was seen of a region when it was read.

    Attributes:
        share: Of its patches.
        unreadable: What cannot be read: (y, x, height, width), pixels of level 0.
        why: What is wrong with the first of these; "": nothing.
        read_at: When reading began, seconds since 1970.
    """

    share: Share
    unreadable: list[list[int]]
    why: str
    read_at: float


@dataclass(frozen=True)
class Patch:
    """A patch whose labels are all known; pixels of level 0.

    Attributes:
        y: Row of its first pixel.
        x: Its column.
        height: Pixels.
        width: Pixels.
        tissue: Its share of tissue, 0 to 1.
        class_px: Pixels of each class.
    """

    y: int
    x: int
    height: int
    width: int
    tissue: float
    class_px: list[int]


@dataclass(frozen=True, kw_only=True)
class PatchesRecord:
    """What the ledger keeps of a region.

    Attributes:
        unreadable: As in `SeenPatches`; None: all could be read.
        why: What is wrong with the first of these.
        patches: In the region.
        files: Digest of each file by its path below the dataset.
        cut_at: When reading began, seconds since 1970.
        cut_s: How long reading, labelling and writing took, seconds.
    """

    unreadable: list[list[int]] | None = None
    why: str | None = None
    patches: list[Patch]
    files: Digests
    cut_at: float
    cut_s: float


IngestSlide = PlannedSlide[IngestFacts]
IngestRegion = RegionTask[IngestFacts, Share | None]


# --- plan -----------------------------------------------------------------------------


def plan_slide(
    source: SlideInput, digest: str, slide: Slide, settings: DatasetSettings
) -> tuple[IngestFacts, list[PlannedRegion[Share | None]]]:
    """Return a slide's facts, and its regions that hold tissue or annotation.

    The share of tissue of a region is None where it is found when it is read.
    """
    check_readable(slide)
    height, width = slide.levels[0].height, slide.levels[0].width
    marks = _marks(source, digest, height, width, settings)
    regions = list(plan_regions(height, width, settings.region))
    # A flat slide of one region is decoded once: its tissue is found when it is read.
    at_cutting = len(regions) == 1 and len(slide.levels) == 1
    share = None
    if not at_cutting:
        share = tissue_share(slide, height, width, settings.patch)
    bounds = [area.polygon.bounds for area in marks.areas]
    planned = []
    for index, region in enumerate(regions):
        part = _patches_of(region, share, settings.patch)
        if _holds_any(region, bounds) or part is None or part.any():
            planned.append(PlannedRegion(index, region, part))
    mpp, overruled = settle_mpp(slide, source.file.mpp)
    notes = [slide.note, *marks.notes, overruled]
    if mpp is None:
        notes.append("no mpp in the file (give --mpp); unknown to all that follows")
    facts = IngestFacts(
        height=height,
        width=width,
        mpp=mpp,
        magnification=slide.magnification,
        format=slide.format,
        annotated=bool(source.annotation),
        partly=bool(marks.extent),
        areas=len(marks.areas),
        note="; ".join(note for note in notes if note),
    )
    return facts, planned


def _patches_of(region: Rectangle, share: Share | None, patch: int) -> Share | None:
    """Return a region's part of the slide's tissue shares by patch."""
    if share is None:
        return None
    rows = slice(region.y // patch, -(-region.bottom // patch))
    return share[rows, region.x // patch : -(-region.right // patch)]


@functools.lru_cache(maxsize=4)
def _marks(
    source: SlideInput, digest: str, height: int, width: int, settings: DatasetSettings
) -> Annotation:
    """Return what is annotated and where; the digest identifies a replaced file."""
    if not source.annotation:
        return Annotation([], [], ())
    return read_marks(
        source.annotation,
        height=height,
        width=width,
        classes=settings.classes,
        slide=source.uri,
    )


def create_slide(slide: IngestSlide, settings: DatasetSettings, out: str) -> None:
    """Make the empty OME-Zarr; it is kept if it is there for this very slide."""
    uri, facts = slide_uri(out, slide.slide), slide.facts
    attributes = {
        "kind": "slide",
        "slide": slide.slide,
        "digest": slide.digest,
        "format": facts.format,
    }
    size = (facts.height, facts.width)
    mpp = facts.mpp.x if facts.mpp else None
    ome_zarr.create_image(uri, *size, mpp=mpp, name=slide.slide, attributes=attributes)
    if facts.annotated:
        ome_zarr.list_labels(uri, [LABELS])
        ome_zarr.create_labels(
            labels_uri(out, slide.slide),
            *size,
            mpp=mpp,
            name=LABELS,
            classes=settings.classes,
            attributes=attributes,
            source="../../",
        )


# --- cut ------------------------------------------------------------------------------


def read_region(
    task: IngestRegion, settings: DatasetSettings
) -> tuple[SeenPatches, Layers]:
    """Read and label one region.

    Returns:
        What was seen of it; and `pixels` (height, width, 3), `labels` and `known`
        (height, width; 0: no label is known there), uint8.
    """
    start = time.time()
    region, slide = task.region, task.slide
    source = opened(slide.input.file, slide.input.fingerprint)
    pixels, damaged, why = read_readable(source, **_place(region))
    labels, known = _label(slide, region, settings)
    # What was never seen is no background: no patch that touches it is listed.
    unreadable = []
    for y, x, height, width in damaged:
        labels[y : y + height, x : x + width] = 0
        known[y : y + height, x : x + width] = 0
        unreadable.append([region.y + y, region.x + x, height, width])
    share = task.part
    if share is None:
        size = (region.height, region.width)
        share = tissue_share(ArraySlide(pixels), *size, settings.patch)
    seen = SeenPatches(share, unreadable, why if unreadable else "", start)
    return seen, {"pixels": pixels, "labels": labels, "known": known}


def _place(region: Rectangle) -> dict[str, int]:
    place = {"y": region.y, "x": region.x}
    return place | {"height": region.height, "width": region.width}


def _label(
    slide: IngestSlide, region: Rectangle, settings: DatasetSettings
) -> tuple[UInt8, UInt8]:
    """Return a region's labels, and where they are known (0: they are not)."""
    size = (region.height, region.width)
    labels, known = np.zeros(size, np.uint8), np.ones(size, np.uint8)
    if slide.facts.annotated:
        size = (slide.facts.height, slide.facts.width)
        marks = _marks(slide.input, slide.digest, *size, settings)
        labels = rasterise(marks.areas, settings.classes, **_place(region))
        if slide.facts.partly:
            known = rasterise(marks.extent, AnyClass(), **_place(region))
    return labels, known


def present_classes(
    slide: IngestSlide, regions: Sequence[Rectangle], settings: DatasetSettings
) -> list[str]:
    """Return the classes of which `slide_row` will count pixels.

    Of the annotation alone, no pixel is read: should some not be readable, it may count
    those of fewer.

    Args:
        slide: The slide, as planned.
        regions: All that were planned.
        settings: Of the dataset.
    """
    facts, names = slide.facts, settings.classes.names
    if not facts.annotated:
        return []
    marks = _marks(slide.input, slide.digest, facts.height, facts.width, settings)
    drawn = {0} | {settings.classes.value(area.class_name) for area in marks.areas}
    bounds = [area.polygon.bounds for area in marks.areas]
    counts = np.zeros(len(names), np.int64)
    for region in sorted(regions, key=lambda one: not _holds_any(one, bounds)):
        labels, known = _label(slide, region, settings)
        side = max(region.height, region.width)
        tissue = np.zeros((-(-side // settings.patch),) * 2)
        for patch in _patches(region, labels, known, tissue, settings):
            counts += np.asarray(patch.class_px)
        if counts[list(drawn)].all():
            break
    if not facts.partly:
        counts[0] += facts.height * facts.width - counts.sum()
    return [name for name, px in zip(names, counts, strict=True) if px]


def _holds_any(
    region: Rectangle, bounds: Iterable[tuple[float, float, float, float]]
) -> bool:
    """Return whether some of the boxes (x0, y0, x1, y1) reach into a region."""
    return any(
        y0 < region.bottom and y1 > region.y and x0 < region.right and x1 > region.x
        for x0, y0, x1, y1 in bounds
    )


def write_region(
    task: IngestRegion,
    seen: SeenPatches,
    arrays: Layers,
    _: Timing | None,
    settings: DatasetSettings,
    out: str,
) -> PatchesRecord:
    """Write what was read of one region."""
    region, slide = task.region, task.slide.slide
    uri, pixels = slide_uri(out, slide), np.moveaxis(arrays["pixels"], 2, 0)
    written = [(uri, ome_zarr.write_region(uri, region, pixels))]
    if task.slide.facts.annotated:
        uri = labels_uri(out, slide)
        written.append((uri, ome_zarr.write_region(uri, region, arrays["labels"])))
    patches = _patches(region, arrays["labels"], arrays["known"], seen.share, settings)
    return PatchesRecord(
        unreadable=seen.unreadable or None,
        why=seen.why or None,
        patches=list(patches),
        files=digests_below(out, written),
        cut_at=seen.read_at,
        cut_s=time.time() - seen.read_at,
    )


def _patches(
    region: Rectangle,
    labels: UInt8,
    known: UInt8,
    tissue: Share,
    settings: DatasetSettings,
) -> Iterator[Patch]:
    """Describe each patch whose labels are all known."""
    side, count = settings.patch, len(settings.classes)
    for part in plan_regions(region.height, region.width, side):
        if not known[part.slices()].all():
            continue
        share = tissue[part.y // side, part.x // side]
        pixels = np.bincount(labels[part.slices()].ravel(), minlength=count)
        yield Patch(
            y=region.y + part.y,
            x=region.x + part.x,
            height=part.height,
            width=part.width,
            tissue=round(float(share), 4),
            class_px=pixels.tolist(),
        )


def finish_slide(
    slide: IngestSlide, records: Mapping[int, PatchesRecord], out: str
) -> None:
    """Fill the coarser levels, once all regions are written."""
    source, name = slide.input, slide.slide
    check_unchanged(source.uri, source.annotation, source.fingerprint)
    if unreadable := _unreadable(records.values()):
        group_attributes.note_unreadable(slide_uri(out, name), unreadable)
    ome_zarr.build_pyramid(slide_uri(out, name))
    if group_attributes.read_attributes(labels_uri(out, name)):
        ome_zarr.build_pyramid(labels_uri(out, name))


def _unreadable(records: Iterable[PatchesRecord]) -> list[list[int]]:
    """Return what of a slide could not be read: (y, x, height, width), level 0."""
    return [place for record in records for place in record.unreadable or ()]


# --- commit ---------------------------------------------------------------------------


def slide_row(
    slide: IngestSlide, records: Sequence[PatchesRecord], _: None, classes: Classes
) -> Columns:
    """Sum up a finished slide for slides.parquet.

    Raises:
        SlideError: Too much of it could not be read.
    """
    facts = slide.facts
    row: Columns = {
        "height": facts.height,
        "width": facts.width,
        "mpp": facts.mpp.x if facts.mpp else None,
        **mpp_columns(facts.mpp),
        "magnification": facts.magnification,
        "format": facts.format,
        "annotated": facts.annotated,
        "partly": facts.partly,
        "areas": facts.areas,
        "regions": slide.regions,
        "note": facts.note or None,
    }
    partly = facts.partly
    if unreadable := _unreadable(records):
        pixels = sum(height * width for _, _, height, width in unreadable)
        share = pixels / (facts.height * facts.width)
        why = next(record.why for record in records if record.why)
        said = f"{share:.2%} of its pixels cannot be read: {why}"
        if share > MOST_UNREADABLE:
            raise SlideError(f"{slide.uri}: {said}")
        add_note(row, f"{said}; no patch touches them")
        # Its labels are not known all over, as those of a slide annotated in part.
        row["partly"] = partly = facts.annotated
    patches = [patch for record in records for patch in record.patches]
    counts = np.zeros(len(classes), np.int64)
    for patch in patches:
        counts += np.asarray(patch.class_px)
    if not partly:
        counts[0] += facts.height * facts.width - counts.sum()
    if facts.annotated:
        named = zip(classes.names, counts.tolist(), strict=True)
        row |= {f"px_{name}": count for name, count in named}
    row["patches"] = len(patches)
    row["cut_s"] = sum(record.cut_s for record in records)
    row["first_cut_at"] = min((record.cut_at for record in records), default=None)
    ends = (record.cut_at + record.cut_s for record in records)
    row["last_cut_at"] = max(ends, default=None)
    return row
