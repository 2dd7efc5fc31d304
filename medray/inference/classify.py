"""Classifiers and images of a dataset -> the logits of each.

An actor for each device has the models loaded and is given one sheet after the other;
what a dead one held is done again (medray.execution.actor_pool).
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from medray.datasets.dataset import slide_uri
from medray.errors import MedrayError, StoreError
from medray.execution import cluster
from medray.execution.actor_pool import LostError, Pool, poll
from medray.models.config import TURNS, Tta
from medray.storage import files, ome_zarr
from medray.types import Row, UInt8

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]

_BATCH = 25  # images; what an exported model takes at most
_TIMEOUT_S = 1200.0  # for a sheet of 4096 images on a slow core


def classify(
    models: Sequence[str], data: str, rows: Sequence[Row], tta: Tta = "none"
) -> tuple[list[Row], dict[str, str]]:
    """Run classifiers over images.

    Args:
        models: Model folders of classifiers, whose windows are as large as the images.
        data: Dataset of images.
        rows: Of its patches.parquet; with `measures` (F,) if a model takes them.
        tta: Test-time augmentation, as `load_classifier` has it.

    Returns:
        The rows, with `logits` (models, classes) float64 and `truth` (label value)
        added, those of sheets that cannot be read left out; and why, by sheet.

    Raises:
        MedrayError: A model cannot be loaded, or the store does not answer.
    """
    cluster.connect()
    by_sheet: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_sheet[row["slide"]].append(row)
    todo = deque({"sheet": name, "images": by_sheet[name]} for name in sorted(by_sheet))
    found: dict[str, list[Row]] = {}
    failed: dict[str, str] = {}
    with _start(models, data, tta, len(by_sheet)) as gpu_workers:
        while todo or gpu_workers.busy:
            while todo and gpu_workers.room > 0:
                gpu_workers.give([todo.popleft()])
            for _, sheet, result in poll(gpu_workers):
                name = sheet["sheet"]
                if isinstance(result, LostError):
                    result = f"{name}: classifying it: {result}, three times"
                if isinstance(result, str):
                    failed[name] = result
                    log.warning("stage=evaluate sheet=%s failed: %s", name, result)
                    continue
                found[name] = [
                    row | {"logits": logits, "truth": int(np.argmax(row["class_px"]))}
                    for row, logits in zip(sheet["images"], result, strict=True)
                ]
    return [row for name in sorted(found) for row in found[name]], failed


def load_classifier(
    folder: str, tta: Tta = "none"
) -> Callable[[UInt8, Floats | None], Floats]:
    """Load a model that maps (N, S, S, 3) uint8 RGB and (N, F) to (N, C) logits.

    It works in float32, whatever the device would be faster in: a report must not
    depend on where it was made.

    Args:
        folder: Of a classifier; if it has `morphology`, F are the measures as a dataset
            has them, else they are passed over.
        tta: Also classify images mirrored (`flips`) or mirrored and turned (`all`); the
            logits are then the logarithm of the mean probability.

    Raises:
        ConfigError: The folder is no model folder.
        FormatError: Its weights are damaged.
    """
    # Imported here: the driver needs no torch.
    import torch

    from medray.models.folder import load_model
    from medray.models.network import Network, choose_device

    model, config = load_model(folder)
    device = choose_device()
    network = Network(model, config, device, torch.float32)

    @torch.inference_mode()
    def classify(pixels: UInt8, measures: Floats | None) -> Floats:
        beside = measures if config.morphology else None
        images = torch.from_numpy(pixels).to(device)
        each = []
        for turns, mirror in TURNS[tta]:
            turned = torch.rot90(images, turns, (1, 2))
            turned = turned.flip(2) if mirror else turned
            # A classifier's logits hold for each pixel of the window.
            logits = network(turned.contiguous(), beside)[:, :, 0, 0]
            each.append(logits.double())
        logits = each[0]
        if len(each) > 1:
            logs = torch.stack(each).log_softmax(dim=2)
            logits = logs.logsumexp(dim=0) - math.log(len(each))
        found: Floats = logits.cpu().numpy()
        return found

    return classify


def _start(models: Sequence[str], data: str, tta: Tta, sheets: int) -> Pool:
    if cluster.gpus():
        resources = {"num_gpus": 1.0, "num_cpus": 1.0}
    else:
        resources = {"num_cpus": max(0.5, cluster.cpus_per_node() - 1.0)}
    folders = tuple(files.absolute(model) for model in models)
    actor = ray.remote(_Classifiers).options(**resources)
    start = functools.partial(actor.remote, folders, files.absolute(data), tta)
    gpu_workers = max(1, min(cluster.gpu_workers(), sheets))
    timeout = _TIMEOUT_S * len(TURNS[tta])
    return Pool(start, "work", gpu_workers, timeout=lambda _: timeout)


class _Classifiers:
    """Models on one device."""

    def __init__(self, folders: tuple[str, ...], data: str, tta: Tta) -> None:
        import torch

        torch.set_num_threads(cluster.cpus_per_node())
        self._data = data
        self._models = [load_classifier(folder, tta) for folder in folders]

    def work(self, rows: list[Row]) -> Iterator[list[Any]]:
        """Return (images, models, classes) logits of each sheet, or why it has none."""
        for row in rows:
            try:
                yield [self._logits(row)]
            except StoreError:
                raise  # is no sheet's fault
            except (MedrayError, OSError) as error:
                yield [f"{error}"]

    def _logits(self, row: Row) -> Floats:
        sheet = ome_zarr.open_level(slide_uri(self._data, row["sheet"]))[...]
        parts = []
        for images in itertools.batched(row["images"], _BATCH):
            pixels = np.stack([_cut(sheet, image) for image in images])
            measures = None
            if "measures" in images[0]:
                measures = np.stack([image["measures"] for image in images])
            parts.append(np.stack([m(pixels, measures) for m in self._models], 1))
        return np.concatenate(parts)


def _cut(sheet: UInt8, image: Row) -> UInt8:
    """Take an image out of (3, H, W): (h, w, 3)."""
    y, x = image["y"], image["x"]
    part = sheet[:, y : y + image["height"], x : x + image["width"]]
    return np.moveaxis(part, 0, 2)
