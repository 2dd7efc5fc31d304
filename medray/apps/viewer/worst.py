"""The squares of a slide in which most is wrong, or least certain."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from medray.apps.viewer.layers import truth_row
from medray.apps.viewer.tiles import OVERVIEW, SlideSource
from medray.classes import Classes
from medray.evaluation import nearest_labels, read_known, read_truth
from medray.geometry import Rectangle

_MOST_SQUARES = 20


def worst_regions(
    source: SlideSource, classes: Classes, *, side: int = 512
) -> list[dict[str, float]]:
    """Find the squares of a slide in which most is wrong, or least certain.

    What is wrong is known from the truth; without one the uncertainty counts. Both are
    taken at a coarse level, of at most some 2000 pixels per side.

    Args:
        source: With a mask, and a truth or uncertainty.
        classes: Names by label value.
        side: Of a square, in pixels of the mask.

    Returns:
        `y`, `x`, `height` and `width` in level-0 pixels, and the share of their pixels
        that is `wrong`, or else how `uncertain` they are, from 0 to 1 (the mean); the
        worst first, 20 at most.

    Raises:
        MedrayError: The mask, the truth or the uncertainty is damaged.
    """
    coarse = 0
    while max(source.mask_shape) >> coarse > OVERVIEW:
        coarse += 1
    height, width = (math.ceil(n / 2**coarse) for n in source.mask_shape)
    whole = Rectangle(0, 0, height, width)
    uri = source.mask if source.truth else source.uncertainty
    found = nearest_labels(uri, whole, 2**coarse, source.mask_shape, source.coarsest)
    if not source.truth:
        return _squares(found / 255, "uncertain", side, coarse, source.mask_step)
    row = truth_row(source, source.mask_step * 2**coarse)
    wrong = (found != read_truth(row, whole, classes)).astype(np.float64)
    known = read_known(row, whole, classes)
    if known is not None:
        wrong *= known
    return _squares(wrong, "wrong", side, coarse, source.mask_step)


def _squares(
    values: npt.NDArray[np.float64], name: str, side: int, coarse: int, mask_step: float
) -> list[dict[str, float]]:
    """Return the squares with the highest sums, each with its mean as `name`."""
    height, width = values.shape
    block, step = max(8, side >> coarse), mask_step * 2**coarse
    sums = np.add.reduceat(values, np.arange(0, height, block), axis=0)
    sums = np.add.reduceat(sums, np.arange(0, width, block), axis=1)
    order = np.argsort(-sums, axis=None, kind="stable")[:_MOST_SQUARES]
    found = []
    for y, x in np.transpose(np.unravel_index(order, sums.shape)).tolist():
        if sums[y, x]:
            size = (min(block, height - y * block), min(block, width - x * block))
            found.append(
                {
                    "y": y * block * step,
                    "x": x * block * step,
                    "height": size[0] * step,
                    "width": size[1] * step,
                    name: float(sums[y, x]) / (size[0] * size[1]),
                }
            )
    return found
