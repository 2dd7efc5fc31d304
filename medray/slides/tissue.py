"""Where there is tissue: Otsu on saturation at a coarse level.

The glass of a slide is nearly grey, stained tissue is not. Pen marks are saturated too,
but of colours that haematoxylin and eosin never make, and are taken out first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medray.slides.base import Slide
from medray.slides.thumbnail import read_thumbnail
from medray.types import UInt8

Bool = npt.NDArray[np.bool_]

# Below this saturation (of 255) nothing is tissue, even by Otsu: it splits the
# noise of a slide without tissue too.
_MIN_SATURATION = 18
# If even the faintest pixels are above this there is no glass, only tissue.
_ALL_TISSUE = 30


def pen_marks(rgb: UInt8) -> Bool:
    """Find ink of marker pens: blue, green and black.

    H&E never has green above both red and blue, nor blue far above a weak red with
    much saturation, nor large areas of near black.

    Args:
        rgb: (H, W, 3) uint8.

    Returns:
        (H, W) bool.
    """
    # Imported by who looks for tissue: it takes a quarter of a second.
    from scipy import ndimage

    red, green, blue = (rgb[..., i].astype(np.int16) for i in range(3))
    is_green = (green > red + 12) & (green > blue + 4)
    is_blue = (blue > red + 60) & (green > red - 10)
    is_black = np.maximum(np.maximum(red, green), blue) < 70
    ink = is_green | is_blue | is_black
    size = max(3, round(min(rgb.shape[:2]) / 128) | 1)
    ink = ndimage.binary_opening(ink, np.ones((3, 3), bool))
    return np.asarray(
        ndimage.binary_dilation(ink, np.ones((size, size), bool)), dtype=bool
    )


def find_tissue(rgb: UInt8) -> Bool:
    """Return the mask of tissue on a thumbnail.

    Args:
        rgb: (H, W, 3) uint8; best at 4 to 16 microns per pixel.

    Returns:
        (H, W) bool; all False on a blank slide.

    Examples:
        >>> from medray.slides import find_tissue
        >>> with medray.open_slide("slides/slide_000.tif") as slide:
        ...     pixels = slide.read(y=0, x=0, height=768, width=640)
        >>> tissue = find_tissue(pixels[::16, ::16])  # 8 microns per pixel
        >>> tissue.shape, bool(tissue.any())
        ((48, 40), True)
    """
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    smooth = ndimage.uniform_filter(rgb, size=(3, 3, 1))
    red, green, blue = (smooth[..., i] for i in range(3))
    high = np.maximum(np.maximum(red, green), blue)
    saturation = high - np.minimum(np.minimum(red, green), blue)
    ink = pen_marks(rgb)
    clean = saturation[~ink]
    if clean.size == 0:
        return np.zeros(rgb.shape[:2], dtype=bool)
    if np.percentile(clean, 2) > _ALL_TISSUE:
        return ~ink
    # Pixels that are all the same have no threshold.
    counts, threshold = np.bincount(clean), 0
    if np.count_nonzero(counts) > 1:
        threshold = threshold_otsu(hist=counts)  # type: ignore[no-untyped-call]
    # Where glass and pale tissue are close, Otsu may fall between pale and dark tissue.
    threshold = int(np.clip(threshold, _MIN_SATURATION, 50))
    tissue = (saturation > threshold) & ~ink
    tissue = ndimage.binary_opening(tissue, np.ones((3, 3), bool))
    closed = ndimage.binary_closing(tissue, np.ones((5, 5), bool))
    return np.asarray(closed & ~ink, dtype=bool)


def tissue_share(
    slide: Slide, height: int, width: int, side: int
) -> npt.NDArray[np.float64]:
    """Return the share of tissue in each block of a slide.

    It depends on the slide alone, never on how it is cut into regions.

    Args:
        slide: Its coarse pixels are read, see `read_thumbnail`.
        height: Height of the slide at the working level, pixels.
        width: Width of the slide at the working level, pixels.
        side: Side of a block, pixels at the working level.

    Returns:
        (ceil(height / side), ceil(width / side)) from 0 to 1; 0 only where neither the
        block nor the thumbnail pixels next to it hold tissue.
    """
    from scipy import ndimage

    # At least 8 thumbnail pixels per block; on small slides enough of them for Otsu.
    most = max(512, 8 * max(height, width) // side)
    thumbnail, _, damaged = read_thumbnail(slide, most)
    # What cannot be read here may be readable at the working level: look there.
    found = find_tissue(thumbnail) | damaged
    tissue = ndimage.binary_dilation(found, np.ones((3, 3), bool))
    rows = np.arange(0, height, side) * tissue.shape[0] // height
    columns = np.arange(0, width, side) * tissue.shape[1] // width

    def total(pixels: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        by_row = np.add.reduceat(pixels.astype(np.float64), rows, axis=0)
        return np.asarray(np.add.reduceat(by_row, columns, axis=1))

    return total(tissue) / total(np.ones_like(tissue))
