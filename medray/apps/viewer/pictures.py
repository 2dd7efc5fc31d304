"""Tiles as JPEG and PNG."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence

import numpy as np
from PIL import Image

from medray.apps.viewer.tiles import TILE
from medray.classes import rgb_of
from medray.types import UInt8

UNSURE = "#008b8b"
"""Colour of what is uncertain: neither of the stains has it."""

_BESIDE = (238, 241, 243)  # the background of the page


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
    """Write (h, w) uint8 as a PNG tile: one colour per value, the rest transparent.

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
