"""Where ink, folds and air bubbles are on a thumbnail of a slide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.measure import label, regionprops

from medray.slides.stains import HED
from medray.types import UInt8

Bool = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float32]

_PEN_UM = 60.0  # narrower is no stroke of a marker
_INK_SMOOTH_UM = 10.0  # nuclei under ink are no holes in it
_FOLD_AROUND_UM, _FOLD_TIMES = 1000.0, 1.5
_FOLD_UM = (24.0, 300.0)  # width, at least and at most
_FOLD_OBLONG = 2.5
_FOLD_SMOOTH_UM, _LEAST_STAIN = 6.0, 0.05  # optical density
_BUBBLE_RIM_UM, _BUBBLE_UM = 60.0, 100.0  # widest rim, smallest diameter
_HOLLOW, _ROUND = 0.6, 0.88  # share of a bubble within its rim; least solidity
_BLACK = 3.0  # optical density; all that is darker is without colour in 8 bits


def densities(rgb: UInt8) -> Float:
    """Return the optical densities (H, W, 3) float32 of pixels."""
    found: Float = -np.log(np.maximum(rgb, 1).astype(np.float32) / 255)
    return found


def find_ink(rgb: UInt8, um: float) -> Bool:
    """Find strokes of marker pens: blue, green, red and black.

    By the ratios of the optical densities: haematoxylin and eosin absorb green most,
    blue much less, and red only haematoxylin does. Black ink absorbs all alike. Where
    blue or red ink lies over tissue it must absorb 2.5 times what the slide's tissue
    does. Blood may look like red ink.

    Args:
        rgb: (H, W, 3) uint8.
        um: Microns per pixel, best 4 to 16.
    """
    density = densities(rgb)
    stained = density[density.mean(axis=2) > 0.1]
    usual = np.median(stained, axis=0) if len(stained) else np.zeros(3)
    red, green, blue = (
        ndimage.gaussian_filter(density[..., i], _INK_SMOOTH_UM / um) for i in range(3)
    )
    high = np.maximum(np.maximum(red, green), blue)
    low = np.minimum(np.minimum(red, green), blue)
    is_blue = (red > 1.15 * green) & (blue < 0.6 * red) & (red > 0.6)
    is_blue |= (
        (red > 0.85 * green)
        & (blue < 0.5 * red)
        & (red > np.maximum(1.3, 2.5 * usual[0]))
    )
    is_green = (green < 0.85 * red) & (blue > 0.75 * green) & (red > 0.6)
    is_red = (blue > 0.82 * green) & (red < 0.35 * green) & (green > 0.9)
    is_red |= (
        (blue > 0.55 * green)
        & (red < 0.35 * green)
        & (blue > np.maximum(1.0, 2.5 * usual[2]))
    )
    is_black = (low > 0.65 * high) & (low > 1.2)
    ink = is_blue | is_green | is_red | is_black
    return _opened(ink, _PEN_UM, um)


def find_folds(density: Float, tissue: Bool, ink: Bool, um: float) -> Bool:
    """Find folds: bands with 1.5 times the haematoxylin and the eosin around them.

    Where tissue lies double both stains double; where cells crowd, only haematoxylin
    does. (Bautista and Yagi 2009, EMBC, find folds by saturation and darkness.)

    Args:
        density: (H, W, 3) optical densities.
        tissue: (H, W) bool; folds that are too dark for tissue are found too.
        ink: (H, W) bool, what is none for certain.
        um: Microns per pixel.
    """
    dark = density.mean(axis=2) > 0.15
    body = (tissue | dark) & ~ink
    stains = HED / np.linalg.norm(HED, axis=1, keepdims=True)
    amounts = np.clip(density @ np.linalg.inv(stains).astype(np.float32), 0, None)
    size = max(3, round(_FOLD_AROUND_UM / um))
    around = np.maximum(ndimage.uniform_filter(tissue.astype(np.float32), size), 1e-3)
    doubled = body
    for amount in (amounts[..., 0], amounts[..., 1]):
        mean = ndimage.uniform_filter(amount * tissue, size) / around
        smooth = ndimage.gaussian_filter(amount, _FOLD_SMOOTH_UM / um)
        doubled = doubled & (smooth > _FOLD_TIMES * np.maximum(mean, _LEAST_STAIN))
    narrow, wide = _FOLD_UM
    doubled = _opened(doubled, narrow, um)
    doubled &= ~_opened(doubled, wide, um)
    return _kept(
        doubled,
        lambda part: (
            part.area * um**2 > 2 * narrow * 100
            and part.axis_major_length > _FOLD_OBLONG * part.axis_minor_length
        ),
    )


def find_bubbles(density: Float, ink: Bool, um: float) -> Bool:
    """Find air bubbles: what thin dark rims without colour enclose.

    The rim of a bubble refracts light out of the objective, for any colour: it
    adds about the same density to red, green and blue, on tissue too.

    Args:
        density: (H, W, 3) optical densities.
        ink: (H, W) bool; circles drawn with a pen are no bubbles.
        um: Microns per pixel.
    """
    low, high = density.min(axis=2), density.max(axis=2)
    rim = (low > 0.5 * high) & (low > 0.2) & (high < _BLACK)
    rim &= ~_grown(ink, _PEN_UM, um)
    rim &= ~_opened(rim, _BUBBLE_RIM_UM, um)
    # Gaps of some pixels are closed.
    wide = ndimage.binary_closing(np.pad(rim, 3), np.ones((3, 3), bool), 2)
    closed = wide[3:-3, 3:-3]
    filled = ndimage.binary_fill_holes(closed)
    hollow = filled & ~closed
    found = _opened(filled, _BUBBLE_RIM_UM, um)

    def is_bubble(part: Any) -> bool:
        inside = hollow[part.slice][part.image].sum()
        return bool(
            part.area * um**2 > np.pi * (_BUBBLE_UM / 2) ** 2
            and inside > _HOLLOW * part.area
            and part.solidity > _ROUND
        )

    return _kept(found, is_bubble)


def _kept(found: Bool, keep: Callable[[Any], bool]) -> Bool:
    """Return the connected parts that `keep` wants, by their measures."""
    numbers = label(found, connectivity=2)  # type: ignore[no-untyped-call]
    kept = np.zeros(int(numbers.max()) + 1, bool)
    for part in regionprops(numbers):  # type: ignore[no-untyped-call]
        kept[part.label] = keep(part)
    return np.asarray(kept[numbers], dtype=bool)


def _opened(found: Bool, side_um: float, um: float) -> Bool:
    """Return the part into which a square of this side fits, at least 3 pixels."""
    side = max(3, round(side_um / um))
    # A square is a row and a column one after the other, and so much faster. A pixel
    # beyond the edge is as the one at it.
    wide = np.pad(found, side, mode="edge")
    for operation in (ndimage.minimum_filter1d, ndimage.maximum_filter1d):
        # The second is turned around, for a side of even length has no middle.
        origin = 0 if operation is ndimage.minimum_filter1d else (side % 2) - 1
        for axis in (0, 1):
            wide = operation(wide.view(np.uint8), side, axis=axis, origin=origin)
    return wide[side:-side, side:-side].astype(bool)


def _grown(found: Bool, by_um: float, um: float) -> Bool:
    """Return what lies within a square of twice this side around each pixel."""
    size = 2 * max(1, round(by_um / um)) + 1
    return np.asarray(ndimage.maximum_filter(found, size), dtype=bool)
