"""Which images of a folder can be decoded, and the digest of each."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from medray.datasets.cells import look_at_cell, read_resized
from medray.errors import MedrayError
from medray.slides import slide_digest, too_large
from medray.types import Row

log = logging.getLogger(__name__)


def check_images(
    images: list[Row], side: int, map_them: Callable[..., Iterator[tuple[Row, Any]]]
) -> None:
    """Add `digest`, `status` and `message` to each image.

    It is decoded as well, though only to be decoded again when it is placed: which
    images can be is to be known before they are dealt out and given their places.

    Args:
        images: Rows of images, or of cells within them.
        side: To which they will be resized, pixels.
        map_them: As `medray.execution.rows.map_rows`.
    """
    check = functools.partial(_check_image, side=side)
    for row, result in map_them(check, images):
        if isinstance(result, Exception):
            result = _failed(f"{row['uri']}: quarantined: opening it: {result}")
        row |= result
        if row["status"] == "failed":
            said = (row["image"], row["message"])
            log.warning("stage=ingest image=%s failed: %s", *said)


def _check_image(row: Row, side: int) -> Row:
    try:
        if "mpp" in row:  # its contours were asked for
            seen = look_at_cell(row)
        else:
            seen = {"digest": slide_digest(row["uri"])}
        read_resized(row | seen, side)
    except (MedrayError, OSError) as error:
        return _failed(f"{error}")
    except MemoryError as error:
        return _failed(too_large(row["uri"], error))
    return seen | {"status": "done", "message": ""}


def _failed(why: str) -> Row:
    return {"digest": "", "status": "failed", "message": why}
