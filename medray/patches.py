"""Patches of a dataset in training's order, cut straight from the zarr chunks.

Without torch, so that the workers that read start quickly.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.dataset import labels_uri, read_patches, slide_uri
from medray.recipe import Recipe
from medray.store import omezarr

Row = dict[str, Any]


@functools.lru_cache(maxsize=4)
def usable_patches(data: str, split: str, recipe: Recipe) -> list[Row]:
    """Give the patches of a split with enough tissue, in a fixed order."""
    rows = [
        row
        for row in read_patches(data, split)
        if row["tissue"] >= recipe.data.min_tissue or any(row["class_px"][1:])
    ]
    return sorted(rows, key=lambda row: (row["slide"], row["y"], row["x"]))


@functools.lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng((seed, epoch)).permutation(count)


def _sample(recipe: Recipe, patches: list[Row], position: int) -> tuple[Row, int, int]:
    """Give patch and crop (y, x) of a place in the endless order of samples."""
    epoch, index = divmod(position, len(patches))
    patch = patches[_permutation(len(patches), recipe.seed, epoch)[index]]
    rng = np.random.default_rng((recipe.seed, epoch, index))
    y, x = (
        int(rng.integers(max(1, patch[side] - recipe.data.crop + 1)))
        for side in ("height", "width")
    )
    return patch, y, x


@functools.lru_cache(maxsize=64)
def _arrays(data: str, slide: str) -> tuple[Any, Any]:
    """Keep the arrays of the slides at hand open."""
    image = omezarr.open_level(slide_uri(data, slide))
    return image, omezarr.open_level(labels_uri(data, slide))


def _read_crop(
    data: str, patch: Row, y: int, x: int, side: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Read pixels (3, side, side) and labels (side, side) of a patch.

    Patches at the slide's border may be smaller; they are continued by their mirror
    image, as inference does.
    """
    image, labels = _arrays(data, patch["slide"])
    height, width = min(side, patch["height"] - y), min(side, patch["width"] - x)
    top, left = patch["y"] + y, patch["x"] + x
    place = (slice(top, top + height), slice(left, left + width))
    pad = ((0, side - height), (0, side - width))
    pixels = np.pad(image[:, *place], ((0, 0), *pad), mode="symmetric")
    return pixels, np.pad(labels[place], pad, mode="symmetric")


def read_train(batch: Row, *, recipe: Recipe, data: str, rank: int) -> Row:
    """Read the crops at places `id * workers + rank` of the order."""
    patches = usable_patches(data, "train", recipe)
    pairs = []
    for position in batch["id"]:
        sample = _sample(recipe, patches, int(position) * recipe.workers + rank)
        pairs.append(_read_crop(data, *sample, recipe.data.crop))
    return {
        "image": np.stack([image for image, _ in pairs]),
        "mask": np.stack([mask for _, mask in pairs]),
    }


def read_val(batch: Row, *, recipe: Recipe, data: str, rank: int) -> Row:
    """Read whole validation patches."""
    patches = usable_patches(data, "val", recipe)
    side = omezarr.PATCH
    chosen = [patches[int(i) * recipe.workers + rank] for i in batch["id"]]
    pairs = [_read_crop(data, patch, 0, 0, side) for patch in chosen]
    return {
        "image": np.stack([image for image, _ in pairs]),
        "mask": np.stack([mask for _, mask in pairs]),
        "height": np.array([patch["height"] for patch in chosen]),
        "width": np.array([patch["width"] for patch in chosen]),
    }
