"""What the viewer shows of a slide: tiles of its pixels, mask, truth and differences.

A view has zooms: at zoom 0 the whole slide fits into one tile, at the last one a pixel
of a tile is a pixel of the slide's level 0. In between a pixel of a tile spans `step`
= 2^k level-0 pixels a side. Tile (y, x) begins at pixel (256 y, 256 x) of its zoom.

    level 0 of the slide   0 1 2 3 4 5 6 7 …
    step 2                  0   1   2   3  …

Nothing here knows of HTTP or of the run's folder.
"""

from __future__ import annotations

import functools
import io
import math
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from medray.classes import Classes, rgb_of
from medray.errors import SlideError
from medray.evaluation.ground_truth import nearest_labels, read_known, read_truth
from medray.geometry import Rectangle
from medray.slides import Slide, open_slide, read_thumbnail
from medray.slides.fingerprint import slide_digest, slide_fingerprint
from medray.slides.readable import read_readable
from medray.slides.thumbnail import block_means
from medray.storage import ome_zarr
from medray.types import UInt8

TILE = 256
"""Side of a tile, pixels."""
KINDS = ("nothing", "correct", "wrongly marked", "missed", "another class")
"""What `differences` tells of a pixel, by value."""
STRIDES = 5
"""A mask whose coarse levels are yet to be built is shown down to 1 / 2^5."""

# What one tile may read of a level; a slide without coarse levels needs more when it is
# seen as a whole, and then tiles are cut from one small picture of it.
_MOST_READ = 4096**2
_OVERVIEW = 2048
_MOST_SQUARES = 20
UNSURE = "#008b8b"
"""Colour of what is uncertain: neither of the stains has it."""
_ONE_AT_A_TIME = threading.Lock()  # a page asks for many of its tiles at once
_BESIDE = (238, 241, 243)  # the background of the page
_DAMAGED = (214, 204, 204)
_LINE = 2  # half the width of an outline, pixels


@dataclass(frozen=True)
class SlideSource:
    """Where everything lies that can be seen of a slide; empty where it is not.

    Attributes:
        slide: Its id.
        uri: The file.
        fingerprint: Of the file when it was planned.
        digest: Likewise.
        height: Level-0 pixels of the slide.
        width: Likewise.
        mpp: Microns per level-0 pixel; None when nobody knows.
        mask: OME-Zarr of the classes.
        mask_step: Level-0 pixels of the slide a pixel of the mask, a side.
        mask_shape: (height, width) of the mask.
        coarsest: The coarsest level of the mask that is filled.
        probabilities: OME-Zarr of the class probabilities.
        uncertainty: OME-Zarr of the mask's quality layer of that name.
        truth: Annotation file, or OME-Zarr of labels.
        kind: Which of the two: annotation or labels.
        version: Another one, other pixels.
        scene: Which of several slides in the file, if the user chose.
        plane: Which of several focal planes, likewise.
    """

    slide: str
    uri: str
    fingerprint: str
    digest: str
    height: int
    width: int
    mpp: float | None
    mask: str = ""
    mask_step: float = 1.0
    mask_shape: tuple[int, int] = (0, 0)
    coarsest: int = 99
    probabilities: str = ""
    uncertainty: str = ""
    truth: str = ""
    kind: str = ""
    version: str = ""
    scene: int | None = None
    plane: int | None = None


# --- geometry -------------------------------------------------------------------------


def last_zoom(height: int, width: int) -> int:
    """Return the zoom at which a pixel of a tile is a pixel of level 0."""
    return max(0, math.ceil(math.log2(max(height, width) / TILE)))


def tile_region(
    source: SlideSource, zoom: int, y: int, x: int
) -> tuple[Rectangle, int]:
    """Return what a tile shows, in its own pixels, and its step.

    Returns:
        The tile's rectangle as far as the slide reaches, and how many level-0 pixels
        each of its pixels spans, a side.

    Raises:
        LookupError: There is no such tile.
    """
    last = last_zoom(source.height, source.width)
    if not 0 <= zoom <= last:
        raise LookupError(f"there are zooms 0 to {last}, found {zoom}")
    step = 1 << (last - zoom)
    height, width = -(-source.height // step), -(-source.width // step)
    if not (0 <= y < -(-height // TILE) and 0 <= x < -(-width // TILE)):
        raise LookupError(
            f"zoom {zoom} has {-(-height // TILE)} x {-(-width // TILE)} tiles, there "
            f"is none at row {y}, column {x}"
        )
    top, left = y * TILE, x * TILE
    size = (min(TILE, height - top), min(TILE, width - left))
    return Rectangle(top, left, *size), step


def whole_step(downsample: float) -> float:
    """Return what a level is meant to be reduced by: sizes are rounded, 2.0003 is 2."""
    whole = round(downsample)
    return float(whole) if whole and abs(downsample / whole - 1) < 5e-3 else downsample


# --- slide ----------------------------------------------------------------------------


def open_unchanged(source: SlideSource) -> Slide:
    """Open the slide's file, if it is what was planned.

    Raises:
        SlideError: It is gone, damaged, or another one by now.
    """
    if not source.uri:
        raise SlideError(
            f"{source.slide}: the run does not tell yet where its file is; give "
            f"--slides with the folder"
        )
    try:
        now = slide_fingerprint(source.uri)
    except FileNotFoundError as error:
        raise SlideError(
            f"{source.uri}: the slide is gone; if it was moved, give --slides with its "
            f"folder"
        ) from error
    return _opened(
        source.uri, now, source.fingerprint, source.digest, source.scene, source.plane
    )


@functools.lru_cache(maxsize=16)
def _opened(
    uri: str,
    now: str,
    fingerprint: str,
    digest: str,
    scene: int | None,
    plane: int | None,
) -> Slide:
    """Keep the slides at hand open; the fingerprint tells a replaced file apart."""
    # With an annotation that restricts the run, both have its fingerprint and digest
    # behind.
    same = f"{fingerprint} ".startswith(f"{now} ")
    if digest and not same and slide_digest(uri) != digest.partition("+")[0]:
        raise SlideError(
            f"{uri}: the slide changed since the run, its mask would not fit; run "
            f"`medray infer` again, or give --slides with the folder of the original"
        )
    return open_slide(uri, scene=scene, plane=plane)


def slide_tile(slide: Slide, region: Rectangle, step: int) -> UInt8:
    """Read a part of a slide, reduced; what is damaged comes back greyish.

    Args:
        slide: The slide.
        region: In pixels that span `step` level-0 pixels, a side.
        step: As said.

    Returns:
        (height, width, 3) uint8 RGB: of a level that fits its own pixels, else means
        of those of the next finer one.
    """
    steps = [whole_step(level.downsample) for level in slide.levels]
    index = max(i for i, one in enumerate(steps) if one <= step * 1.01 or i == 0)
    scale = step / steps[index]
    if region.height * region.width * scale**2 > _MOST_READ:
        with _ONE_AT_A_TIME:
            # A slide is one by what it is, not by what it holds.
            pixels, factor, _ = _overview(slide)  # type: ignore[arg-type]
        return _reduced(pixels, region, step / factor, Rectangle(0, 0, 0, 0))
    level = slide.levels[index]
    top, left = math.floor(region.y * scale), math.floor(region.x * scale)
    bottom = min(level.height, math.ceil(region.bottom * scale))
    right = min(level.width, math.ceil(region.right * scale))
    if bottom <= top or right <= left:  # a level that is smaller than it should be
        return np.full((region.height, region.width, 3), 255, np.uint8)
    read = Rectangle(top, left, bottom - top, right - left)
    pixels, damaged, _ = read_readable(
        slide, read.y, read.x, read.height, read.width, index
    )
    if damaged:
        pixels = pixels.copy()
    for y, x, height, width in damaged:
        pixels[y : y + height, x : x + width] = _DAMAGED
    return _reduced(pixels, region, scale, read)


@functools.lru_cache(maxsize=4)
def _overview(slide: Any) -> tuple[UInt8, float, npt.NDArray[np.bool_]]:
    return read_thumbnail(slide, _OVERVIEW)


def _reduced(pixels: UInt8, region: Rectangle, scale: float, read: Rectangle) -> UInt8:
    """Average pixels, the first of which is that of `read`, to those of a region."""
    if scale == 1 and pixels.shape[:2] == (region.height, region.width):
        return pixels
    if scale == round(scale) and read.height:  # exact, where resizing rounds twice
        whole = block_means(pixels, round(scale))
        if whole.shape[:2] == (region.height, region.width):
            return whole
    y0, x0 = region.y * scale - read.y, region.x * scale - read.x
    # A level may lack the last row or column, which rounding took.
    y1 = min(region.bottom * scale - read.y, pixels.shape[0])
    x1 = min(region.right * scale - read.x, pixels.shape[1])
    size = (region.width, region.height)
    picture = Image.fromarray(pixels)
    return np.asarray(picture.resize(size, Image.Resampling.BOX, (x0, y0, x1, y1)))


# --- labels ---------------------------------------------------------------------------


def mask_tile(source: SlideSource, region: Rectangle, step: int) -> UInt8:
    """Read the mask: (height, width) uint8 label values.

    Raises:
        MedrayError: The mask is damaged or cannot be read.
    """
    return _layer_tile(source, source.mask, region, step)


def probability_tile(source: SlideSource, region: Rectangle, step: int) -> UInt8:
    """Read the class probabilities: (class, height, width) uint8, 255 is certain.

    Raises:
        MedrayError: They are damaged or cannot be read.
    """
    return _layer_tile(source, source.probabilities, region, step)


def uncertainty_tile(source: SlideSource, region: Rectangle, step: int) -> UInt8:
    """Read the uncertainty: (height, width) uint8, 255 is the most.

    Raises:
        MedrayError: It is damaged or cannot be read.
    """
    return _layer_tile(source, source.uncertainty, region, step)


def _layer_tile(source: SlideSource, uri: str, region: Rectangle, step: int) -> UInt8:
    ratio = step / source.mask_step
    if math.log2(ratio) > source.coarsest + STRIDES:
        shape = (region.height, region.width)  # it would take too much to read
        return np.zeros(shape, np.uint8)
    opened = functools.partial(_level, version=source.version)
    return nearest_labels(
        uri, region, ratio, source.mask_shape, source.coarsest, opened=opened
    )


@functools.lru_cache(maxsize=64)
def _level(uri: str, level: int, version: str) -> ome_zarr.Pixels:
    """Keep levels open: to read their metadata takes longer than to read a tile."""
    return ome_zarr.open_level(uri, level)


def truth_tile(
    source: SlideSource, region: Rectangle, step: int, classes: Classes
) -> UInt8:
    """Draw or read the truth: (height, width) uint8 label values.

    Raises:
        MedrayError: The truth is damaged, or of another slide.
    """
    return read_truth(_truth_row(source, step), region, classes)


def _truth_row(source: SlideSource, step: float) -> dict[str, Any]:
    """Return what `read_truth` wants to know of a slide."""
    row: dict[str, Any] = {
        "truth": source.truth,
        "kind": source.kind,
        "uri": source.uri,
    }
    row["downsample"] = step
    return row | {"level0_height": source.height, "level0_width": source.width}


def difference_tile(
    source: SlideSource, region: Rectangle, step: int, classes: Classes
) -> UInt8:
    """Compare mask and truth: (height, width) uint8, see `KINDS`.

    Where nobody annotated there is no difference.

    Raises:
        MedrayError: One of them is damaged, or of another slide.
    """
    row = _truth_row(source, step)
    mask, truth = mask_tile(source, region, step), read_truth(row, region, classes)
    kinds, known = differences(mask, truth), read_known(row, region, classes)
    return kinds if known is None else kinds * known


def truth_outlines(
    source: SlideSource, region: Rectangle, step: int, classes: Classes
) -> UInt8:
    """Draw the outlines of the truth: (height, width) uint8, 0 off the lines.

    Raises:
        MedrayError: The truth is damaged, or of another slide.
    """
    # What lies around the tile decides about lines at its border.
    top, left = max(0, region.y - _LINE), max(0, region.x - _LINE)
    bottom = min(region.bottom + _LINE, -(-source.height // step))
    right = min(region.right + _LINE, -(-source.width // step))
    around = Rectangle(top, left, bottom - top, right - left)
    lines = outlines(truth_tile(source, around, step, classes))
    return lines[region.slices(origin=around)]


def outlines(labels: UInt8) -> UInt8:
    """Keep the labels (h, w) only where another one is at most two pixels away."""
    size = 2 * _LINE + 1
    low = ndimage.minimum_filter(labels, size, mode="nearest")
    high = ndimage.maximum_filter(labels, size, mode="nearest")
    return np.where(low != high, labels, 0).astype(np.uint8)


def differences(mask: UInt8, truth: UInt8) -> UInt8:
    """Tell where a mask is right and wrong: (h, w) uint8, see `KINDS`."""
    kinds = np.zeros(mask.shape, np.uint8)
    kinds[(mask == truth) & (truth > 0)] = 1
    kinds[(mask > 0) & (truth == 0)] = 2
    kinds[(mask == 0) & (truth > 0)] = 3
    kinds[(mask > 0) & (truth > 0) & (mask != truth)] = 4
    return kinds


def worst_regions(
    source: SlideSource, classes: Classes, *, side: int = 512
) -> list[dict[str, float]]:
    """Find the squares of a slide in which most is wrong, or least certain.

    What is wrong is told by the truth; without one the uncertainty counts. Both are
    taken at a coarse level, of at most some 2000 pixels a side.

    Args:
        source: With a mask, and a truth or uncertainty.
        classes: Names by label value.
        side: Of a square, in pixels of the mask.

    Returns:
        `y`, `x`, `height` and `width` in level-0 pixels, and the share of their pixels
        that is `wrong`, or else how `uncertain` they are, from 0 to 1 (the mean); the
        worst first, 20 at most.

    Raises:
        MedrayError: The mask, the truth or the uncertainty is damaged.
    """
    coarse = 0
    while max(source.mask_shape) >> coarse > _OVERVIEW:
        coarse += 1
    height, width = (math.ceil(n / 2**coarse) for n in source.mask_shape)
    whole = Rectangle(0, 0, height, width)
    uri = source.mask if source.truth else source.uncertainty
    found = nearest_labels(uri, whole, 2**coarse, source.mask_shape, source.coarsest)
    if not source.truth:
        return _squares(found / 255, "uncertain", side, coarse, source.mask_step)
    row = _truth_row(source, source.mask_step * 2**coarse)
    wrong = (found != read_truth(row, whole, classes)).astype(np.float64)
    known = read_known(row, whole, classes)
    if known is not None:
        wrong *= known
    return _squares(wrong, "wrong", side, coarse, source.mask_step)


def _squares(
    values: npt.NDArray[np.float64], name: str, side: int, coarse: int, mask_step: float
) -> list[dict[str, float]]:
    """Return the squares with the highest sums, each with its mean as `name`."""
    height, width = values.shape
    block, step = max(8, side >> coarse), mask_step * 2**coarse
    sums = np.add.reduceat(values, np.arange(0, height, block), axis=0)
    sums = np.add.reduceat(sums, np.arange(0, width, block), axis=1)
    order = np.argsort(-sums, axis=None, kind="stable")[:_MOST_SQUARES]
    found = []
    for y, x in np.transpose(np.unravel_index(order, sums.shape)).tolist():
        if sums[y, x]:
            size = (min(block, height - y * block), min(block, width - x * block))
            found.append(
                {
                    "y": y * block * step,
                    "x": x * block * step,
                    "height": size[0] * step,
                    "width": size[1] * step,
                    name: float(sums[y, x]) / (size[0] * size[1]),
                }
            )
    return found


# --- pictures -------------------------------------------------------------------------


def as_jpeg(pixels: UInt8, *, side: int = 0) -> bytes:
    """Write (h, w, 3) uint8 RGB as JPEG, filled up to `side` pixels like the page."""
    height, width = (max(side, n) for n in pixels.shape[:2])
    whole = np.full((height, width, 3), _BESIDE, np.uint8)
    whole[: pixels.shape[0], : pixels.shape[1]] = pixels
    buffer = io.BytesIO()
    # Without chroma subsampling: it washes out the edges of nuclei.
    Image.fromarray(whole).save(buffer, "JPEG", quality=85, subsampling=0)
    return buffer.getvalue()


def as_overlay(values: UInt8, colors: Sequence[str], shown: Collection[int]) -> bytes:
    """Write (h, w) uint8 as a PNG tile: a colour a value, the rest transparent.

    Args:
        values: At most 256 x 256.
        colors: #rrggbb by value.
        shown: The values to be seen.
    """
    tile = np.zeros((TILE, TILE), np.uint8)
    tile[: values.shape[0], : values.shape[1]] = values
    picture = Image.fromarray(tile, "P")
    picture.putpalette([n for color in colors for n in rgb_of(color)])
    alpha = bytes(255 if value in shown else 0 for value in range(len(colors)))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", transparency=alpha, compress_level=3)
    return buffer.getvalue()


def as_heat(shares: UInt8, colors: Sequence[str], shown: Collection[int]) -> bytes:
    """Write probabilities as a PNG tile: the likeliest class, opaque where certain.

    Args:
        shares: (class, h, w) uint8, 255 is certain; at most 256 x 256.
        colors: #rrggbb by class.
        shown: The classes to be seen.
    """
    tile = np.zeros((TILE, TILE, 4), np.uint8)
    classes = [value for value in sorted(shown) if value < len(shares)]
    if classes and shares.ndim == 3:
        part = shares[classes]
        table = np.array([rgb_of(colors[value]) for value in classes])
        height, width = part.shape[1:]
        tile[:height, :width, :3] = table[part.argmax(axis=0)]
        tile[:height, :width, 3] = part.max(axis=0)
    buffer = io.BytesIO()
    Image.fromarray(tile).save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()
