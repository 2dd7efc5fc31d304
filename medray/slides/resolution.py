"""The working resolution of a slide, and reading at that resolution."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medray.errors import SlideError
from medray.slides.base import Mpp, Slide
from medray.slides.readable import read_readable
from medray.types import Columns, UInt8

if TYPE_CHECKING:
    from scipy import sparse

# Training augments sizes by more than this, so no resampling is worth its blur.
_TOLERANCE = 1.15
_SAME_MPP = 0.01
MOST_ENLARGED = 2.0
"""Finer detail than the scanner saw cannot be invented."""


@dataclass(frozen=True)
class Working:
    """The working level of a slide.

    Attributes:
        level: The slide's level that is read.
        scale: How many of its pixels one working pixel spans, a side; 1: as it is.
        height: Working pixels.
        width: Working pixels.
        downsample: How many level-0 pixels one working pixel spans, a side.
        mpp: Microns per working pixel; None when not known.
        note: What the user should know ("" if nothing).
    """

    level: int
    scale: float
    height: int
    width: int
    downsample: float
    mpp: float | None
    note: str = ""


def working_of(row: dict[str, Any]) -> Working:
    """Return the working level of a slide's or region's row."""
    names = ("level", "scale", "height", "width", "downsample", "mpp")
    return Working(**{name: row[name] for name in names})


MPP_COLUMNS = ("mpp_x", "mpp_y", "mpp_from")
"""The columns of a slide's row for the microns per pixel of its level 0."""


def settle_mpp(slide: Slide, given_mpp: float | None) -> tuple[Mpp | None, str]:
    """Decide on the microns per pixel of level 0.

    Args:
        slide: The slide.
        given_mpp: What the user says, which overrules the file; None: nothing.

    Returns:
        None where they are not known; and a note where the file is overruled.

    Raises:
        SlideError: The file's pixels are not square, and the user says nothing.
    """
    found = slide.resolution
    if given_mpp is None:
        if found is not None and not found.is_square:
            raise SlideError(
                f"{slide.uri}: its pixels are {found.x:g} um wide and {found.y:g} um "
                f"high by its {found.source}, expected square ones; resample it, or "
                f"give --mpp if the file is wrong"
            )
        return found, ""
    given = Mpp(given_mpp, given_mpp, "--mpp")
    if found is None or (found.is_square and abs(found.x / given_mpp - 1) < _SAME_MPP):
        return given, ""
    return given, f"--mpp {given_mpp:g} overrules the file's {found}"


def mpp_columns(mpp: Mpp | None) -> Columns:
    """Return the `MPP_COLUMNS` of a slide's row."""
    values = (mpp.x, mpp.y, mpp.source) if mpp else (None, None, "")
    return dict(zip(MPP_COLUMNS, values, strict=True))


def choose_level(
    slide: Slide, target_mpp: float | None, given_mpp: float | None
) -> Working:
    """Choose how to read a slide at the model's microns per pixel.

    A level within 15 % is taken as it is. Otherwise the coarsest level that is finer is
    averaged down; where all are coarser, level 0 is enlarged, at most twice.

    Args:
        slide: The slide.
        target_mpp: Microns per pixel of the model; None: level 0, at any resolution.
        given_mpp: Microns per pixel of level 0, which override the file's.

    Raises:
        SlideError: The size of its pixels is not known, or the slide is too coarse for
            the model.
    """
    settled, said = settle_mpp(slide, given_mpp)
    mpp = settled.x if settled else None
    if target_mpp is None:
        return _working(slide, 0, 1.0, mpp, said)
    if mpp is None:
        raise SlideError(
            f"{slide.uri}: does not say how many microns a pixel has, and the model "
            f"works at {target_mpp:g}; give --mpp, a number or a CSV with the columns "
            f"slide and mpp"
        )
    each = [mpp * level.downsample for level in slide.levels]
    off = [abs(math.log(value / target_mpp)) for value in each]
    best = off.index(min(off))
    if off[best] <= math.log(_TOLERANCE):
        return _working(slide, best, 1.0, mpp, said)
    finer = [level for level, value in enumerate(each) if value < target_mpp]
    level = finer[-1] if finer else 0
    scale = target_mpp / each[level]
    if scale < 1 / MOST_ENLARGED:
        found = ", ".join(f"{value:.3g}" for value in each)
        raise SlideError(
            f"{slide.uri}: the model works at {target_mpp:g} um per pixel, the slide's "
            f"levels have {found} ({settled.source if settled else ''}), too coarse "
            f"to enlarge; give --mpp if that is wrong, or train a model at one of these"
        )
    how = "averaged down from" if scale > 1 else "enlarged from"
    note = f"{how} {each[level]:.3g} to {target_mpp:g} um per pixel"
    return _working(slide, level, scale, mpp, "; ".join(filter(None, [said, note])))


def _working(
    slide: Slide, level: int, scale: float, mpp: float | None, note: str
) -> Working:
    chosen = slide.levels[level]
    height = max(1, round(chosen.height / scale))
    width = max(1, round(chosen.width / scale))
    downsample = chosen.downsample * scale
    working_mpp = None if mpp is None else mpp * downsample
    note = "; ".join(filter(None, [slide.note, note]))
    return Working(level, scale, height, width, downsample, working_mpp, note)


def read_working(
    slide: Slide, working: Working, y: int, x: int, height: int, width: int
) -> tuple[UInt8, list[tuple[int, int, int, int]], str]:
    """Read a rectangle in working pixels; what cannot be read comes back white.

    A working pixel is computed from the same level pixels in the same order for every
    rectangle that holds it, so that regions agree to the bit.

    Args:
        slide: The slide.
        working: From `choose_level`.
        y: First row, working pixels.
        x: First column.
        height: Rows.
        width: Columns.

    Returns:
        (height, width, 3) uint8 RGB; the unreadable rectangles (y, x, height, width)
        in working pixels, relative to the first pixel; and what is wrong with the first
        ("" if nothing).
    """
    if working.scale == 1.0:
        return read_readable(slide, y, x, height, width, working.level)
    level = slide.levels[working.level]
    down, (top, bottom) = _weights(y, height, working.scale, level.height)
    across, (left, right) = _weights(x, width, working.scale, level.width)
    size = (bottom - top, right - left)
    pixels, damaged, why = read_readable(slide, top, left, *size, working.level)
    wide: Any = pixels.reshape(size[0], -1).astype(np.float32)
    tall: Any = (down @ wide).reshape(height, size[1], 3).transpose(1, 0, 2)
    whole: Any = across @ np.ascontiguousarray(tall).reshape(size[1], -1)
    whole = whole.reshape(width, height, 3).transpose(1, 0, 2)
    rounded = np.clip(np.rint(whole), 0, 255).astype(np.uint8)
    scaled = [
        _scaled(rectangle, working.scale, top, left, (y, x, height, width))
        for rectangle in damaged
    ]
    return np.ascontiguousarray(rounded), scaled, why


def _weights(
    first: int, count: int, scale: float, length: int
) -> tuple[sparse.csr_array, tuple[int, int]]:
    """Return the weights of level pixels in working pixels of one axis.

    Averaging down, a working pixel is the mean of the stretch that it spans; enlarging,
    it is interpolated linearly between pixel centres.

    Returns:
        (count, pixels read) float32 weights, and the half-open range of pixels read.
    """
    from scipy import sparse  # imported here: most slides have a fitting level

    index = np.arange(first, first + count, dtype=np.float64)
    if scale > 1:
        begin, end = index * scale, (index + 1) * scale
    else:
        middle = (index + 0.5) * scale
        begin, end = middle - 0.5, middle + 0.5
    low = np.floor(begin).astype(np.int64)
    taps = low[:, None] + np.arange(int(np.ceil(end - begin).max()) + 1)
    share = np.minimum(taps + 1, end[:, None]) - np.maximum(taps, begin[:, None])
    share = np.clip(share, 0, None)
    taps = np.clip(taps, 0, length - 1)
    start, stop = int(taps.min()), int(taps.max()) + 1
    share /= share.sum(axis=1, keepdims=True)
    rows = np.repeat(np.arange(count), taps.shape[1])
    weights = sparse.coo_array(
        (share.ravel().astype(np.float32), (rows, (taps - start).ravel())),
        shape=(count, stop - start),
    ).tocsr()
    weights.sum_duplicates()
    return weights, (start, stop)


def _scaled(
    damaged: tuple[int, int, int, int],
    scale: float,
    top: int,
    left: int,
    wanted: tuple[int, int, int, int],
) -> tuple[int, int, int, int]:
    """Turn a damaged rectangle of level pixels into the working pixels it touches."""
    y, x, height, width = wanted
    y0 = max(0, math.floor((damaged[0] + top) / scale) - y)
    x0 = max(0, math.floor((damaged[1] + left) / scale) - x)
    y1 = min(height, math.ceil((damaged[0] + top + damaged[2]) / scale) - y)
    x1 = min(width, math.ceil((damaged[1] + left + damaged[3]) / scale) - x)
    return y0, x0, max(0, y1 - y0), max(0, x1 - x0)
