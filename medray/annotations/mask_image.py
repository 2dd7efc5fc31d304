"""Mask images: PNG or TIFF whose pixels are label values."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image
from rasterio import features
from shapely import affinity
from shapely.geometry import shape

from medray.annotations.area import Area
from medray.classes import Classes
from medray.errors import SlideError

_MAX_PIXELS = 2**31


def parse_mask(
    uri: str, data: bytes, *, height: int, width: int, classes: Classes
) -> list[Area]:
    """Turn a mask into polygons along its pixels' edges.

    A pixel's value is its label. With one foreground class, 255 stands for it too, and
    so does every number of an instance mask.

    Args:
        uri: Named in errors.
        data: The file.
        height: Level-0 pixels of the slide.
        width: Likewise. A mask may be smaller by one whole factor.
        classes: Names by label value.

    Raises:
        SlideError: The mask is of another size, or holds values that are no classes.
    """
    values = _read(uri, data)
    factor = max(1, round(height / values.shape[0]))
    fits = [
        abs(n * factor - full) <= factor
        for n, full in zip(values.shape, (height, width), strict=True)
    ]
    if not all(fits):
        raise SlideError(
            f"{uri}: the mask is {values.shape[1]} x {values.shape[0]}, the slide "
            f"{width} x {height} pixels; expected the same size, or smaller by one "
            f"whole factor"
        )
    labels = _labels(uri, values, classes)
    areas = []
    for geometry, value in features.shapes(labels, mask=labels > 0, connectivity=4):
        polygon: Any = shape(geometry)
        if factor > 1:
            polygon = affinity.scale(polygon, factor, factor, origin=(0, 0))
        areas.append(Area(polygon, classes.names[int(value)]))
    return areas


def _read(uri: str, data: bytes) -> npt.NDArray[Any]:
    """Read (H, W) values of any depth; RGB counts if all its channels are equal."""
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            page = tiff.pages[0]
            _bound(uri, page.imagelength, page.imagewidth)  # type: ignore[union-attr]
            values: npt.NDArray[Any] = np.asarray(page.asarray())
    else:
        picture = Image.open(io.BytesIO(data), formats=("PNG", "BMP"))
        _bound(uri, picture.height, picture.width)
        values = np.asarray(picture)
    if values.ndim == 3:
        colors = values[..., :3]
        if colors.shape[2] == 3 and (colors != colors[..., :1]).any():
            raise SlideError(
                f"{uri}: expected a mask of label values, found a colour image"
            )
        values = values[..., 0]
    return values


def _bound(uri: str, height: int, width: int) -> None:
    if height * width > _MAX_PIXELS:
        raise SlideError(f"{uri}: a mask of {height} x {width} pixels is too large")


def _labels(
    uri: str, values: npt.NDArray[Any], classes: Classes
) -> npt.NDArray[np.uint8]:
    if values.dtype == bool:
        values = values.astype(np.uint8)
    if values.dtype.kind not in "ui":
        raise SlideError(f"{uri}: expected whole numbers, found {values.dtype}")
    if values.max(initial=0) < len(classes) and values.min(initial=0) >= 0:
        return values.astype(np.uint8)
    if len(classes) == 2:
        return (values > 0).astype(np.uint8)
    found = sorted(set(np.unique(values).tolist()) - set(range(len(classes))))[:5]
    raise SlideError(
        f"{uri}: holds the values {found}; expected 0 to {len(classes) - 1}, the label "
        f"values of {list(classes.names)}"
    )
