"""Slide quality control: focus, pen marks, folds, air bubbles and too little tissue.

Measured on a thumbnail at about 8 um per pixel, where tissue, ink, folds and bubbles
are seen, and on at most 32 fields of 256 um at about 0.5 um per pixel, where focus is.
It needs no model, and its memory and time do not grow with the slide. The faults are
those that HistoQC (Janowczyk et al. 2019, JCO Clinical Cancer Informatics) and GrandQC
(Weng et al. 2024, Nature Communications) look for; docs/nights.md says how well these
measures find them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medray.slides.artefacts import densities, find_bubbles, find_folds, find_ink
from medray.slides.base import Slide
from medray.slides.readable import read_readable
from medray.slides.thumbnail import block_means, read_thumbnail
from medray.slides.tissue import find_tissue
from medray.types import UInt8

Bool = npt.NDArray[np.bool_]

_UNKNOWN_MPP = 0.5  # of level 0, for sizes only
_THUMBNAIL_UM = 8.0
_THUMBNAIL_SIDES = (256, 3072)  # pixels, at least and at most

_FIELDS, _FIELD_UM, _FIELD_MPP = 32, 256.0, 0.5
_FIELD_TISSUE = (0.5, 0.1)  # share of a field; the second where none has the first
_MOST_READ_PX = 2048  # a side, of a field
# Standard deviations of the Gaussians whose differences are a fine and a coarse band.
_FINE_UM, _COARSE_UM = (0.5, 1.0), (2.0, 4.0)
_LEAST_CONTRAST = 0.004  # optical density; flat fields show no focus
BLURRED = 0.6
"""A field with less focus is blurred: by a Gaussian of about 1 um or more."""


@dataclass(frozen=True)
class Quality:
    """What slide quality control measures of a slide.

    Attributes:
        tissue_share: Tissue, of the slide's pixels.
        tissue_mm2: Its area; None where the microns per pixel are not known.
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
    density = densities(rgb)
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
    return float(part.sum()) / max(1.0, float(whole.sum()))


# --- focus ----------------------------------------------------------------------------


def field_focus(
    rgb: UInt8, tissue: Bool | None = None, mpp: float = 0.5
) -> float | None:
    """Return how sharp a field is: its fine structure per coarse structure.

    The standard deviation of the optical density in the band between Gaussians of 0.5
    and 1 um, by that between 2 and 4 um. The spectra of tissue, as of most natural
    images, fall with the square of the frequency, so that both are about the same where
    the field is sharp (Field 1987, J. Opt. Soc. Am. A 4), for any contrast
    of the stain; blur takes the fine structure and leaves the coarse. The variance of
    the Laplacian (Pech-Pacheco et al. 2000, ICPR) follows the
    contrast as well.

    Args:
        rgb: (H, W, 3) uint8.
        tissue: (H, W) bool, what counts; None: all.
        mpp: Microns per pixel, best 0.5 or less.

    Returns:
        About 1 where it is sharp, 0.5 with a Gaussian blur of 1 um, 0.15 with one of
        3 um; None of a field without structure.
    """
    grey = densities(rgb).mean(axis=2)

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
