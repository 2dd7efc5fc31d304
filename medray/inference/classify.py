"""Classifiers and images of a dataset -> the logits of each.

A process for each device keeps the models loaded and gets one sheet after the other.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.datasets.dataset import slide_uri
from medray.errors import StoreError
from medray.execution.rows import map_rows
from medray.execution.run import Executor
from medray.models.config import TURNS, Tta
from medray.storage import files, ome_zarr
from medray.types import Row

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]

_BATCH = 25  # images; what an exported model takes at most
_TIMEOUT_S = 1200.0  # for a sheet of 4096 images on a slow core


def classify(
    models: Sequence[str],
    data: str,
    rows: Sequence[Row],
    tta: Tta = "none",
    executor: Executor = "ray",
) -> tuple[list[Row], dict[str, str]]:
    """Run classifiers over images.

    Args:
        models: Model folders of classifiers, whose windows are as large as the images.
        data: Dataset of images.
        rows: Of its patches.parquet; with `measures` (F,) if a model takes them.
        tta: Test-time augmentation, as `medray.models.classify` has it.
        executor: On a Ray cluster, or in this process.

    Returns:
        The rows, with `logits` (models, classes) float64 and `truth` (label value)
        added, those of sheets that cannot be read left out; and why, by sheet.

    Raises:
        MedrayError: A model cannot be loaded, or the store does not answer.
    """
    by_sheet: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_sheet[row["slide"]].append(row)
    folders = tuple(files.absolute(model) for model in models)
    found: dict[str, list[Row]] = {}
    failed: dict[str, str] = {}
    for (name, images), result in map_rows(
        functools.partial(_logits, folders, files.absolute(data), tta),
        sorted(by_sheet.items()),
        executor=executor,
        device=True,
        timeout=_TIMEOUT_S * len(TURNS[tta]),
    ):
        if isinstance(result, StoreError):
            raise result  # is no sheet's fault
        if isinstance(result, Exception):
            failed[name] = f"{result}"
            log.warning("stage=evaluate sheet=%s failed: %s", name, result)
            continue
        found[name] = [
            row | {"logits": logits, "truth": int(np.argmax(row["class_px"]))}
            for row, logits in zip(images, result, strict=True)
        ]
    return [row for name in sorted(found) for row in found[name]], failed


@functools.lru_cache(maxsize=1)
def _classifiers(folders: tuple[str, ...], tta: Tta) -> tuple[Any, ...]:
    """Load the models onto this process's device."""
    # Imported here: the driver needs no torch.
    import torch

    from medray.models.classify import load_classifier

    torch.set_num_threads(os.cpu_count() or 1)
    return tuple(load_classifier(folder, tta) for folder in folders)


def _logits(
    folders: tuple[str, ...], data: str, tta: Tta, sheet: tuple[str, list[Row]]
) -> Floats:
    """Return the logits (images, models, classes) of the images of a sheet."""
    name, images = sheet
    models = _classifiers(folders, tta)
    pixels_of_all = ome_zarr.open_level(slide_uri(data, name))[...]
    parts = []
    for some in itertools.batched(images, _BATCH):
        pixels = np.stack([_cut(pixels_of_all, image) for image in some])
        measures = None
        if "measures" in some[0]:
            measures = np.stack([image["measures"] for image in some])
        parts.append(np.stack([m(pixels, measures) for m in models], 1))
    return np.concatenate(parts)


def _cut(sheet: npt.NDArray[np.uint8], image: Row) -> npt.NDArray[np.uint8]:
    """Take an image out of (3, H, W): (h, w, 3)."""
    y, x = image["y"], image["x"]
    part = sheet[:, y : y + image["height"], x : x + image["width"]]
    return np.moveaxis(part, 0, 2)
