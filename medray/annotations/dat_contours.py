"""Contours of single cells as in SIPaKMeD's .dat files: one line `x,y` per point.

https://doi.org/10.1109/ICIP.2018.8451588 (Plissiti et al. 2018)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import shapely
from shapely.geometry import box

from medray.annotations.polygons import areal, fill
from medray.errors import MedrayError, SlideError
from medray.storage import files

CONTOUR_SUFFIX = ".dat"
_BEYOND_PX = 2.0  # a hand that follows a cell to the image's border slips beyond it
_REMEDY = "draw the contour again, or remove its image"


def read_contour(uri: str, *, height: int, width: int) -> Any:
    """Read a contour and return the area that it encloses.

    One that crosses itself encloses what it goes round (the nonzero rule of
    `medray.annotations.polygons.fill`); what lies beyond the image's border by up to 2
    pixels is cut off.

    Args:
        uri: Lines of x and y, separated by a comma, in pixels of the image; the last
            point may be the first again.
        height: Height of the image, pixels.
        width: Width of the image, pixels.

    Returns:
        A valid polygon or several, (x, y) in pixels of the image.

    Raises:
        SlideError: The file cannot be read, holds no contour, or one of another image.
    """
    try:
        text = files.read_bytes(uri).decode("utf-8-sig")
    except (MedrayError, OSError, UnicodeDecodeError) as error:
        raise SlideError(f"{uri}: cannot be read as text ({error})") from error
    points = [
        _point(uri, number, line)
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    if len(set(points)) < 3:
        raise SlideError(
            f"{uri}: expected a contour of 3 points or more, found {len(set(points))} "
            f"different ones; {_REMEDY}"
        )
    ring = np.array(points)
    beyond = max(*(-ring.min(axis=0)), *(ring.max(axis=0) - (width, height)))
    if beyond > _BEYOND_PX:
        raise SlideError(
            f"{uri}: the contour reaches {beyond:g} pixels beyond its image of {width} "
            f"x {height} pixels; is it the contour of another image? {_REMEDY}"
        )
    try:
        inside = fill([ring])
    except SlideError as error:
        raise SlideError(f"{uri}: {error}") from error
    polygon = areal(shapely.intersection(inside, box(0, 0, width, height)))
    if polygon.area == 0:
        raise SlideError(f"{uri}: the contour encloses nothing; {_REMEDY}")
    return polygon


def _point(uri: str, number: int, line: str) -> tuple[float, float]:
    try:
        x, y = map(float, line.split(","))
    except ValueError:
        x = y = math.nan
    if not (math.isfinite(x) and math.isfinite(y)):
        raise SlideError(
            f"{uri}: line {number}: expected two numbers `x,y`, found "
            f"{line.strip()[:40]!r}; {_REMEDY}"
        )
    return x, y
