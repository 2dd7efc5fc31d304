"""The shape of a cell in numbers, by the contours of its nucleus and its cytoplasm."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from shapely import affinity

from medray.annotations.polygons import Area
from medray.annotations.rasterize import rasterise
from medray.classes import AnyClass
from medray.errors import SlideError

_LEAST_PX = 9  # pixels of an area that has a shape to speak of


def feature_names(mpp: float | None = None) -> tuple[str, ...]:
    """Return the features' names with units: pixels, or um where mpp is known."""
    unit = "px" if mpp is None else "um"
    names = [
        f"{part}_{name}"
        for part in ("nucleus", "cytoplasm")
        for name in (f"area_{unit}2", f"perimeter_{unit}", "eccentricity", "solidity")
    ]
    return (*names, "nucleus_cytoplasm_ratio")


FEATURES = len(feature_names())
"""How many features there are."""


def measure(
    nucleus: Any, cytoplasm: Any, mpp: float | None = None
) -> npt.NDArray[np.float64]:
    """Measure a cell by the pixels that lie within its contours.

    By scikit-image's regionprops: area; perimeter after Crofton (four directions);
    eccentricity of the ellipse of the same second moments; solidity, the share of its
    convex hull. The last feature is the nucleus' area over that of the whole cell, for
    a contour of the cytoplasm goes round the nucleus too.

    Args:
        nucleus: Shapely polygon of it, (x, y) in pixels of the original image.
        cytoplasm: Shapely polygon of it, (x, y) in pixels of the original image.
        mpp: Microns per pixel; None: lengths stay pixels.

    Returns:
        (FEATURES,) in the order of `feature_names`.

    Raises:
        SlideError: One of them covers too few pixels to have a shape.
    """
    values = []
    for name, polygon in (("nucleus", nucleus), ("cytoplasm", cytoplasm)):
        values += _shape_of(name, polygon, mpp or 1.0)
    return np.array([*values, values[0] / values[4]])


def _shape_of(name: str, polygon: Any, scale: float) -> list[float]:
    # Takes a second to load, and only who measures needs it.
    from skimage.measure import regionprops

    x0, y0, x1, y1 = polygon.bounds
    left, top = int(x0) - 1, int(y0) - 1
    moved = affinity.translate(polygon, -left, -top)
    size = {"height": int(y1) - top + 2, "width": int(x1) - left + 2}
    mask = rasterise([Area(moved, "inside")], AnyClass(), y=0, x=0, **size)
    if (pixels := int(mask.sum())) < _LEAST_PX:
        raise SlideError(
            f"the contour of the {name} holds {pixels} pixels, expected {_LEAST_PX} or "
            f"more; draw it again, or remove its image"
        )
    (found,) = regionprops(mask)  # type: ignore[no-untyped-call]
    return [
        float(found.area) * scale**2,
        float(found.perimeter_crofton) * scale,
        float(found.eccentricity),
        float(found.solidity),
    ]
