"""Which images of a folder can be decoded, and the digest of each."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from medray.datasets.cells import look_at_cell, read_checked, read_noted
from medray.datasets.images import CheckedImage, ImageFile
from medray.errors import MedrayError
from medray.slides import slide_digest, too_large

log = logging.getLogger(__name__)


def check_images(
    images: Sequence[ImageFile],
    side: int,
    mpp: float | None,
    map_them: Callable[..., Iterator[tuple[ImageFile, Any]]],
) -> list[CheckedImage]:
    """Return the images with the result of decoding each, and its digest.

    They are decoded as well, though only to be decoded again when they are placed:
    which images can be is to be known before they are dealt out and given their places.

    Args:
        images: Images, or cells within them.
        side: To which they will be resized, pixels.
        mpp: Microns per pixel, for what contours measure; None: in pixels.
        map_them: As `medray.execution.rows.map_rows`.
    """
    check = functools.partial(_check_image, side=side, mpp=mpp)
    checked = {}
    for file, result in map_them(check, images):
        if isinstance(result, Exception):
            why = f"{file.uri}: quarantined: opening it: {result}"
            result = _failed(file, why)
        checked[file] = result
        if result.status == "failed":
            said = (file.image, result.message)
            log.warning("stage=ingest image=%s failed: %s", *said)
    noted = Counter(result.note for result in checked.values() if result.note)
    for note, count in noted.items():
        one = next(file.image for file, its in checked.items() if its.note == note)
        log.warning("%d images, such as %s: %s", count, one, note)
    return [checked[file] for file in images]


def _check_image(file: ImageFile, side: int, mpp: float | None) -> CheckedImage:
    try:
        if file.contours is None:
            digest = slide_digest(file.uri)
            _, note = read_noted(file.uri)
            return CheckedImage(file=file, split=file.split, digest=digest, note=note)
        seen = look_at_cell(file, file.contours, mpp)
        read_checked(seen, side)
    except (MedrayError, OSError) as error:
        return _failed(file, f"{error}")
    except MemoryError as error:
        return _failed(file, too_large(file.uri, error))
    return seen


def _failed(file: ImageFile, why: str) -> CheckedImage:
    return CheckedImage(
        file=file, split=file.split, digest="", status="failed", message=why
    )
