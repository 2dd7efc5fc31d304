"""A small picture of a whole slide, in bounded memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medray.slides.base import Slide
from medray.slides.readable import read_readable

_BAND_PIXELS = 2**24


def read_thumbnail(
    slide: Slide, max_side: int = 1024
) -> tuple[npt.NDArray[np.uint8], float, npt.NDArray[np.bool_]]:
    """Read a slide reduced by a whole factor, by `block_means`.

    Args:
        slide: Read at the coarsest level that is at least `max_side` long, in bands.
        max_side: Longest side of the picture at most, pixels.

    Returns:
        (h, w, 3) uint8 RGB; how many level-0 pixels one of its pixels spans; and
        (h, w) bool, where something could not be read and is white.
    """
    sides = [max(level.height, level.width) for level in slide.levels]
    fitting = [i for i, side in enumerate(sides) if side >= max_side]
    index = fitting[-1] if fitting else 0
    level = slide.levels[index]
    factor = -(-sides[index] // max_side)
    band = max(1, _BAND_PIXELS // (level.width * factor)) * factor
    parts, damages = [], []
    for y in range(0, level.height, band):
        height = min(band, level.height - y)
        pixels, damaged, _ = read_readable(slide, y, 0, height, level.width, index)
        parts.append(block_means(pixels, factor))
        damages.append(np.zeros(parts[-1].shape[:2], bool))
        for top, left, tall, wide in damaged:
            rows = slice(top // factor, -(-(top + tall) // factor))
            damages[-1][rows, left // factor : -(-(left + wide) // factor)] = True
    factors = level.downsample * factor
    return np.concatenate(parts), factors, np.concatenate(damages)


def block_means(pixels: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """Return the mean of each `factor` x `factor` block, rounded half up.

    Pillow's `Image.reduce` divides in fixed point and truncates: its means are up to
    0.67 too low for blocks of 3 pixels, more than 1 for blocks of 244 x 244.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        factor: Side of a block, pixels. The last blocks of rows and columns may be
            smaller.

    Returns:
        (ceil(H / factor), ceil(W / factor), 3) uint8 RGB.
    """
    if factor == 1:
        return pixels
    width = pixels.shape[1]
    columns = np.arange(0, width, factor)
    widths = np.diff(columns, append=width)[:, None]
    means = []
    for y in range(0, len(pixels), factor):
        rows = pixels[y : y + factor]
        total = rows.sum(axis=0, dtype=np.uint32)
        total = np.add.reduceat(total, columns, axis=0, dtype=np.int64)
        count = len(rows) * widths
        means.append((2 * total + count) // (2 * count))
    return np.stack(means).astype(np.uint8)
