"""Reading a region's pixels with their halo, and writing its classes as one shard.

What runs in read and write workers; neither torch nor Ray is imported, so that such a
worker starts quickly.

One file, because one process reads and writes a region, and imports only this.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.classes import AnyClass
from medray.execution import PlannedSlide, RegionTask, Timing, as_row
from medray.geometry import Rectangle, plan_regions, region_windows, windows_over
from medray.inference.postprocess import clean_labels
from medray.inference.run import (
    RunSettings,
    groups_of,
    layer_uri,
    mask_uri,
    outlines_uri,
    probabilities_uri,
    raw_uri,
    record_uri,
    stores_of,
)
from medray.slides import (
    ArraySlide,
    Mpp,
    Slide,
    Working,
    check_unchanged,
    opened,
    read_working,
    scanned_bounds,
    tissue_share,
)
from medray.storage import (
    Digests,
    content_digest,
    digests_below,
    files,
    group_attributes,
    ome_zarr,
)
from medray.types import Layers, UInt8

Blocks = npt.NDArray[np.bool_]

BLOCK = ome_zarr.PATCH
"""Side in pixels of the blocks that hold tissue or do not; a property of the slide, so
that what is left out does not depend on the regions."""


@dataclass(frozen=True)
class Within:
    """The areas to stay within.

    Attributes:
        uri: Address of the annotation; the classes of its areas do not matter.
        slide: Address of the slide.
        fingerprint: Sizes and times of both, which distinguish replaced files.
    """

    uri: str
    slide: str
    fingerprint: str


@dataclass(frozen=True)
class SlideFacts:
    """What planning found out about a slide.

    Attributes:
        working: The level that is read; regions are in its pixels.
        mpp: Microns per pixel of level 0; None: not known.
        level0_height: Pixels.
        level0_width: Pixels.
        tissue_at_reading: Whether tissue is found when the only region is read.
        within: The areas to stay within; None: everywhere.
    """

    working: Working
    mpp: Mpp | None
    level0_height: int
    level0_width: int
    tissue_at_reading: bool = False
    within: Within | None = None


@dataclass(frozen=True)
class SeenRegion:
    """What was seen of a region when it was read.

    Attributes:
        blocks: (rows, columns) bool, which blocks of `BLOCK` pixels are predicted.
        damaged: What cannot be read: (y, x, height, width), working pixels.
        why: What is wrong with the first of these; "": nothing.
        read_at: When reading began, seconds since 1970.
        read_s: How long it took.
        windows: How many windows are predicted.
    """

    blocks: Blocks
    damaged: list[list[int]] = field(default_factory=list)
    why: str = ""
    read_at: float = 0.0
    read_s: float = 0.0
    windows: int = 0


@dataclass(frozen=True, kw_only=True)
class RegionRecord:
    """What the ledger keeps of a region; times in seconds.

    Attributes:
        read_at: When reading began, since 1970.
        read_s: How long it took.
        predict_s: How long prediction took; None: there was nothing to predict.
        waited_s: How long the device waited for the pixels; None as for `predict_s`.
        windows: How many windows were predicted.
        why: What could not be read; None: nothing.
        class_px: Pixels of each class.
        predicted_px: Pixels that were looked at.
        p_sum: Sum of each class's probabilities (0..255) over these.
        p_max: The highest of each class.
        uncertainty_sum: Sum of the uncertainty (0..255) over these.
        disagreement_sum: Sum of the disagreement (0 or 1).
        files: Digest of each file by its path below the run.
        unreadable_px: Pixels that could not be read.
        write_s: How long writing took.
        written_at: When it ended.
    """

    read_at: float
    read_s: float
    predict_s: float | None = None
    waited_s: float | None = None
    windows: int = 0
    why: str | None = None
    class_px: list[int]
    predicted_px: int
    p_sum: list[int] | None = None
    p_max: list[int] | None = None
    uncertainty_sum: int | None = None
    disagreement_sum: int | None = None
    files: Digests
    unreadable_px: int = 0
    write_s: float
    written_at: float


@dataclass(frozen=True)
class FinishedMask:
    """The result of finishing a slide.

    Attributes:
        merkle_root: Of its mask's files.
        cleaned_px: Pixels of each class of a mask that was cleaned; None: it was not.
    """

    merkle_root: str
    cleaned_px: list[int] | None = None


InferSlide = PlannedSlide[SlideFacts]
InferRegion = RegionTask[SlideFacts, Blocks]


def read_region(
    task: InferRegion, settings: RunSettings
) -> tuple[SeenRegion, Layers | None]:
    """Read one region with its halo.

    Args:
        task: The region.
        settings: Of the run.

    Returns:
        What was seen of it, and `pixels`, (halo height, halo width, 3) uint8; None
        where there is nothing to predict.

    Raises:
        SlideError: Nothing of it can be read.
        StoreError: The slide's store does not answer.
    """
    start = time.time()
    slide, facts = task.slide.input, task.slide.facts
    pixels = opened(slide.file, slide.fingerprint)
    seen, found = read_pixels(pixels, facts, task.region, task.part, settings)
    seen = replace(seen, read_at=start, read_s=time.time() - start)
    if not seen.blocks.any():
        return seen, None
    wanted = wanted_windows(facts.working, task.region, seen.blocks, settings)
    return replace(seen, windows=int(wanted.sum())), {"pixels": found}


def read_pixels(
    slide: Slide,
    facts: SlideFacts,
    region: Rectangle,
    blocks: Blocks,
    settings: RunSettings,
) -> tuple[SeenRegion, UInt8]:
    """Read one region of an open slide, with its halo.

    Args:
        slide: The slide.
        facts: What the plan found out about it.
        region: Of the plan.
        blocks: Which blocks of it the plan wants.
        settings: Of the run.

    Returns:
        What was seen of it, and (halo height, halo width, 3) uint8 pixels.

    Raises:
        SlideError: Nothing can be read.
    """
    working = facts.working
    pixels, damaged, why = _read_halo(slide, working, region, settings)
    if facts.tissue_at_reading:
        blocks = blocks & _tissue_of(pixels, working.height, working.width)
    return SeenRegion(blocks, damaged, why if damaged else ""), pixels


def wanted_windows(
    working: Working, region: Rectangle, blocks: Blocks, settings: RunSettings
) -> Blocks:
    """Return which windows of a region are predicted, (rows, columns)."""
    size = (working.height, working.width)
    stitch = settings.options.prediction.stitch
    plan = region_windows(region, *size, settings.windows, stitch)
    return windows_over(plan, *size, settings.windows, stitch, blocks, BLOCK)


def _read_halo(
    slide: Slide, working: Working, region: Rectangle, settings: RunSettings
) -> tuple[UInt8, list[list[int]], str]:
    """Read the pixels of every window that a region needs.

    Returns:
        (halo height, halo width, 3) uint8; a slide smaller than a window is continued
        by its mirror image. The unreadable rectangles (y, x, height, width), working
        pixels of the slide, and what is wrong with the first.
    """
    height, width = working.height, working.width
    stitch = settings.options.prediction.stitch
    halo = region_windows(region, height, width, settings.windows, stitch).halo
    bottom, right = min(halo.bottom, height), min(halo.right, width)
    size = (bottom - halo.y, right - halo.x)
    pixels, damaged, why = read_working(slide, working, halo.y, halo.x, *size)
    pad = ((0, halo.bottom - bottom), (0, halo.right - right), (0, 0))
    if np.any(pad):
        pixels = np.pad(pixels, pad, mode="symmetric")
    return pixels, [[halo.y + y, halo.x + x, h, w] for y, x, h, w in damaged], why


def _tissue_of(pixels: UInt8, height: int, width: int) -> Blocks:
    """Find the tissue of a slide that has been read whole."""
    slide = ArraySlide(pixels[:height, :width])
    return np.asarray(tissue_share(slide, height, width, BLOCK) > 0)


def write_region(
    task: InferRegion,
    seen: SeenRegion,
    layers: Layers,
    timing: Timing | None,
    settings: RunSettings,
    out: str,
) -> RegionRecord:
    """Write one region's shards.

    Args:
        task: The region.
        seen: What was seen when it was read.
        layers: `labels` (height, width), and as asked for `probabilities` (classes,
            height, width), `uncertainty` and `disagreement` (height, width); uint8.
            Empty when there was nothing to predict.
        timing: Of the prediction.
        settings: Of the run.
        out: Its folder.
    """
    start = time.time()
    region, slide = task.region, task.slide.slide
    shape = (region.height, region.width)
    unreadable = _unreadable(seen, region)
    inside = counted(task.slide.facts, region, seen.blocks) & (unreadable == 0)
    labels = np.where(inside, layers.get("labels", np.uint8(0)), np.uint8(0))
    raw = bool(settings.options.clean)
    mask = raw_uri(out, slide) if raw else mask_uri(out, slide)
    written = [(mask, ome_zarr.write_region(mask, region, labels))]
    if "probabilities" in layers:
        kept = np.where(inside, layers["probabilities"], np.uint8(0))
        uri = probabilities_uri(out, slide)
        written.append((uri, ome_zarr.write_region(uri, region, kept)))
    for layer in settings.layers:
        values = layers.get(layer, np.zeros(shape, np.uint8))
        values = unreadable if layer == "unreadable" else values * inside
        uri = layer_uri(out, slide, layer)
        written.append((uri, ome_zarr.write_region(uri, region, values)))
    counts = np.bincount(labels.ravel(), minlength=len(settings.classes))
    shares = _sums_of(layers, inside, settings)
    return RegionRecord(
        read_at=seen.read_at,
        read_s=seen.read_s,
        predict_s=timing.predict_s if timing else None,
        waited_s=timing.waited_s if timing else None,
        windows=seen.windows,
        why=seen.why or None,
        class_px=counts.tolist(),
        predicted_px=int(inside.sum()),
        p_sum=shares[0] if shares else None,
        p_max=shares[1] if shares else None,
        uncertainty_sum=_layer_sum("uncertainty", layers, inside, settings),
        disagreement_sum=_layer_sum("disagreement", layers, inside, settings),
        files=digests_below(out, written),
        unreadable_px=int(unreadable.sum()),
        write_s=time.time() - start,
        written_at=time.time(),
    )


def _sums_of(
    layers: Layers, inside: Blocks, settings: RunSettings
) -> tuple[list[int], list[int]] | None:
    """Return the sum and the highest of each class's probabilities, if asked for."""
    if not settings.options.prediction.probabilities:
        return None
    nothing = np.zeros((len(settings.classes), 0), np.uint8)
    shares = layers.get("probabilities", nothing)
    seen = shares[:, inside] if shares.size else shares
    sums = seen.sum(axis=1, dtype=np.int64).tolist()
    return sums, seen.max(axis=1, initial=0).tolist()


def _layer_sum(
    layer: str, layers: Layers, inside: Blocks, settings: RunSettings
) -> int | None:
    if not settings.options.prediction.quality:
        return None
    values = layers.get(layer)
    return 0 if values is None else int((values * inside).sum(dtype=np.int64))


def finish_slide(
    slide: InferSlide,
    records: Mapping[int, RegionRecord],
    settings: RunSettings,
    out: str,
) -> FinishedMask:
    """Make what needs the whole mask, and finalize it.

    It is cleaned, its pyramid filled, its outlines drawn; files that are not recorded
    are removed; and the record of the slide is written: see `medray.inference.run`.

    Raises:
        MedrayError: Something of it cannot be read or written, or the slide changed
            while it was read.
    """
    source, facts = slide.input, slide.facts
    check_unchanged(source.uri, source.annotation, source.fingerprint)
    name, classes = slide.slide, settings.classes
    mask = mask_uri(out, name)
    kept: Digests = {}
    for record in records.values():
        kept |= record.files
    cleaned_px = None
    if settings.options.clean:
        cleaned_px, digests = _clean(settings, raw_uri(out, name), mask, facts)
        kept |= digests_below(out, [(mask, digests)])
    for uri in stores_of(settings, out, name):
        kept |= digests_below(out, [(uri, ome_zarr.build_pyramid(uri))])
    counts: Any = cleaned_px
    if counts is None:
        each = [record.class_px for record in records.values()]
        counts = np.sum(each, axis=0, dtype=np.int64) if each else [0] * len(classes)
    areas = [int(count) for count in counts]
    areas[0] = facts.working.height * facts.working.width - sum(areas[1:])
    roots = {}
    finalized: Digests = {}
    for uri in groups_of(settings, out, name):
        start = f"{uri[len(out) + 1 :]}/"
        inside = {k[len(start) :]: v for k, v in kept.items() if k.startswith(start)}
        own = areas if uri == mask else None
        digests, roots[uri] = group_attributes.finalize(uri, inside, own)
        finalized |= digests_below(out, [(uri, digests)])
    if settings.options.outlines:
        downsample = group_attributes.read_attributes(mask)["downsample"]
        target = outlines_uri(out, name)
        # Imported here: few runs need it, and it takes a second to load.
        from medray.inference.outlines import write_outlines

        size = {"height": facts.level0_height, "width": facts.level0_width}
        bounds = scanned_bounds(slide.uri, **size)
        write_outlines(mask, target, classes, downsample=downsample, bounds=bounds)
        digest = content_digest(files.read_bytes(target))
        finalized[target[len(out) + 1 :]] = digest
    regions = {index: as_row(record) for index, record in records.items()}
    values = {"digest": slide.digest, "regions": regions, "files": finalized}
    files.write_json(record_uri(out, name), values)
    return FinishedMask(roots[mask], cleaned_px)


def _clean(
    settings: RunSettings, raw: str, mask: str, facts: SlideFacts
) -> tuple[list[int], Digests]:
    """Clean a mask part by part; each is read with as much around it as decides."""
    written: Digests = {}
    how, classes = settings.options.clean, len(settings.classes)
    counts = np.zeros(classes, np.int64)
    source = ome_zarr.open_level(raw)
    height, width = source.shape
    for part in plan_regions(height, width, settings.options.region):
        y, x = max(0, part.y - how.reach), max(0, part.x - how.reach)
        rows = slice(y, min(height, part.bottom + how.reach))
        columns = slice(x, min(width, part.right + how.reach))
        around = np.asarray(source[rows, columns])
        if around.any():
            cleaned = clean_labels(around, how, classes)
            kept = cleaned[part.slices(origin=Rectangle(y, x, *around.shape))]
            if facts.within:
                kept = np.where(_drawn(facts, part), kept, np.uint8(0))
            written |= ome_zarr.write_region(mask, part, np.ascontiguousarray(kept))
            counts += np.bincount(kept.ravel(), minlength=classes)
        else:
            counts[0] += part.height * part.width
    return [int(count) for count in counts], written


def counted(facts: SlideFacts, region: Rectangle, blocks: Blocks) -> Blocks:
    """Return which pixels of a region count: (height, width) bool."""
    ones = np.ones((BLOCK, BLOCK), dtype=bool)
    inside: Blocks = np.kron(blocks, ones)[: region.height, : region.width]
    return inside & _drawn(facts, region) if facts.within else inside


def _drawn(facts: SlideFacts, region: Rectangle) -> Blocks:
    """Return which pixels of a region lie in the areas to stay within."""
    # Imported here: few runs need them, and they take a second to load.
    from medray.annotations import rasterise

    assert facts.within is not None
    drawn: UInt8 = rasterise(
        areas_within(facts.within, facts.level0_height, facts.level0_width),
        AnyClass(),
        y=region.y,
        x=region.x,
        height=region.height,
        width=region.width,
        downsample=facts.working.downsample,
    )
    return drawn > 0


@functools.lru_cache(maxsize=4)
def areas_within(within: Within, height: int, width: int) -> list[Any]:
    """Read the areas to stay within.

    Args:
        within: Of which annotation.
        height: Height of the slide's level 0, pixels.
        width: Width of the slide's level 0, pixels.
    """
    from medray.annotations import read_areas

    size = {"height": height, "width": width}
    return read_areas(within.uri, **size, classes=AnyClass(), slide=within.slide)


def _unreadable(seen: SeenRegion, region: Rectangle) -> UInt8:
    """Return where a region could not be read: (height, width) of 0 and 1."""
    layer = np.zeros((region.height, region.width), np.uint8)
    for y, x, height, width in seen.damaged:
        rows = slice(max(0, y - region.y), max(0, y + height - region.y))
        layer[rows, max(0, x - region.x) : max(0, x + width - region.x)] = 1
    return layer
