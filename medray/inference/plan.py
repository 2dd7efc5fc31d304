"""The plan of a slide: its working level, its regions, the windows in them.

From headers and a few coarse pixels; numbers only, no model and no Ray.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medray.execution import PlannedRegion
from medray.geometry import Rectangle, plan_regions
from medray.inference.regions import BLOCK, SlideFacts, Within, areas_within
from medray.inference.run import RunSettings, mask_uri
from medray.slides import (
    Slide,
    Working,
    choose_level,
    settle_mpp,
    tissue_share,
)
from medray.storage import ome_zarr

Blocks = npt.NDArray[np.bool_]


def plan_slide(
    slide: Slide,
    settings: RunSettings,
    *,
    within: Within | None = None,
    coarse: str = "",
    given_mpp: float | None = None,
) -> tuple[SlideFacts, list[PlannedRegion[Blocks]]]:
    """Plan the regions of a slide.

    Args:
        slide: The slide.
        settings: Of the run.
        within: Areas inside which to predict; None: everywhere.
        coarse: Mask of the first pass; "" when there is none.
        given_mpp: Microns per pixel of level 0, which override the file's.

    Returns:
        The slide's facts, and each region with something to predict, with the blocks
        (rows, columns) of 512 px in it that are predicted.

    Raises:
        SlideError: The slide does not suit the model, or cannot be read.
    """
    options = settings.options
    working = choose_level(slide, settings.model_mpp, given_mpp)
    height, width = working.height, working.width
    regions = list(plan_regions(height, width, options.region))
    # A flat slide of one region is decoded once: its tissue is found when it is read.
    at_reading = (
        len(regions) == 1 and len(slide.levels) == 1 and working.scale == 1.0
    ) and not options.everywhere
    blocks = np.ones((-(-height // BLOCK), -(-width // BLOCK)), bool)
    if not options.everywhere and not at_reading:
        blocks &= tissue_share(slide, height, width, BLOCK) > 0
    level0 = slide.levels[0]
    if within:
        areas = areas_within(within, level0.height, level0.width)
        blocks &= _touched(areas, working, blocks.shape)
    if coarse:
        blocks &= _found(coarse, blocks.shape)
    planned = [
        PlannedRegion(index, region, part)
        for index, region in enumerate(regions)
        if (part := _part(region, blocks)).any()
    ]
    mpp, _ = settle_mpp(slide, given_mpp)
    size = (level0.height, level0.width)
    return SlideFacts(working, mpp, *size, at_reading, within), planned


def _part(region: Rectangle, blocks: Blocks) -> Blocks:
    """Return the mask of a region's blocks that are predicted."""
    y0, x0 = region.y // BLOCK, region.x // BLOCK
    y1, x1 = -(-region.bottom // BLOCK), -(-region.right // BLOCK)
    return blocks[y0:y1, x0:x1]


def _touched(areas: Any, working: Working, shape: tuple[int, ...]) -> Blocks:
    """Return which blocks an area touches."""
    import shapely

    side = BLOCK * working.downsample
    y, x = (axis.ravel() for axis in np.indices(shape))
    boxes = shapely.box(x * side, y * side, (x + 1) * side, (y + 1) * side)
    tree = shapely.STRtree([area.polygon for area in areas])
    touched = np.zeros(len(boxes), bool)
    touched[tree.query(boxes, predicate="intersects")[0]] = True
    return touched.reshape(shape)


def _found(coarse: str, shape: tuple[int, ...]) -> Blocks:
    """Return the blocks where the first pass found something, and their neighbours."""
    mask = ome_zarr.open_level(coarse)
    factor = round(shape[0] * BLOCK / mask.shape[0])
    side = max(1, BLOCK // max(1, factor))
    found = np.zeros(shape, bool)
    for row in range(shape[0]):
        line = np.asarray(mask[row * side : (row + 1) * side])
        columns = np.flatnonzero(line.any(axis=0)) // side
        found[row, np.minimum(columns, shape[1] - 1)] = True
    grown = np.pad(found, 1)
    near: Blocks = np.zeros(shape, bool)
    for dy in range(3):
        for dx in range(3):
            near |= grown[dy : dy + shape[0], dx : dx + shape[1]]
    return near


def coarse_mask(out: str, slide: str) -> str:
    """Return the address of the first pass's mask."""
    return mask_uri(f"{out}/coarse", slide)
