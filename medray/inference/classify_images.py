"""Run classifiers over the images of a dataset: models and images -> logits.

One process per device keeps the models loaded and is given one sheet after another.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.datasets import slide_uri
from medray.errors import StoreError
from medray.execution import map_rows
from medray.geometry import Rectangle
from medray.models import TURNS, Tta, model_digest
from medray.storage import files, ome_zarr
from medray.types import Executor, Row, UInt8

log = logging.getLogger(__name__)
Floats = npt.NDArray[np.float64]

_BATCH = 25  # images; what an exported model takes at most
_TIMEOUT_S = 1200.0  # for a sheet of 4096 images on a slow core


@dataclass(frozen=True, eq=False, kw_only=True)
class DatasetImage:
    """An image of a dataset.

    Attributes:
        image: Name of the image.
        digest: Digest of the file's bytes.
        patient: Patient that it is of.
        split: Split that it is in.
        sheet: Id of the sheet that holds its pixels.
        place: Position on the sheet.
        truth: Label value.
        measures: (F,) second input of a model, in addition to the pixels; None: no
            model takes one.
    """

    image: str
    digest: str
    patient: str
    split: str
    sheet: str
    place: Rectangle
    truth: int
    measures: Floats | None = None


@dataclass(frozen=True, eq=False)
class ClassifiedImage:
    """An image and the models' logits for it.

    Attributes:
        image: The image.
        logits: (models, classes) float64.
    """

    image: DatasetImage
    logits: Floats


def image_of_row(row: Row, measures: Floats | None = None) -> DatasetImage:
    """Return the image of a row of patches.parquet."""
    return DatasetImage(
        image=row["image"],
        digest=row["digest"],
        patient=row["patient"],
        split=row["split"],
        sheet=row["slide"],
        place=Rectangle(row["y"], row["x"], row["height"], row["width"]),
        truth=int(np.argmax(row["class_px"])),
        measures=measures,
    )


def classify(
    models: Sequence[str],
    data: str,
    images: Sequence[DatasetImage],
    tta: Tta,
    executor: Executor,
) -> tuple[list[ClassifiedImage], dict[str, str]]:
    """Run classifiers over images.

    Args:
        models: Model folders of classifiers whose input is as large as the images.
        data: Dataset of the images.
        images: Images to classify, with measures if a model takes them.
        tta: Test-time augmentation, see `load_classifier`.
        executor: On a Ray cluster, or in this process.

    Returns:
        The classified images, in the order of their sheets; and the error of each sheet
        that could not be read, whose images are left out.

    Raises:
        MedrayError: A model cannot be loaded, or the store does not answer.
    """
    by_sheet: dict[str, list[DatasetImage]] = defaultdict(list)
    for image in images:
        by_sheet[image.sheet].append(image)
    folders = tuple(files.absolute(model) for model in models)
    threads = 0
    if executor == "ray":
        from medray.execution import cluster

        cluster.connect()
        threads = cluster.cpus_per_node()
    digests = tuple(model_digest(folder) for folder in folders)
    models_of = _Models(folders, digests, threads)
    found: dict[str, list[ClassifiedImage]] = {}
    failed: dict[str, str] = {}
    for (name, some), result in map_rows(
        functools.partial(_logits, models_of, files.absolute(data), tta),
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
            ClassifiedImage(image, logits)
            for image, logits in zip(some, result, strict=True)
        ]
    return [image for name in sorted(found) for image in found[name]], failed


def load_classifier(
    folder: str, tta: Tta = "none"
) -> Callable[[UInt8, Floats | None], Floats]:
    """Return a function from (N, S, S, 3) uint8 RGB and (N, F) to (N, C) logits.

    It computes in float32 on every device, so that a report does not depend on the
    machine that made it.

    Args:
        folder: Model folder of a classifier. If the model has `morphology`, (N, F) are
            the measures as stored in the dataset; otherwise they are ignored.
        tta: Also classify images mirrored (`flips`) or mirrored and rotated (`all`);
            the logits are then the logarithm of the mean probability.

    Raises:
        ConfigError: The folder is no model folder.
        FormatError: Its weights are damaged.
    """
    # Imported here: the driver needs no torch.
    import torch

    from medray.models import Network, choose_device, load_model

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


@dataclass(frozen=True)
class _Models:
    """Models to load in a process; digests distinguish a retrained model."""

    folders: tuple[str, ...]
    digests: tuple[str, ...]
    threads: int  # 0: as many as torch has


@functools.lru_cache(maxsize=1)
def _classifiers(models: _Models, tta: Tta) -> tuple[Any, ...]:
    """Return the models, loaded on this process's device."""
    import torch

    if models.threads:
        torch.set_num_threads(models.threads)
    return tuple(load_classifier(folder, tta) for folder in models.folders)


def _logits(
    models_of: _Models, data: str, tta: Tta, sheet: tuple[str, list[DatasetImage]]
) -> Floats:
    """Return the logits (images, models, classes) of the images of a sheet."""
    name, images = sheet
    models = _classifiers(models_of, tta)
    pixels_of_all = ome_zarr.open_level(slide_uri(data, name))[...]
    parts = []
    for some in itertools.batched(images, _BATCH):
        pixels = np.stack([_cut(pixels_of_all, image) for image in some])
        beside = [image.measures for image in some if image.measures is not None]
        measures = np.stack(beside) if beside else None
        parts.append(np.stack([m(pixels, measures) for m in models], 1))
    return np.concatenate(parts)


def _cut(sheet: UInt8, image: DatasetImage) -> UInt8:
    """Return an image (h, w, 3) of a sheet (3, H, W)."""
    return np.moveaxis(sheet[(slice(None), *image.place.slices())], 0, 2)
