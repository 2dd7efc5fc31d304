"""Cleaning a mask: smooth borders, fill small holes, drop small objects.

Every step looks at most a known distance around a pixel, so a large mask can be cleaned
part by part, each read with that much around it, with the result of the whole.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from medray.errors import ConfigError

_MOST = 4096


@dataclass(frozen=True, kw_only=True)
class Cleaning:
    """How a mask is cleaned; a step with 0 is left out.

    Attributes:
        smooth: Radius of smoothing, pixels. A pixel takes the commonest class of the
            square around it.
        holes: Fill holes of fewer pixels. They take the commonest class around them.
        smallest: Remove objects of fewer pixels. They take the commonest class around
            them.
    """

    smooth: int = 0
    holes: int = 0
    smallest: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, most in (("smooth", 64), ("holes", _MOST), ("smallest", _MOST)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ConfigError(f"{name} lies in 0..{most} pixels, found {value}")

    @property
    def reach(self) -> int:
        """How far around a pixel decides about it, pixels.

        Of what hangs together and is cut off at that distance, the part that is seen
        is as long as the limit, so it has as many pixels and is not small.
        """
        return self.smooth + self.holes + self.smallest

    def __bool__(self) -> bool:
        return self.reach > 0


def clean_labels(labels: Any, how: Cleaning, classes: int) -> Any:
    """Clean labels: smooth, then fill holes, then drop small objects.

    On a GPU by cupyx, on a CPU by scipy, with equal results: all sums are of integers.

    Args:
        labels: (height, width) uint8, of numpy or of cupy.
        how: What to do.
        classes: Number of classes.

    Returns:
        (height, width) uint8, where `labels` is.
    """
    xp, ndimage = _modules(labels)
    if how.smooth:
        labels = _smoothed(labels, how.smooth, classes, xp, ndimage)
    if how.holes:
        labels = _absorbed(labels, [0], how.holes, classes, xp, ndimage)
    if how.smallest:
        objects = list(range(1, classes))
        labels = _absorbed(labels, objects, how.smallest, classes, xp, ndimage)
    return labels


def _modules(labels: Any) -> tuple[ModuleType, ModuleType]:
    if isinstance(labels, np.ndarray):
        return np, importlib.import_module("scipy.ndimage")
    return (
        importlib.import_module("cupy"),
        importlib.import_module("cupyx.scipy.ndimage"),
    )


def _smoothed(labels: Any, radius: int, classes: int, xp: Any, ndimage: Any) -> Any:
    """Return the commonest class of each square; of equally common ones the pixel's.

    Past the border of the array there is nothing to count.
    """
    ones = xp.ones(2 * radius + 1, xp.int32)

    def around(counted: Any) -> Any:
        count = counted.astype(xp.int32)
        for axis in (0, 1):
            count = ndimage.convolve1d(count, ones, axis=axis, mode="constant")
        return count

    # Twice the count and one for the pixel's own class: it wins a tie.
    best, result = xp.full(labels.shape, -1, xp.int32), labels.copy()
    for value in range(classes):
        own = labels == value
        count = 2 * around(own) + own
        better = count > best
        best[better], result[better] = count[better], value
    return result


def _absorbed(
    labels: Any, values: list[int], below: int, classes: int, xp: Any, ndimage: Any
) -> Any:
    """Merge patches of fewer than `below` pixels into the commonest class around them.

    A patch hangs together by its pixels' edges. Around it are the pixels across those
    edges; of equally common classes the lowest wins. A patch that fills the array
    stays.
    """
    result = labels.copy()
    for value in values:
        patches, count = ndimage.label(labels == value)
        if not count:
            continue
        small = xp.bincount(patches.ravel(), minlength=count + 1) < below
        small[0] = False
        if not bool(small.any()):
            continue
        seen = xp.zeros((count + 1) * classes, xp.int64)
        for one, other in (
            (patches[1:], labels[:-1]),
            (patches[:-1], labels[1:]),
            (patches[:, 1:], labels[:, :-1]),
            (patches[:, :-1], labels[:, 1:]),
        ):
            across = small[one] & (other != value)
            index = one[across].astype(xp.int64) * classes + other[across]
            seen += xp.bincount(index, minlength=len(seen))
        seen = seen.reshape(-1, classes)
        takes = seen.argmax(axis=1).astype(xp.uint8)
        small &= seen.any(axis=1)
        inside = small[patches]
        result[inside] = takes[patches[inside]]
    return result
