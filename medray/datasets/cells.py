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
from dataclasses import replace

import numpy as np
from PIL import Image

from medray.annotations import CONTOUR_SUFFIX, measure, read_contour
from medray.datasets.images import (
    CheckedImage,
    Contours,
    ImageFile,
    MissingContours,
)
from medray.errors import ConfigError, SlideError
from medray.geometry import Rectangle
from medray.slides import (
    find_files,
    fingerprint_of,
    open_slide,
    slide_digest,
    strip_suffix,
)
from medray.types import UInt8

log = logging.getLogger(__name__)

_CROPS = "CROPPED"  # the folder of a class that holds them
_MARGIN_PX = 10  # around the cytoplasm of a cell that is cut out
_CONTOUR = re.compile(r"(?P<image>.+)_(?P<part>nuc|cyt)(?P<cell>\d*)")
_PARTS = {"nuc": "nucleus", "cyt": "cytoplasm"}


def without_clusters(images: Sequence[ImageFile]) -> list[ImageFile]:
    """Return the images but the cluster images of classes that have crops of them."""
    cropped = {_folder(image) for image in images if _is_crop(image)}
    return [
        image for image in images if _is_crop(image) or _folder(image) not in cropped
    ]


def _is_crop(image: ImageFile) -> bool:
    return _CROPS in image.image.split("/")[:-1]


def _folder(image: ImageFile) -> tuple[str, str]:
    return image.split, image.class_name


def with_contours(
    folder: str, cells: Sequence[ImageFile], images: Sequence[ImageFile]
) -> list[ImageFile]:
    """Return the cells, each with its contours, or with what is missing of them.

    Of an image of several cells each becomes one that is to be cut out. Contours
    without an image are warned of.

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
    alone = sorted(contours.keys() - {_stem(image.image) for image in images})
    if alone:
        log.warning(
            "%d images of contours are missing, such as %s.bmp; their contours are not "
            "used",
            len(alone),
            alone[0],
        )
    found = []
    for cell in cells:
        parts_of = contours.get(_stem(cell.image), {"": {}})
        if "" in parts_of:
            pair = _pair(cell.image, parts_of[""])
            found.append(replace(cell, contours=pair))
            continue
        for number, parts in sorted(parts_of.items()):
            name = f"{_stem(cell.image)}_{number}"
            pair = _pair(name, parts)
            one = replace(cell, image=name, patient=name, contours=pair, cut=True)
            found.append(one)
    return found


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


def _pair(name: str, parts: dict[str, str]) -> Contours | MissingContours:
    missing = [part for part in _PARTS.values() if part not in parts]
    if missing:
        return MissingContours(
            f"{name}: found no contour of its {' and '.join(missing)}; "
            f"bring it, remove the image, or ingest without --contours"
        )
    nucleus, cytoplasm = parts["nucleus"], parts["cytoplasm"]
    fingerprints = (fingerprint_of(cytoplasm), fingerprint_of(nucleus))
    return Contours(nucleus, cytoplasm, fingerprints)


def look_at_cell(
    file: ImageFile, contours: Contours | MissingContours, mpp: float | None
) -> CheckedImage:
    """Return a cell with its digest, its features, and its box if it is to be cut.

    Args:
        file: The cell.
        contours: Its contours.
        mpp: Microns per pixel of the image; None: features are in pixels.

    Raises:
        SlideError: Contours are missing, image or contours are damaged, or they do not
            belong together.
    """
    if isinstance(contours, MissingContours):
        raise SlideError(contours.message)
    digest, pixels = _read(file.uri, file.fingerprint)
    height, width = pixels.shape[:2]
    nucleus = read_contour(contours.nucleus, height=height, width=width)
    cytoplasm = read_contour(contours.cytoplasm, height=height, width=width)
    try:
        features = measure(nucleus=nucleus, cytoplasm=cytoplasm, mpp=mpp).tolist()
    except SlideError as error:
        raise SlideError(f"{file.image}: {error}") from error
    seen = CheckedImage(
        file=file, split=file.split, digest=digest, features=tuple(features)
    )
    if not file.cut:
        return seen
    x0, y0, x1, y1 = cytoplasm.bounds
    top, left = max(0, int(y0) - _MARGIN_PX), max(0, int(x0) - _MARGIN_PX)
    bottom = min(height, math.ceil(y1) + _MARGIN_PX)
    right = min(width, math.ceil(x1) + _MARGIN_PX)
    box = Rectangle(top, left, bottom - top, right - left)
    # Equal pixels are equal cells, whatever their clusters are called.
    size = repr([box.height, box.width]).encode()
    own = hashlib.blake2b(size, digest_size=16)
    own.update(pixels[box.slices()].tobytes())
    return replace(seen, digest=f"blake2b:{own.hexdigest()}", box=box)


def read_whole(uri: str) -> UInt8:
    """Read (H, W, 3) uint8 RGB of an image.

    Raises:
        SlideError: It is no image, or damaged.
    """
    return read_noted(uri)[0]


def read_noted(uri: str) -> tuple[UInt8, str]:
    """Read an image as `read_whole` does, and what its reader remarks."""
    with open_slide(uri) as slide:
        level = slide.levels[0]
        pixels = slide.read(y=0, x=0, height=level.height, width=level.width)
        return pixels, slide.note


# The cells of a cluster come one after the other.
@functools.lru_cache(maxsize=1)
def _read(uri: str, fingerprint: str) -> tuple[str, UInt8]:
    """Keep the last image and its digest; a replaced file has another fingerprint."""
    return slide_digest(uri), read_whole(uri)


def read_checked(image: CheckedImage, side: int) -> UInt8:
    """Read an image, or a cell that is cut out of one, as `read_resized` does."""
    if image.box is None:
        return read_resized(image.file.uri, side)
    _, pixels = _read(image.file.uri, image.file.fingerprint)
    return _resized(pixels[image.box.slices()], side)


def read_resized(uri: str, side: int) -> UInt8:
    """Read an image as (side, side, 3) uint8 RGB; it may be stretched.

    Raises:
        SlideError: It is no image, or damaged.
    """
    return _resized(read_whole(uri), side)


def _resized(pixels: UInt8, side: int) -> UInt8:
    image = Image.fromarray(pixels)
    if image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image)
