"""What the viewer shows of a slide: where all of it lies, and tiles of its pixels.

A view has zooms: at zoom 0 the whole slide fits into one tile, at the last one a pixel
of a tile is a pixel of the slide's level 0. In between a pixel of a tile spans `step`
= 2^k level-0 pixels per side. Tile (y, x) begins at pixel (256 y, 256 x) of its zoom.

    level 0 of the slide   0 1 2 3 4 5 6 7 …
    step 2                  0   1   2   3  …

Nothing here knows of HTTP or of the run's folder.
"""

from __future__ import annotations

import functools
import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from medray.errors import SlideError
from medray.geometry import Rectangle
from medray.slides import (
    Slide,
    block_means,
    open_slide,
    read_readable,
    read_thumbnail,
    slide_digest,
    slide_fingerprint,
)
from medray.types import UInt8

TILE = 256
"""Side of a tile, pixels."""

# What one tile may read of a level; a slide without coarse levels needs more when it is
# seen as a whole, and then tiles are cut from one small picture of it.
_MOST_READ = 4096**2
OVERVIEW = 2048
_ONE_AT_A_TIME = threading.Lock()  # a page asks for many of its tiles at once
_DAMAGED = (214, 204, 204)


@dataclass(frozen=True)
class SlideSource:
    """Where everything lies that can be seen of a slide; empty where it is not.

    Attributes:
        slide: Its id.
        uri: The file.
        fingerprint: Of the file when it was planned.
        digest: Of the file when it was planned.
        height: Height of the slide, level-0 pixels.
        width: Width of the slide, level-0 pixels.
        mpp: Microns per level-0 pixel; None when not known.
        mask: OME-Zarr of the classes.
        mask_step: Level-0 pixels of the slide per pixel of the mask, per side.
        mask_shape: (height, width) of the mask.
        coarsest: The coarsest level of the mask that is filled.
        probabilities: OME-Zarr of the class probabilities.
        uncertainty: OME-Zarr of the mask's quality layer of that name.
        truth: Annotation file, or OME-Zarr of labels.
        kind: Which of the two: annotation or labels.
        version: Another one, other pixels.
        scene: Which of several slides in the file, if the user chose.
        plane: Which of several focal planes, if the user chose.
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
    """Keep recently used slides open; the fingerprint identifies a replaced file."""
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
    return read_thumbnail(slide, OVERVIEW)


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
