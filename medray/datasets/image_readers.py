"""Actors that decode images and write sheets; images may end their processes."""

from __future__ import annotations

import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ray

from medray.datasets.cells import look_at_cell, read_resized
from medray.datasets.contact_sheets import write_sheet
from medray.datasets.dataset import DatasetSettings
from medray.errors import MedrayError
from medray.execution.actor_pool import LostError, Pool, poll
from medray.execution.failures import bound_memory, too_large
from medray.slides.fingerprint import slide_digest
from medray.types import Row

log = logging.getLogger(__name__)

_BATCH = 64  # images that a process looks at in one call
_TIMEOUT_S = 300.0  # for one of them, or for a sheet


class _Reader:
    """Checks images, and later writes sheets of them."""

    def __init__(self, settings: DatasetSettings, out: str) -> None:
        bound_memory()
        self._settings, self._out = settings, out

    def work(self, rows: list[Row]) -> Iterator[list[Any]]:
        """Yield what was found of an image, or where a sheet's images are."""
        for row in rows:
            if "images" in row:
                yield [write_sheet(row, self._settings, self._out)]
            else:
                yield [_check_image(row, self._settings.patch)]


def start_readers(settings: DatasetSettings, out: str) -> Pool:
    """Start one reader per core."""
    actor = ray.remote(_Reader).options(num_cpus=0.75)
    cpus = int(ray.cluster_resources().get("CPU", 1))
    start = functools.partial(actor.remote, settings, out)
    return Pool(start, "work", max(1, cpus), timeout=lambda _: _TIMEOUT_S)


def read_each(
    rows: list[Row], readers: Pool, batch: int, go_on: Callable[[], None]
) -> Iterator[tuple[Row, Any]]:
    """Yield each row with its result, in the order in which they end."""
    todo = deque(itertools.batched(rows, batch))
    while todo or readers.busy:
        go_on()
        while todo and readers.room > 0:
            readers.give(list(todo.popleft()))
        for _, row, result in poll(readers):
            yield row, result


def check_images(images: list[Row], readers: Pool, go_on: Callable[[], None]) -> None:
    """Add `digest`, `status` and `message` to each image.

    It is decoded as well, though only to be decoded again when it is placed: which
    images can be is to be known before they are dealt out and given their places.
    """
    for row, result in read_each(images, readers, _BATCH, go_on):
        if isinstance(result, LostError):
            why = f"{row['uri']}: quarantined: opening it: {result}, three times"
            result = _failed(why)
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
        return _failed(too_large(row, error))
    return seen | {"status": "done", "message": ""}


def _failed(why: str) -> Row:
    return {"digest": "", "status": "failed", "message": why}
