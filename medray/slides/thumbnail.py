"""A small picture of a whole slide, in bounded memory."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medray.slides.slide import Slide

_BAND_PIXELS = 2**24


def read_thumbnail(
    slide: Slide, max_side: int = 1024
) -> tuple[npt.NDArray[np.uint8], float]:
    """Read a slide reduced by a whole factor, each pixel the mean of its block.

    Args:
        slide: Read at the coarsest level that is at least `max_side` long, in bands.
        max_side: Longest side of the picture at most, pixels.

    Returns:
        (h, w, 3) uint8 RGB, and how many level-0 pixels one of its pixels spans.
    """
    sides = [max(level.height, level.width) for level in slide.levels]
    fitting = [i for i, side in enumerate(sides) if side >= max_side]
    index = fitting[-1] if fitting else 0
    level = slide.levels[index]
    factor = -(-sides[index] // max_side)
    band = max(1, _BAND_PIXELS // (level.width * factor)) * factor
    parts = []
    for y in range(0, level.height, band):
        height = min(band, level.height - y)
        pixels = slide.read(y, 0, height, level.width, index)
        parts.append(_mean(pixels, factor))
    return np.concatenate(parts), level.downsample * factor


def _mean(pixels: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """Average blocks of factor x factor pixels; those at the end may be smaller."""
    if factor == 1:
        return pixels
    height, width = pixels.shape[:2]
    rows, columns = np.arange(0, height, factor), np.arange(0, width, factor)
    total = np.add.reduceat(pixels, rows, axis=0, dtype=np.uint32)
    total = np.add.reduceat(total, columns, axis=1)
    sizes = np.diff(rows, append=height)[:, None] * np.diff(columns, append=width)
    mean: npt.NDArray[np.uint8] = (total // sizes[..., None]).astype(np.uint8)
    return mean
