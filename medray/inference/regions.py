"""A region's way in and out: pixels with their halo, and classes as one shard.

What runs in read and write workers; neither torch nor Ray is imported, so that such a
worker starts quickly.

One file, because one process reads and writes a region, and imports only this.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.classes import AnyClass
from medray.geometry import Rectangle, plan_regions, region_windows
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
    Slide,
    check_unchanged,
    opened,
    read_working,
    scanned_bounds,
    tissue_share,
    working_of,
)
from medray.storage import (
    Digests,
    content_digest,
    digests_below,
    files,
    group_attributes,
    ome_zarr,
)
from medray.types import Row, UInt8

Blocks = npt.NDArray[np.bool_]

BLOCK = ome_zarr.PATCH
"""Side in pixels of the blocks that hold tissue or do not; a property of the slide, so
that what is left out does not depend on the regions."""


def read_region(row: Row, settings: RunSettings) -> tuple[Row, UInt8 | None]:
    """Read one region with its halo.

    Args:
        row: The region, as the plan made it.
        settings: Of the run.

    Returns:
        The row with how it went, and (halo height, halo width, 3) uint8 pixels; None
        where there is nothing to predict. What is damaged is listed in the row.

    Raises:
        SlideError: Nothing of it can be read.
        StoreError: The slide's store does not answer.
    """
    start = time.time()
    row, pixels = read_pixels(opened(row), row, settings)
    row = row | {"read_at": start, "read_s": time.time() - start}
    return row, pixels if np.any(row["blocks"]) else None


def read_pixels(slide: Slide, row: Row, settings: RunSettings) -> tuple[Row, UInt8]:
    """Read one region of an open slide, with its halo.

    Args:
        slide: The slide.
        row: The region, as the plan made it.
        settings: Of the run.

    Returns:
        The row, with the blocks that hold tissue and what is `damaged`, and why; and
        (halo height, halo width, 3) uint8 pixels.

    Raises:
        SlideError: Nothing can be read.
    """
    pixels, damaged, why = _read_halo(slide, row, settings)
    if row["tissue_at_reading"]:
        blocks = _tissue_of(pixels, row["height"], row["width"])
        row = row | {"blocks": (blocks & np.asarray(row["blocks"])).tolist()}
    return (row | {"damaged": damaged, "why": why} if damaged else row), pixels


def _read_halo(
    slide: Slide, row: Row, settings: RunSettings
) -> tuple[UInt8, list[list[int]], str]:
    """Read the pixels of every window that a region needs.

    Returns:
        (halo height, halo width, 3) uint8; a slide smaller than a window is continued
        by its mirror image. The unreadable rectangles (y, x, height, width), working
        pixels of the slide, and what is wrong with the first.
    """
    height, width = row["height"], row["width"]
    region = Rectangle(*row["region"])
    stitch = settings.options.prediction.stitch
    halo = region_windows(region, height, width, settings.windows, stitch).halo
    bottom, right = min(halo.bottom, height), min(halo.right, width)
    size = (bottom - halo.y, right - halo.x)
    working = working_of(row)
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
    row: Row, layers: dict[str, UInt8], settings: RunSettings, out: str
) -> Row:
    """Write one region's shards.

    Args:
        row: The region, as it was read.
        layers: `labels` (height, width), and as asked for `probabilities` (classes,
            height, width), `uncertainty` and `disagreement` (height, width); uint8.
            Empty when there was nothing to predict.
        settings: Of the run.
        out: Its folder.

    Returns:
        Its record for the ledger.
    """
    start = time.time()
    region = Rectangle(*row["region"])
    shape = (region.height, region.width)
    unreadable = _unreadable(row, region)
    inside = counted(row, region) & (unreadable == 0)
    labels = np.where(inside, layers.get("labels", np.uint8(0)), np.uint8(0))
    record = _summed_up(row, labels, inside, layers, settings)
    raw = bool(settings.options.clean)
    mask = raw_uri(out, row["slide"]) if raw else mask_uri(out, row["slide"])
    written = [(mask, ome_zarr.write_region(mask, region, labels))]
    if "probabilities" in layers:
        kept = np.where(inside, layers["probabilities"], np.uint8(0))
        uri = probabilities_uri(out, row["slide"])
        written.append((uri, ome_zarr.write_region(uri, region, kept)))
    for layer in settings.layers:
        values = layers.get(layer, np.zeros(shape, np.uint8))
        values = unreadable if layer == "unreadable" else values * inside
        uri = layer_uri(out, row["slide"], layer)
        written.append((uri, ome_zarr.write_region(uri, region, values)))
    record["files"] = digests_below(out, written)
    record["unreadable_px"] = int(unreadable.sum())
    record["write_s"] = time.time() - start
    record["written_at"] = time.time()
    return record


def finish_slide(settings: RunSettings, out: str, row: Row) -> Row:
    """Make what needs the whole mask, and seal it.

    It is cleaned, its pyramid filled, its outlines drawn; files that nobody recorded
    are removed; and the record of the slide is written: see `medray.inference.run`.

    Args:
        settings: Of the run.
        out: Its folder.
        row: The slide's facts, as the plan found them; `records`: of its regions.

    Returns:
        `cleaned_px`, the pixels of each class of a mask that was cleaned, and the
        `merkle_root` of the mask.

    Raises:
        MedrayError: Something of it cannot be read or written, or the slide changed
            while it was read.
    """
    check_unchanged(row)
    found: Row = {}
    slide, classes = row["slide"], settings.classes
    mask = mask_uri(out, slide)
    kept: Digests = {}
    for record in row["records"].values():
        kept |= record["files"]
    if settings.options.clean:
        cleaned = _clean(settings, raw_uri(out, slide), mask, row)
        found["cleaned_px"], digests = cleaned
        kept |= digests_below(out, [(mask, digests)])
    for uri in stores_of(settings, out, slide):
        kept |= digests_below(out, [(uri, ome_zarr.build_pyramid(uri))])
    counts = found.get("cleaned_px")
    if counts is None:
        each = [record["class_px"] for record in row["records"].values()]
        counts = np.sum(each, axis=0, dtype=np.int64) if each else [0] * len(classes)
    areas = [int(count) for count in counts]
    areas[0] = row["height"] * row["width"] - sum(areas[1:])
    roots = {}
    finalized: Digests = {}
    for uri in groups_of(settings, out, slide):
        start = f"{uri[len(out) + 1 :]}/"
        inside = {k[len(start) :]: v for k, v in kept.items() if k.startswith(start)}
        own = areas if uri == mask else None
        digests, roots[uri] = group_attributes.finalize(uri, inside, own)
        finalized |= digests_below(out, [(uri, digests)])
    if settings.options.outlines:
        downsample = group_attributes.read_attributes(mask)["downsample"]
        target = outlines_uri(out, slide)
        # Imported here: few runs need it, and it takes a second to load.
        from medray.inference.outlines import write_outlines

        size = {"height": row["level0_height"], "width": row["level0_width"]}
        bounds = scanned_bounds(row["uri"], **size)
        write_outlines(mask, target, classes, downsample=downsample, bounds=bounds)
        digest = content_digest(files.read_bytes(target))
        finalized[target[len(out) + 1 :]] = digest
    record = {"digest": row["digest"], "regions": row["records"], "files": finalized}
    files.write_json(record_uri(out, slide), record)
    return found | {"merkle_root": roots[mask]}


def _clean(
    settings: RunSettings, raw: str, mask: str, row: Row
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
            if row.get("within"):
                kept = np.where(_within(row, part), kept, np.uint8(0))
            written |= ome_zarr.write_region(mask, part, np.ascontiguousarray(kept))
            counts += np.bincount(kept.ravel(), minlength=classes)
        else:
            counts[0] += part.height * part.width
    return [int(count) for count in counts], written


def _summed_up(
    row: Row, labels: UInt8, inside: Blocks, layers: dict[str, UInt8], settings: Any
) -> Row:
    kept = ("read_at", "read_s", "predict_s", "waited_s", "windows", "why")
    record: Row = {key: row[key] for key in kept if key in row}
    counts = np.bincount(labels.ravel(), minlength=len(settings.classes))
    record["class_px"] = counts.tolist()
    record["predicted_px"] = int(inside.sum())
    if settings.options.prediction.probabilities:
        shares = layers.get("probabilities", np.zeros((len(counts), 0), np.uint8))
        seen = shares[:, inside] if shares.size else shares
        record["p_sum"] = seen.sum(axis=1, dtype=np.int64).tolist()
        record["p_max"] = seen.max(axis=1, initial=0).tolist()
    if settings.options.prediction.quality:
        for layer in ("uncertainty", "disagreement"):
            values = layers.get(layer)
            total = 0 if values is None else int((values * inside).sum(dtype=np.int64))
            record[f"{layer}_sum"] = total
    return record


def counted(row: Row, region: Rectangle) -> Blocks:
    """Return which pixels of a region count: (height, width) bool."""
    ones = np.ones((BLOCK, BLOCK), dtype=bool)
    whole = np.kron(np.asarray(row["blocks"], dtype=bool), ones)
    inside: Blocks = whole[: region.height, : region.width]
    return inside & _within(row, region) if row.get("within") else inside


def _within(row: Row, region: Rectangle) -> Blocks:
    """Return which pixels of a region lie in the areas to stay within."""
    # Imported here: few runs need them, and they take a second to load.
    from medray.annotations import rasterise

    size = (row["level0_height"], row["level0_width"])
    drawn: UInt8 = rasterise(
        areas_within(row["within"], row["uri"], row["fingerprint"], *size),
        AnyClass(),
        y=region.y,
        x=region.x,
        height=region.height,
        width=region.width,
        downsample=row["downsample"],
    )
    return drawn > 0


@functools.lru_cache(maxsize=4)
def areas_within(
    uri: str, slide: str, fingerprint: str, height: int, width: int
) -> list[Any]:
    """Read the areas to stay within; their classes do not matter.

    They are kept at hand; the fingerprint, that of slide and annotation, tells a
    replaced file apart.
    """
    from medray.annotations import read_areas

    return read_areas(uri, height=height, width=width, classes=AnyClass(), slide=slide)


def _unreadable(row: Row, region: Rectangle) -> UInt8:
    """Return where a region could not be read: (height, width) of 0 and 1."""
    layer = np.zeros((region.height, region.width), np.uint8)
    for y, x, height, width in row.get("damaged", ()):
        rows = slice(max(0, y - region.y), max(0, y + height - region.y))
        layer[rows, max(0, x - region.x) : max(0, x + width - region.x)] = 1
    return layer
