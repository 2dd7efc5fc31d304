"""Crops of a dataset's patches, cut straight from the zarr chunks, as typed batches.

Without torch, so that the processes that read start quickly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medray.datasets import labels_uri, read_dataset, slide_uri
from medray.errors import FormatError
from medray.storage import group_attributes, ome_zarr, read_part
from medray.training.sampler import (
    Sampling,
    crop_of_epoch,
    order_of_epoch,
    usable_patches,
)
from medray.types import Row, UInt8

_TRIES = 20  # other patches that are drawn in place of a damaged one
_VAL_PX = 4 * 512**2  # pixels of validation patches that are predicted at once


type Stack = Callable[[Sequence[UInt8]], UInt8]
"""What makes one array of several of the same shape, as `np.stack` does."""


@dataclass(frozen=True)
class Batch:
    """Crops that go through the network together, from where they are read to the step.

    Attributes:
        images: (N, 3, S, S) uint8.
        masks: (N, S, S) uint8.
        patches: (N,) index of the patch of each.
        sizes: (N, 2) height and width that count; beyond is mirror image.
        damaged: What could not be read, by patch; others stand in its place.
        unlabelled: (N, 3, S, S) uint8 of slides without annotation, where the recipe
            wants them; else None.
    """

    images: UInt8
    masks: UInt8
    patches: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    damaged: dict[str, str]
    unlabelled: UInt8 | None = None


# --- a crop ---------------------------------------------------------------------------

_settings = functools.lru_cache(maxsize=4)(read_dataset)


# Crops come from all slides in turn: with fewer, each would be opened for each crop.
@functools.lru_cache(maxsize=4096)
def _arrays(data: str, slide: str) -> tuple[ome_zarr.Pixels, ome_zarr.Pixels | None]:
    """Keep what is known of the slides' arrays; no file stays open."""
    image = ome_zarr.open_level(slide_uri(data, slide))
    uri = labels_uri(data, slide)
    labelled = group_attributes.read_attributes(uri) is not None
    return image, ome_zarr.open_level(uri) if labelled else None


def place_crop(
    patch: Row,
    side: int,
    size: tuple[int, int],
    rng: np.random.Generator,
    around: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Choose the top left corner (y, x) of a crop, in pixels of the slide.

    A crop that is smaller than the patch lies within it, a larger one holds it; both
    lie within the slide as far as that is large enough.

    Args:
        patch: Row of patches.parquet.
        side: Of the crop.
        size: Height and width of the slide.
        rng: Draws among the places that are possible.
        around: Pixel (y, x) of the slide that the crop is to hold.
    """
    corner = []
    for axis, (start, extent) in enumerate(
        ((patch["y"], patch["height"]), (patch["x"], patch["width"]))
    ):
        first, last = sorted((start, start + extent - side))
        if around is not None:
            first = max(first, around[axis] - side + 1)
            last = min(last, around[axis])
        within = max(0, size[axis] - side)
        first, last = min(max(first, 0), within), min(max(last, 0), within)
        corner.append(int(rng.integers(first, last + 1)))
    return corner[0], corner[1]


def _read_place(array: ome_zarr.Pixels, y: int, x: int, side: int) -> UInt8:
    """Read a square; beyond the slide's end it goes on as its mirror image."""
    height, width = min(side, array.shape[-2] - y), min(side, array.shape[-1] - x)
    part = read_part(array, y, x, height, width)
    pad = ((0, 0),) * (part.ndim - 2) + ((0, side - height), (0, side - width))
    return np.pad(part, pad, mode="symmetric")


def read_crop(
    data: str, patch: Row, side: int, rng: np.random.Generator, label: int | None = None
) -> tuple[UInt8, UInt8]:
    """Read pixels (3, side, side) and labels (side, side) of a crop of a patch.

    Args:
        data: The dataset.
        patch: Row of patches.parquet.
        side: Of the crop in pixels.
        rng: Chooses the place.
        label: Class that the crop is to hold a pixel of.

    Raises:
        FormatError: What is stored is damaged.
        StoreError: It cannot be reached.
    """
    image, labels = _arrays(data, patch["slide"])
    size = (int(image.shape[1]), int(image.shape[2]))
    around = None
    if label is not None and labels is not None and _only_class(patch) is None:
        top, left = patch["y"], patch["x"]
        whole = read_part(labels, top, left, patch["height"], patch["width"])
        found = np.flatnonzero(whole == label)
        if len(found):
            y, x = divmod(int(found[rng.integers(len(found))]), whole.shape[1])
            around = (top + y, left + x)
    y, x = place_crop(patch, side, size, rng, around)
    return _read_pair(data, patch, y, x, side)


def _only_class(patch: Row) -> int | None:
    """Return the class that all pixels of a patch have, as those of a cell do."""
    area = patch["height"] * patch["width"]
    return next((c for c, px in enumerate(patch["class_px"]) if px == area), None)


def _read_pair(data: str, patch: Row, y: int, x: int, side: int) -> tuple[UInt8, UInt8]:
    """Read pixels and labels of a crop of a patch; no label image: zeros."""
    image, labels = _arrays(data, patch["slide"])
    pixels = _read_place(image, y, x, side)
    if labels is None:
        return pixels, np.zeros((side, side), np.uint8)
    only = _only_class(patch)
    if only is not None and side <= min(patch["height"], patch["width"]):
        return pixels, np.full((side, side), only, np.uint8)  # it lies in the patch
    return pixels, _read_place(labels, y, x, side)


# --- batches --------------------------------------------------------------------------


def name_of(patch: Row) -> str:
    """Name a patch in messages."""
    return f"{patch['slide']} at y={patch['y']}, x={patch['x']}"


def read_train(
    data: str,
    sampling: Sampling,
    epoch: int,
    first: int,
    losses: bytes = b"",
    stack: Stack = np.stack,
) -> Batch:
    """Read the crops of a micro batch, from place `first` of an epoch's order.

    Raises:
        FormatError: One damaged patch comes after the other, or a label is none of the
            dataset's classes.
    """
    patches = usable_patches(data, "train", sampling.data)
    drawn = order_of_epoch(data, sampling, epoch, losses)
    classes = len(_settings(data).classes)
    side = crop_of_epoch(sampling, epoch)
    pairs, indices, damaged = [], [], {}
    for place in range(first, first + sampling.micro_batch_size):
        rng = np.random.default_rng((sampling.seed, epoch, place))
        index, label = drawn[place].tolist()
        for _ in range(_TRIES):
            wanted = label if label < classes else None
            try:
                pair = read_crop(data, patches[index], side, rng, wanted)
            except FormatError as error:
                damaged[name_of(patches[index])] = f"{error}"
                index, label = int(rng.integers(len(patches))), classes
                continue
            break
        else:
            raise FormatError(
                f"{data}: {_TRIES} patches in a row could not be read; the last: "
                f"{list(damaged.values())[-1]}"
            )
        _check_labels(pair[1], classes, data, patches[index])
        pairs.append(pair)
        indices.append(index)
    images, masks = (stack(part) for part in zip(*pairs, strict=True))
    sizes = np.full((len(pairs), 2), side)
    unlabelled = None
    if sampling.unlabelled:
        unlabelled = read_unlabelled(data, sampling, epoch, first, stack)
    return Batch(images, masks, np.array(indices), sizes, damaged, unlabelled)


def _check_labels(mask: UInt8, classes: int, data: str, patch: Row) -> None:
    if mask.max(initial=0) >= classes:
        raise FormatError(
            f"{labels_uri(data, patch['slide'])}: label {mask.max()} near "
            f"y={patch['y']}, x={patch['x']}, but the dataset has {classes} classes (0 "
            f"to {classes - 1}); ingest the slide again with all its classes"
        )


def read_unlabelled(
    data: str, sampling: Sampling, epoch: int, first: int, stack: Stack = np.stack
) -> UInt8:
    """Read crops (N, 3, S, S) of slides without annotation.

    Raises:
        FormatError: One damaged patch comes after the other.
    """
    patches = usable_patches(data, "", sampling.data)
    side = crop_of_epoch(sampling, epoch)
    crops = []
    for place in range(first, first + sampling.micro_batch_size):
        rng = np.random.default_rng((sampling.seed, epoch, place, 1))
        problem: FormatError | None = None
        for _ in range(_TRIES):
            patch = patches[int(rng.integers(len(patches)))]
            try:
                crops.append(read_crop(data, patch, side, rng)[0])
            except FormatError as error:
                problem = error
                continue
            break
        else:
            raise FormatError(f"{_TRIES} patches in a row are damaged: {problem}")
    return stack(crops)


def read_val(
    data: str, sampling: Sampling, first: int, count: int, stack: Stack = np.stack
) -> Batch:
    """Read whole validation patches; damaged ones are left out.

    Raises:
        FormatError: A label is none of the dataset's classes.
    """
    patches = usable_patches(data, "val", sampling.data)
    settings = _settings(data)
    classes, side = len(settings.classes), settings.patch
    pairs, kept, damaged = [], [], {}
    for index in range(first, min(first + count, len(patches))):
        patch = patches[index]
        try:
            pair = _read_pair(data, patch, patch["y"], patch["x"], side)
        except FormatError as error:
            damaged[name_of(patch)] = f"{error}"
            continue
        _check_labels(pair[1], classes, data, patch)
        pairs.append(pair)
        kept.append(index)
    if not pairs:
        nothing = np.zeros((0, 3, side, side), np.uint8)
        none = np.zeros((0, 2), np.int64)
        return Batch(nothing, nothing[:, 0], none[:, 0], none, damaged)
    images, masks = (stack(part) for part in zip(*pairs, strict=True))
    sizes = np.array([(patches[i]["height"], patches[i]["width"]) for i in kept])
    return Batch(images, masks, np.array(kept), sizes, damaged)


def val_batch_size(data: str) -> int:
    """Return how many validation patches are predicted at once: 4 of 512 px."""
    return max(1, _VAL_PX // read_dataset(data).patch ** 2)


def count_val_batches(data: str, sampling: Sampling) -> int:
    """Return how many batches the validation patches make."""
    return -(-len(usable_patches(data, "val", sampling.data)) // val_batch_size(data))


def read_val_sample(data: str, sampling: Sampling, count: int) -> list[Batch]:
    """Read about `count` validation patches, spread evenly."""
    size, batches = val_batch_size(data), count_val_batches(data, sampling)
    most = max(1, count // size)
    chosen = np.linspace(0, batches - 1, min(batches, most)).round().astype(int)
    return [read_val(data, sampling, int(at) * size, size) for at in chosen]
