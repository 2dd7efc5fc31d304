"""Slide quality control: focus, pen marks, folds, air bubbles and too little tissue.

Measured on a thumbnail at about 8 um per pixel, where tissue, ink, folds and bubbles
are seen, and on at most 32 fields of 256 um at about 0.5 um per pixel, where focus is.
It needs no model, and its memory and time do not grow with the slide. The faults are
those that HistoQC (Janowczyk et al. 2019, doi:10.1200/CCI.18.00157) and GrandQC (Weng
et al. 2024, doi:10.1038/s41467-024-54769-y) look for; docs/nights.md says how well
these measures find them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from skimage.measure import label, regionprops

from medray.slides.base import Slide
from medray.slides.readable import read_readable
from medray.slides.stains import HED
from medray.slides.thumbnail import block_means, read_thumbnail
from medray.slides.tissue import find_tissue
from medray.types import UInt8

Bool = npt.NDArray[np.bool_]
Float = npt.NDArray[np.float32]

_UNKNOWN_MPP = 0.5  # of level 0, for sizes only
_THUMBNAIL_UM = 8.0
_THUMBNAIL_SIDES = (256, 3072)  # pixels, at least and at most

_FIELDS, _FIELD_UM, _FIELD_MPP = 32, 256.0, 0.5
_FIELD_TISSUE = (0.5, 0.1)  # share of a field; the second where none has the first
_MOST_READ_PX = 2048  # a side, of a field
# Standard deviations of the Gaussians whose differences are a fine and a coarse band.
_FINE_UM, _COARSE_UM = (0.5, 1.0), (2.0, 4.0)
_LEAST_CONTRAST = 0.004  # optical density; of flat fields nobody sees the focus
BLURRED = 0.5
"""A field with less focus is blurred: about a Gaussian blur of 1 um or more."""

_PEN_UM = 60.0  # narrower is no stroke of a marker
_INK_SMOOTH_UM = 10.0  # nuclei under ink are no holes in it
_FOLD_AROUND_UM, _FOLD_TIMES = 1000.0, 1.5
_FOLD_UM = (24.0, 300.0)  # width, at least and at most
_FOLD_OBLONG = 2.5
_FOLD_SMOOTH_UM, _LEAST_STAIN = 6.0, 0.05  # optical density
_BUBBLE_RIM_UM, _BUBBLE_UM = 60.0, 100.0  # widest rim, smallest diameter
_HOLLOW, _ROUND = 0.6, 0.88  # share of a bubble within its rim; least solidity
_BLACK = 3.0  # optical density; all that is darker is without colour in 8 bits


@dataclass(frozen=True)
class Quality:
    """What slide quality control measures of a slide.

    Attributes:
        tissue_share: Tissue, of the slide's pixels.
        tissue_mm2: Its area; None where nobody knows the microns per pixel.
        focus: Median over fields of tissue of the fine structure per coarse structure
            (see `field_focus`): about 1 where it is sharp. None: no field to judge.
        blurred_share: Fields whose focus is below `BLURRED`, of those that were judged.
        pen_share: Ink of marker pens (blue, green, red, black), of tissue and ink.
        fold_share: Bands where the tissue lies double, of the tissue.
        bubble_share: Within the rims of air bubbles, of tissue and bubbles.
        stain_distance: From the staining of the training slides, in their spreads; None
            where it is not compared (nights with `--reference` do).
        fields: How many fields were judged.
    """

    tissue_share: float
    tissue_mm2: float | None
    focus: float | None
    blurred_share: float | None
    pen_share: float
    fold_share: float
    bubble_share: float
    stain_distance: float | None = None
    fields: int = 0


def measure_quality(slide: Slide, mpp: float | None = None) -> Quality:
    """Measure a slide for quality control.

    Args:
        slide: Its coarse pixels are read, and up to 32 fields.
        mpp: Microns per pixel of level 0; None: as the slide says. Where that does not
            say either, sizes are taken as if it were 0.5.

    Raises:
        SlideError: It cannot be read.
    """
    known = mpp or slide.mpp
    mpp = known or _UNKNOWN_MPP
    longest = max(slide.levels[0].height, slide.levels[0].width)
    side = int(np.clip(longest * mpp / _THUMBNAIL_UM, *_THUMBNAIL_SIDES))
    rgb, factor, damaged = read_thumbnail(slide, side)
    um = mpp * factor  # per pixel of the thumbnail
    density = _densities(rgb)
    ink = find_ink(rgb, um)
    bubbles = find_bubbles(density, ink, um)
    tissue = find_tissue(rgb) & ~damaged & ~ink
    folds = find_folds(density, tissue, ink | damaged, um)
    tissue |= folds
    focus = _fields_focus(slide, tissue & ~folds & ~bubbles, factor, mpp)
    return Quality(
        tissue_share=float(tissue.mean()),
        tissue_mm2=float(tissue.sum()) * um**2 / 1e6 if known else None,
        focus=float(np.median(focus)) if focus else None,
        blurred_share=float(np.mean(np.array(focus) < BLURRED)) if focus else None,
        pen_share=_share(ink, tissue | ink),
        fold_share=_share(folds, tissue),
        bubble_share=_share(bubbles, tissue | bubbles),
        fields=len(focus),
    )


def _share(part: Bool, whole: Bool) -> float:
    return float(part.sum() / max(1, whole.sum()))


def _densities(rgb: UInt8) -> Float:
    """Return the optical densities (H, W, 3) float32 of pixels."""
    densities: Float = -np.log(np.maximum(rgb, 1).astype(np.float32) / 255)
    return densities


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


# --- focus ----------------------------------------------------------------------------


def field_focus(
    rgb: UInt8, tissue: Bool | None = None, mpp: float = 0.5
) -> float | None:
    """Return how sharp a field is: its fine structure per coarse structure.

    The standard deviation of the optical density in the band between Gaussians of 0.5
    and 1 um, by that between 2 and 4 um. The spectra of tissue, as of most natural
    images, fall with the square of the frequency, so that both are about the same where
    the field is sharp (Field 1987, doi:10.1364/JOSAA.4.002379), whatever the contrast
    of the stain; blur takes the fine structure and leaves the coarse. The variance of
    the Laplacian (Pech-Pacheco et al. 2000, doi:10.1109/ICPR.2000.903548) follows the
    contrast as well.

    Args:
        rgb: (H, W, 3) uint8.
        tissue: (H, W) bool, what counts; None: all.
        mpp: Microns per pixel, best 0.5 or less.

    Returns:
        About 1 where it is sharp, 0.5 with a Gaussian blur of 1 um, 0.15 with one of
        3 um; None of a field without structure.
    """
    grey = _densities(rgb).mean(axis=2)

    def band(deviations_um: tuple[float, float]) -> float:
        inner, outer = (ndimage.gaussian_filter(grey, um / mpp) for um in deviations_um)
        found = inner - outer
        return float((found if tissue is None else found[tissue]).std())

    coarse = band(_COARSE_UM)
    return band(_FINE_UM) / coarse if coarse > _LEAST_CONTRAST else None


def _fields_focus(slide: Slide, tissue: Bool, factor: float, mpp: float) -> list[float]:
    """Return the focus of fields spread over the tissue of a thumbnail."""
    finer = [
        i
        for i, level in enumerate(slide.levels)
        if level.downsample * mpp <= 1.2 * _FIELD_MPP
    ]
    index = finer[-1] if finer else 0
    level = slide.levels[index]
    level_mpp = level.downsample * mpp
    reduce = max(1, int(1.2 * _FIELD_MPP / level_mpp))
    side = min(round(_FIELD_UM / level_mpp), _MOST_READ_PX, level.height, level.width)
    spanned = max(1, round(side * level.downsample / factor))
    found = []
    for y, x in _choose_fields(tissue, spanned):
        top, left = (
            min(round(at * factor / level.downsample), most - side)
            for at, most in ((y, level.height), (x, level.width))
        )
        pixels, damaged, _ = read_readable(slide, top, left, side, side, index)
        if damaged:
            continue
        rgb = block_means(pixels, reduce)
        part = tissue[y : y + spanned, x : x + spanned]
        rows = np.arange(rgb.shape[0]) * part.shape[0] // rgb.shape[0]
        columns = np.arange(rgb.shape[1]) * part.shape[1] // rgb.shape[1]
        focus = field_focus(rgb, part[np.ix_(rows, columns)], level_mpp * reduce)
        if focus is not None:
            found.append(focus)
    return found


def _choose_fields(tissue: Bool, side: int) -> list[tuple[int, int]]:
    """Return the first pixels of up to 32 squares with much tissue, spread evenly."""
    height, width = tissue.shape
    ys, xs = (range(0, max(1, n - side + 1), side) for n in (height, width))
    shares = {
        (y, x): float(tissue[y : y + side, x : x + side].mean()) for y in ys for x in xs
    }
    for least in _FIELD_TISSUE:
        fields = [place for place, share in shares.items() if share >= least]
        if fields:
            chosen = np.linspace(0, len(fields) - 1, min(_FIELDS, len(fields)))
            return [fields[i] for i in chosen.round().astype(int)]
    return []


# --- on the thumbnail -----------------------------------------------------------------


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
    density = _densities(rgb)
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
    does. (Bautista and Yagi 2009, doi:10.1109/IEMBS.2009.5334529, find folds by
    saturation and darkness, as HistoQC does.)

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

    The rim of a bubble refracts light out of the objective, whatever its colour: it
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
    return kept[numbers]
