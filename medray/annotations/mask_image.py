"""Mask images: PNG or TIFF whose pixels are label values."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image, UnidentifiedImageError
from shapely import affinity
from shapely.geometry import shape

from medray.annotations.polygons import Area
from medray.classes import Classes
from medray.errors import SlideError

_MAX_PIXELS = 2**31
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

# Pillow's own limit lies far below the size of a slide. Whoever opens a picture in
# medray bounds its size first.
Image.MAX_IMAGE_PIXELS = None


def parse_mask(
    uri: str, data: bytes, *, height: int, width: int, classes: Classes
) -> list[Area]:
    """Turn a mask into polygons along its pixels' edges.

    A pixel's value is its label. With one foreground class, 255 stands for it too, and
    so does every number of an instance mask.

    Args:
        uri: Named in errors.
        data: The file.
        height: Height of the slide, level-0 pixels.
        width: Width of the slide, level-0 pixels. A mask may be smaller by one whole
            factor.
        classes: Names by label value.

    Raises:
        SlideError: The mask is of another size, or holds values that are no classes.
    """
    # Imported here: it brings boto3, a fifth of a second, and most slides have no mask.
    from rasterio import features

    values, factor = _read(uri, data, height, width)
    labels = _labels(uri, values, classes)
    areas = []
    for geometry, value in features.shapes(labels, mask=labels > 0, connectivity=4):
        polygon: Any = shape(geometry)
        if factor > 1:
            polygon = affinity.scale(polygon, factor, factor, origin=(0, 0))
        areas.append(Area(polygon, classes.names[int(value)]))
    return areas


def is_picture(data: bytes) -> bool:
    """Return whether a file is a PNG, BMP or TIFF, by its first bytes."""
    return data.startswith((_PNG, b"BM", *_TIFF))


def _read(
    uri: str, data: bytes, height: int, width: int
) -> tuple[npt.NDArray[Any], int]:
    """Read (H, W) values of any depth; RGB counts if all its channels are equal.

    Returns:
        The values, and by which factor they are smaller than the slide.

    Raises:
        SlideError: It is of another size, has colours, or is transparent elsewhere than
            on the background.
    """
    values: npt.NDArray[Any]
    if data.startswith(_TIFF):
        with tifffile.TiffFile(io.BytesIO(data)) as tiff:
            page: Any = tiff.pages[0]
            others = [other for other in tiff.pages[1:] if other.shape == page.shape]
            if others:
                raise SlideError(
                    f"{uri}: expected one mask, found {len(others) + 1} images of one "
                    f"size; save the one that is meant as a file of its own"
                )
            factor = _factor(uri, page.imagelength, page.imagewidth, height, width)
            values = np.asarray(page.asarray())
            if page.axes.startswith("S"):
                values = np.moveaxis(values, 0, -1)
            bilevel = page.bitspersample == 1
            if bilevel and page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
                values = values == 0
    else:
        try:
            picture = Image.open(io.BytesIO(data), formats=("PNG", "BMP"))
        except UnidentifiedImageError as error:
            raise SlideError(
                f"{uri}: expected a PNG or BMP mask, found a damaged header; export "
                f"the mask again"
            ) from error
        factor = _factor(uri, picture.height, picture.width, height, width)
        values = np.asarray(picture)
        _check_transparent_values(uri, values, picture.info.get("transparency"))
        if data.startswith(_PNG):
            depth, color = data[24], data[25]  # of the header (PNG 3, section 11.2.1)
            if depth == 16 and color != 0:
                raise SlideError(
                    f"{uri}: expected a grey mask, found 16-bit colours; save it grey"
                )
            if depth in (2, 4) and color == 0:  # Pillow spreads these over 0 to 255
                values = values // (255 // (2**depth - 1))
    if values.ndim == 3:
        if values.shape[2] in (2, 4):
            _check_alpha(uri, values[..., 0], values[..., -1])
        if values.shape[2] >= 3 and (values[..., 1:3] != values[..., :1]).any():
            raise SlideError(
                f"{uri}: expected a mask of label values, found a colour image; save "
                f"it as grey or with a palette"
            )
        values = values[..., 0]
    if values.ndim != 2:
        raise SlideError(
            f"{uri}: expected a mask of height x width, found the shape {values.shape}"
        )
    return values, factor


def _check_alpha(uri: str, values: npt.NDArray[Any], alpha: npt.NDArray[Any]) -> None:
    """Raise an error if the values of a mask contradict its alpha channel.

    It may be drawn with black on transparent: then the values are all 0.

    Raises:
        SlideError: A pixel is background by its value and not by its alpha, or the
            other way round, and not all pixels are opaque.
    """
    opaque = alpha.max(initial=0) > 0 and (alpha == alpha.max()).all()
    if not opaque and ((alpha > 0) != (values > 0)).any():
        raise SlideError(
            f"{uri}: expected label values, found an alpha channel that marks other "
            f"pixels than the values do; save the mask without transparency"
        )


def _check_transparent_values(
    uri: str, values: npt.NDArray[Any], transparent: Any
) -> None:
    """Raise an error if a value other than 0 is transparent in a palette or grey mask.

    Args:
        uri: Named in errors.
        values: Of the mask.
        transparent: As Pillow gives it: a value, or the alpha of each value as bytes.

    Raises:
        SlideError: There are such pixels.
    """
    if values.ndim != 2 or not isinstance(transparent, int | bytes):
        return
    clear = [transparent]
    if isinstance(transparent, bytes):
        clear = [value for value, alpha in enumerate(transparent) if alpha == 0]
    found = [int(value) for value in np.unique(values) if value and value in clear]
    if found:
        raise SlideError(
            f"{uri}: expected label values, found that pixels of the values {found} "
            f"are transparent; save the mask without transparency"
        )


def _factor(uri: str, rows: int, columns: int, height: int, width: int) -> int:
    """Return how many times smaller than the slide a mask is, before it is decoded."""
    if not rows * columns:
        raise SlideError(f"{uri}: the mask has no pixels; export it again")
    if rows * columns > _MAX_PIXELS:
        raise SlideError(
            f"{uri}: the mask declares {columns} x {rows} pixels, more than "
            f"{_MAX_PIXELS}; save it smaller by a whole factor"
        )
    factor = max(1, round(height / rows))
    # A smaller mask's size may have been rounded either way.
    sides = ((rows, height), (columns, width))
    if max(abs(n * factor - full) for n, full in sides) >= factor:
        raise SlideError(
            f"{uri}: the mask is {columns} x {rows}, the slide {width} x {height} "
            f"pixels; expected the same size, or smaller by one whole factor"
        )
    return factor


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
    strange = values[(values < 0) | (values >= len(classes))]
    found = np.unique(strange[:1_000_000])[:5].tolist()
    raise SlideError(
        f"{uri}: holds the values {found}; expected 0 to {len(classes) - 1}, the label "
        f"values of {list(classes.names)}; is it a mask of instances?"
    )
