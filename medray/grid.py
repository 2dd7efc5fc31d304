"""The geometry of inference: regions, windows, halos, blending weights.

Numbers in, numbers out; no pixels, no files. All coordinates are pixels at the
working level, order (y, x).

Windows lie on one grid anchored at the slide's origin, so they are a property of the
slide alone. Regions only decide who computes what:

    slide   |---------------------------------------------|
    windows |========|          (size, every `stride` px)
                 |========|
                      |========|  ...          |========|  last one shifted inwards
    regions |-------------|-------------|-----------------|
    read for the middle one: |<-halo->|-----|<-halo->|

A region is read with the halo that makes every window touching it whole. A window that
touches two regions is computed for both, with the same pixels, and so gives both the
same prediction: the mask does not depend on how the slide was cut (design, promise 1).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


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


def window_starts(length: int, windows: Windows) -> npt.NDArray[np.int64]:
    """Give the first pixel of each window along an axis of `length` pixels.

    Windows follow each other by the stride; the last one is shifted inwards so that it
    ends with the axis. An axis shorter than a window has one window at 0 that reaches
    beyond its end (the reader pads).
    """
    if length <= windows.size:
        return np.zeros(1, np.int64)
    last = length - windows.size
    starts = np.arange(0, last, windows.stride, dtype=np.int64)
    return np.append(starts, last)


def window_weights(length: int, windows: Windows) -> npt.NDArray[np.float32]:
    """Give the blending weight of every window at every pixel of an axis.

    The raw weight falls linearly from a window's middle to its ends (never to 0), and
    is divided by the sum over the windows that cover the pixel. The sum is known from
    the geometry, so no count array is kept, and the weights of a pixel sum to one.
    Weights of a slide are the products of those of its two axes.

    Returns:
        (number of windows, size) float32; row i belongs to `window_starts(...)[i]`.
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


def _touching(
    starts: npt.NDArray[np.int64], size: int, first: int, end: int
) -> tuple[int, int]:
    """Give the half-open range of windows that share a pixel with [first, end)."""
    low = int(np.searchsorted(starts, first - size, side="right"))
    high = int(np.searchsorted(starts, end, side="left"))
    return low, high


@dataclass(frozen=True)
class RegionWindows:
    """The windows that a region needs, and the rectangle that holds them.

    Attributes:
        region: The pixels that the region's task writes.
        halo: The pixels that it reads: the hull of its windows. It reaches beyond the
            slide only where the slide is smaller than one window.
        rows: Half-open range of indices into the vertical `window_starts`.
        columns: Likewise for the horizontal ones.
    """

    region: Rectangle
    halo: Rectangle
    rows: tuple[int, int]
    columns: tuple[int, int]

    def __len__(self) -> int:
        return (self.rows[1] - self.rows[0]) * (self.columns[1] - self.columns[0])


def region_windows(
    region: Rectangle, height: int, width: int, windows: Windows
) -> RegionWindows:
    """Give the windows of a slide of `height` x `width` that touch `region`."""
    ys, xs = window_starts(height, windows), window_starts(width, windows)
    rows = _touching(ys, windows.size, region.y, region.bottom)
    columns = _touching(xs, windows.size, region.x, region.right)
    y, x = int(ys[rows[0]]), int(xs[columns[0]])
    bottom = int(ys[rows[1] - 1]) + windows.size
    right = int(xs[columns[1] - 1]) + windows.size
    return RegionWindows(region, Rectangle(y, x, bottom - y, right - x), rows, columns)
