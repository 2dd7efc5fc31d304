"""The geometry of inference: regions, windows, halos, cores, blending weights.

Numbers in, numbers out; no pixels, no files. All coordinates are pixels at the
working level, order (y, x).

Windows are a property of the slide alone. Each owns a core, the part of it that is
farthest from its edges; the cores of an axis partition it:

    slide   |-----------------------------------------------|
    windows |=========|       (size; cores lie every `stride` px)
                   |=========|
                         |=========|   ...         |=========|  the last shifted inwards
    cores   |------|------|------|------ ... ------|---------|
    regions |--------------------|-----------------|---------|
    read for the first one:  |---------------------|halo|

Regions only decide who computes what. A region is read with the halo that makes every
window whole that it needs: those whose cores it shares (`crop`), or all that touch it
(`blend`). A window that two regions need is computed for both, from the same pixels:
the mask does not depend on how the slide was cut (design, promise 1). Regions of a
multiple of the stride share no core, so with `crop` no window is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Stitch = Literal["crop", "blend"]
"""How overlapping windows become one mask: each pixel from the window in whose core it
lies, or from the weighted mean of all windows that cover it."""

# Slides of up to so many strides per side are one region; see `window_starts`.
_SMALL = 8


@dataclass(frozen=True)
class Rectangle:
    """A rectangle in pixels: rows y to y+height, columns x to x+width."""

    y: int
    x: int
    height: int
    width: int

    @property
    def bottom(self) -> int:
        """The row after the last."""
        return self.y + self.height

    @property
    def right(self) -> int:
        """The column after the last."""
        return self.x + self.width

    def slices(self, *, origin: Rectangle | None = None) -> tuple[slice, slice]:
        """Index an array (H, W) whose first pixel is that of `origin` (or 0, 0)."""
        y0, x0 = (origin.y, origin.x) if origin else (0, 0)
        return (
            slice(self.y - y0, self.bottom - y0),
            slice(self.x - x0, self.right - x0),
        )


@dataclass(frozen=True)
class Windows:
    """How a model looks at a slide.

    Attributes:
        size: Side of a window in pixels (the model's input).
        stride: Distance between neighbouring windows in pixels; the overlap is
            size - stride.
    """

    size: int = 512
    stride: int = 384

    def __post_init__(self) -> None:
        """Check that neighbouring windows leave no gap."""
        if not 1 <= self.stride <= self.size:
            raise ValueError(
                f"stride must be in 1..{self.size} (the window's size), "
                f"found {self.stride}"
            )

    @property
    def margin(self) -> int:
        """How far a window reaches beyond its core on each side, pixels."""
        return (self.size - self.stride) // 2


def window_starts(length: int, windows: Windows) -> npt.NDArray[np.int64]:
    """Return the first pixel of each window along an axis of `length` pixels.

    Cores begin at multiples of the stride and windows reach beyond their core by half
    the overlap; the first and the last window are shifted inwards to lie on the slide.
    On short axes (up to 8 strides, one region) windows begin at multiples of the stride
    instead, which needs one fewer where the first window can keep its margin: 5 for
    2048 pixels with window 512 and stride 384.

    An axis shorter than a window has one window at 0 that reaches beyond its end (the
    reader pads).

    Examples:
        >>> from medray.geometry import Windows, window_starts
        >>> window_starts(2048, Windows(512, 384))
        array([   0,  384,  768, 1152, 1536])
    """
    size, stride, margin = windows.size, windows.stride, windows.margin
    if length <= size:
        return np.zeros(1, np.int64)
    last = length - size
    if length <= _SMALL * stride:
        return np.append(np.arange(0, last, stride, dtype=np.int64), last)
    # The first window owns every core up to the last one that it holds with its margin.
    first, end = margin // stride + 1, math.ceil((last + margin) / stride)
    between = np.arange(first, end, dtype=np.int64) * stride - margin
    return np.concatenate(([0], between, [last]))


def window_cores(length: int, windows: Windows) -> npt.NDArray[np.int64]:
    """Return where cores begin and end along an axis of `length` pixels.

    Returns:
        (number of windows + 1): the core of window i is [cores[i], cores[i + 1]). Cores
        partition the axis, and each keeps half the overlap away from its window's
        ends, except from the ends of the slide.

    Examples:
        >>> from medray.geometry import Windows, window_cores
        >>> window_cores(2048, Windows(512, 384))
        array([   0,  448,  832, 1216, 1600, 2048])
    """
    starts = window_starts(length, windows)
    cores = np.empty(len(starts) + 1, np.int64)
    cores[0], cores[-1] = 0, length
    if length <= _SMALL * windows.stride:
        cores[1:-1] = starts[1:] + windows.margin
    else:
        first = windows.margin // windows.stride + 1
        cores[1:-1] = (first + np.arange(len(starts) - 1)) * windows.stride
    return cores


def window_weights(length: int, windows: Windows) -> npt.NDArray[np.float32]:
    """Return the blending weight of every window at every pixel of an axis.

    The raw weight falls linearly from a window's middle to its ends (never to 0), and
    is divided by the sum over the windows that cover the pixel. The sum is known from
    the geometry, so no count array is kept, and the weights of a pixel sum to one.
    Weights of a slide are the products of those of its two axes.

    Returns:
        (number of windows, size) float32; row i belongs to `window_starts(...)[i]`.

    Examples:
        >>> from medray.geometry import Windows, window_weights
        >>> window_weights(6, Windows(4, 2)).round(2)
        array([[1.  , 1.  , 0.67, 0.33],
               [0.33, 0.67, 1.  , 1.  ]], dtype=float32)
    """
    starts = window_starts(length, windows)
    ramp = np.minimum(np.arange(windows.size), np.arange(windows.size)[::-1]) + 1.0
    covered = np.zeros(max(length, windows.size))
    for start in starts:
        covered[start : start + windows.size] += ramp
    rows = [ramp / covered[start : start + windows.size] for start in starts]
    return np.stack(rows).astype(np.float32)


def plan_regions(height: int, width: int, size: int) -> Iterator[Rectangle]:
    """Partition a slide into regions of `size` x `size`, row by row.

    Regions at the lower and right border are cut off there.
    """
    for y in range(0, height, size):
        for x in range(0, width, size):
            yield Rectangle(y, x, min(size, height - y), min(size, width - x))


def region_side(windows: Windows, chunk: int) -> int:
    """Return the side of a region that suits the windows: about 3072 pixels.

    It is a multiple of `chunk` and, where that does not become too large, of the
    stride: then no core belongs to two regions.
    """
    common = math.lcm(windows.stride, chunk)
    if common > 2 * 3072:
        common = chunk
    return common * max(1, round(3072 / common))


@dataclass(frozen=True)
class RegionWindows:
    """The windows that a region needs, and the rectangle that holds them.

    Attributes:
        region: The pixels that the region's task writes.
        halo: The pixels that it reads: the hull of its windows. It reaches beyond the
            slide only where the slide is smaller than one window.
        rows: Half-open range of indices into the vertical `window_starts`.
        columns: Half-open range of indices into the horizontal `window_starts`.
    """

    region: Rectangle
    halo: Rectangle
    rows: tuple[int, int]
    columns: tuple[int, int]

    def __len__(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


def region_windows(
    region: Rectangle,
    height: int,
    width: int,
    windows: Windows,
    stitch: Stitch = "crop",
) -> RegionWindows:
    """Return the windows of a slide of `height` x `width` that `region` needs."""
    ys, xs = window_starts(height, windows), window_starts(width, windows)
    rows = _needed(height, windows, stitch, region.y, region.bottom)
    columns = _needed(width, windows, stitch, region.x, region.right)
    y, x = int(ys[rows[0]]), int(xs[columns[0]])
    bottom = int(ys[rows[1] - 1]) + windows.size
    right = int(xs[columns[1] - 1]) + windows.size
    return RegionWindows(region, Rectangle(y, x, bottom - y, right - x), rows, columns)


def window_reach(
    length: int, windows: Windows, stitch: Stitch
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the first pixel that each window of an axis decides, and the one after.

    These are its core, or with `blend` the whole window as far as the axis goes.
    """
    if stitch == "crop":
        cores = window_cores(length, windows)
        return cores[:-1], cores[1:]
    starts = window_starts(length, windows)
    return starts, np.minimum(starts + windows.size, length)


def _needed(
    length: int, windows: Windows, stitch: Stitch, first: int, end: int
) -> tuple[int, int]:
    """Return the half-open range of windows that decide a pixel of [first, end)."""
    begins, ends = window_reach(length, windows, stitch)
    low = int(np.searchsorted(ends, first, side="right"))
    high = int(np.searchsorted(begins, end, side="left"))
    return low, high


def windows_over(
    plan: RegionWindows,
    height: int,
    width: int,
    windows: Windows,
    stitch: Stitch,
    blocks: npt.NDArray[np.bool_],
    side: int,
) -> npt.NDArray[np.bool_]:
    """Return which windows of a region decide a pixel of its marked blocks.

    Args:
        plan: The region; its corner is a multiple of `side`.
        height: Height of the slide, pixels.
        width: Width of the slide, pixels.
        windows: Size and stride.
        stitch: How windows become a mask.
        blocks: (rows, columns) of the region's blocks of `side` x `side` pixels.
        side: Pixels.

    Returns:
        (rows, columns) of the region's windows.
    """
    marked = []
    for length, (first, end), start, count in (
        (height, plan.rows, plan.region.y, blocks.shape[0]),
        (width, plan.columns, plan.region.x, blocks.shape[1]),
    ):
        begins, ends = window_reach(length, windows, stitch)
        edges = start + side * np.arange(count + 1)
        overlap = (begins[first:end, None] < edges[None, 1:]) & (
            ends[first:end, None] > edges[None, :-1]
        )
        marked.append(overlap)
    rows, columns = marked
    wanted = (
        rows.astype(np.int64) @ blocks.astype(np.int64) @ columns.T.astype(np.int64)
    )
    return np.asarray(wanted > 0)
