"""SIPaKMeD's layout: cells with contours, as crops or still in their cluster images.

CLASS/.../CROPPED/NNN_MM.bmp     a cell; its contours NNN_MM_nuc.dat and NNN_MM_cyt.dat
CLASS/.../NNN.bmp                a cluster of cells, NNN_nucMM.dat and NNN_cytMM.dat

Where a class has crops, they are its cells; else they are cut out of the clusters.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import re
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from medray.annotations import CONTOUR_SUFFIX, measure, read_contour
from medray.errors import ConfigError, SlideError
from medray.slides import (
    find_files,
    fingerprint_of,
    open_slide,
    slide_digest,
    strip_suffix,
)
from medray.types import Row, UInt8

log = logging.getLogger(__name__)

_CROPS = "CROPPED"  # the folder of a class that holds them
_MARGIN_PX = 10  # around the cytoplasm of a cell that is cut out
_CONTOUR = re.compile(r"(?P<image>.+)_(?P<part>nuc|cyt)(?P<cell>\d*)")
_PARTS = {"nuc": "nucleus", "cyt": "cytoplasm"}


def without_clusters(images: list[Row]) -> list[Row]:
    """Leave out the cluster images of classes that have crops of them.

    Args:
        images: With `image`, `class` and `split`.
    """
    cropped = {_folder(row) for row in images if _is_crop(row)}
    return [row for row in images if _is_crop(row) or _folder(row) not in cropped]


def _is_crop(row: Row) -> bool:
    return _CROPS in row["image"].split("/")[:-1]


def _folder(row: Row) -> tuple[str, str]:
    return row["split"], row["class"]


def with_contours(folder: str, cells: list[Row], images: Sequence[Row]) -> list[Row]:
    """Return a row a cell: `nucleus` and `cytoplasm`, the addresses of its contours.

    A cell that is to be cut out of its cluster image has `cut` too; one without both
    contours has `failure` instead. Contours without an image are warned of.

    Args:
        folder: Where images and contours lie.
        cells: Of `without_clusters`.
        images: All that are there.

    Raises:
        ConfigError: There are no contours.
    """
    contours = _find_contours(folder)
    if not contours:
        raise ConfigError(
            f"{folder}: found no contours, expected NAME_nuc.dat and NAME_cyt.dat "
            f"beside a cell's NAME.bmp, or NAME_nuc01.dat and NAME_cyt01.dat beside a "
            f"cluster's; bring them, or ingest without --contours"
        )
    alone = sorted(contours.keys() - {_stem(row["image"]) for row in images})
    if alone:
        log.warning(
            "%d images of contours are missing, such as %s.bmp; their contours are not "
            "used",
            len(alone),
            alone[0],
        )
    rows: list[Row] = []
    for row in cells:
        found = contours.get(_stem(row["image"]), {"": {}})
        if "" in found:
            rows.append(row | _pair(row["image"], found[""]))
            continue
        for number, parts in sorted(found.items()):
            name = f"{_stem(row['image'])}_{number}"
            rows.append(row | {"image": name, "cut": True} | _pair(name, parts))
    return rows


def _stem(name: str) -> str:
    return strip_suffix(name) or name


def _find_contours(folder: str) -> dict[str, dict[str, dict[str, str]]]:
    """Return the contours' addresses by image (no suffix), cell ("": all) and part."""
    contours: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for uri, relative in find_files([folder], (CONTOUR_SUFFIX,)):
        found = _CONTOUR.fullmatch(relative[: -len(CONTOUR_SUFFIX)])
        if found:
            cells = contours[found["image"]]
            cells.setdefault(found["cell"], {})[_PARTS[found["part"]]] = uri
    return contours


def _pair(name: str, parts: dict[str, str]) -> Row:
    missing = [part for part in _PARTS.values() if part not in parts]
    if missing:
        return {
            "failure": f"{name}: found no contour of its {' and '.join(missing)}; "
            f"bring it, remove the image, or ingest without --contours"
        }
    return parts | {
        "contour_fingerprints": [fingerprint_of(uri) for uri in parts.values()]
    }


def look_at_cell(row: Row) -> Row:
    """Return the `digest` of a cell, its `features`, and its `box` if it is to be cut.

    Args:
        row: Of `with_contours`, and `mpp` (None: features are in pixels).

    Returns:
        `features` as medray.annotations.morphology.measure gives them; `box` is y, x,
        height and width in its cluster image.

    Raises:
        SlideError: Image or contours are damaged, or do not belong together.
    """
    if failure := row.get("failure"):
        raise SlideError(failure)
    digest, pixels = _read(row["uri"], row["fingerprint"])
    height, width = pixels.shape[:2]
    shapes = {
        part: read_contour(row[part], height=height, width=width)
        for part in _PARTS.values()
    }
    try:
        features = measure(**shapes, mpp=row["mpp"]).tolist()
    except SlideError as error:
        raise SlideError(f"{row['image']}: {error}") from error
    if not row.get("cut"):
        return {"digest": digest, "features": features}
    x0, y0, x1, y1 = shapes["cytoplasm"].bounds
    top, left = max(0, int(y0) - _MARGIN_PX), max(0, int(x0) - _MARGIN_PX)
    bottom = min(height, math.ceil(y1) + _MARGIN_PX)
    right = min(width, math.ceil(x1) + _MARGIN_PX)
    box = [top, left, bottom - top, right - left]
    # Equal pixels are equal cells, whatever their clusters are called.
    own = hashlib.blake2b(repr(box[2:]).encode(), digest_size=16)
    own.update(pixels[top:bottom, left:right].tobytes())
    digest = f"blake2b:{own.hexdigest()}"
    return {"digest": digest, "features": features, "box": box}


def read_cell(row: Row) -> UInt8:
    """Read (H, W, 3) uint8 RGB of an image, or of the `box` of its cluster image.

    Raises:
        SlideError: It is no image, or damaged.
    """
    if not row.get("box"):
        return read_whole(row["uri"])
    y, x, height, width = row["box"]
    return _read(row["uri"], row["fingerprint"])[1][y : y + height, x : x + width]


def read_whole(uri: str) -> UInt8:
    """Read (H, W, 3) uint8 RGB of an image.

    Raises:
        SlideError: It is no image, or damaged.
    """
    with open_slide(uri) as slide:
        level = slide.levels[0]
        return slide.read(y=0, x=0, height=level.height, width=level.width)


# The cells of a cluster come one after the other.
@functools.lru_cache(maxsize=1)
def _read(uri: str, fingerprint: str) -> tuple[str, UInt8]:
    """Keep the last image and its digest; a replaced file has another fingerprint."""
    return slide_digest(uri), read_whole(uri)


def read_resized(row: Row, side: int) -> UInt8:
    """Read an image as (side, side, 3) uint8 RGB; it may be stretched.

    Args:
        row: With `uri`; and `box`, if it is a cell within that image.
        side: Pixels.

    Raises:
        SlideError: It is no image, or damaged.
    """
    image = Image.fromarray(read_cell(row))
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image)
