"""Windows to try a model on: of a dataset, of a slide, or generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medray.datasets import SPLITS, draw_scene, read_dataset, read_patches
from medray.errors import ConfigError, SlideError
from medray.models import ModelConfig
from medray.slides import (
    ArraySlide,
    Slide,
    Working,
    choose_level,
    open_slide,
    read_working,
    tissue_share,
)
from medray.storage import files
from medray.training import read_crop
from medray.types import UInt8

_COUNT = {True: 256, False: 32}  # of windows, for classifiers and for segmenters
_MPP_APART = 0.15  # as training and inference have it
_SCENE_PX = 1024  # side of what is generated, at least


@dataclass(frozen=True)
class ProbeWindows:
    """What a model is tried on.

    Attributes:
        pixels: (N, S, S, 3) uint8 RGB.
        labels: (N, S, S) uint8, of a classifier (N, 1, 1); None where not known.
        source: Where they come from, in words.
    """

    pixels: UInt8
    labels: UInt8 | None
    source: str

    def every(self, chosen: slice | npt.NDArray[np.bool_]) -> ProbeWindows:
        """Return some of them."""
        labels = None if self.labels is None else self.labels[chosen]
        return ProbeWindows(self.pixels[chosen], labels, self.source)


def find_windows(config: ModelConfig, data: str, format: str) -> ProbeWindows:
    """Find windows to try a model on: those of a test split before others.

    Args:
        config: Of the model.
        data: Dataset or slide; "": they are generated.
        format: int8 takes half as many more, for its ranges.

    Raises:
        ConfigError: The data do not fit the model, or hold too little.
        SlideError: The slide cannot be read.
    """
    count = _COUNT[config.classifies]
    if format == "int8":
        count = count * 3 // 2
    if not data:
        side = max(_SCENE_PX, 4 * config.window.size)
        scene = ArraySlide(draw_scene(0, height=side, width=side).pixels)
        found = _of_slide(scene, config, count)
        windows = ProbeWindows(found, None, "a generated slide, for want of --data")
    elif files.exists(files.join(data, "dataset.yaml")):
        windows = _of_dataset(data, config, count)
    else:
        with open_slide(data) as slide:
            found = _of_slide(slide, config, count)
        windows = ProbeWindows(found, None, f"slide {data.rsplit('/', 1)[-1]}")
    if len(windows.pixels) < 2:
        raise ConfigError(f"{data}: holds no two windows of tissue to compare on")
    return windows


def _of_dataset(data: str, config: ModelConfig, count: int) -> ProbeWindows:
    """Take crops of annotated patches, spread evenly over a split."""
    classes = read_dataset(data).classes
    if classes != config.classes:
        raise ConfigError(
            f"{data}: its classes {list(classes.names)} are not the model's "
            f"{list(config.classes.names)}"
        )
    for split in reversed(SPLITS):
        rows = [row for row in read_patches(data, split) if row["tissue"] > 0]
        if len(rows) > 1:
            break
    else:
        raise ConfigError(f"{data}: no split holds two annotated patches with tissue")
    mpp = rows[0]["mpp"]
    if mpp and config.mpp and abs(mpp / config.mpp - 1) > _MPP_APART:
        raise ConfigError(
            f"{data}: has {mpp:g} um per pixel, the model works at {config.mpp:g}; "
            f"give a dataset of its resolution, or a slide"
        )
    size, rng = config.window.size, np.random.default_rng(0)
    crops = [read_crop(data, row, size, rng) for row in _spread(rows, count)]
    pixels = np.stack([np.moveaxis(image, 0, 2) for image, _ in crops])
    labels = np.stack([mask for _, mask in crops])
    if config.classifies:
        most = [np.bincount(mask.ravel()).argmax() for mask in labels]
        labels = np.array(most, np.uint8)[:, None, None]
    name = data.rsplit("/", 1)[-1]
    return ProbeWindows(pixels, labels, f"split {split} of dataset {name}")


def _of_slide(slide: Slide, config: ModelConfig, count: int) -> UInt8:
    """Take windows with tissue, spread evenly over a slide."""
    size = config.window.size
    # A generated scene, or a slide that does not say, serves as it is.
    target = config.mpp if slide.mpp else None
    working = choose_level(slide, target, None)
    share = tissue_share(slide, working.height, working.width, size)
    places = _spread(np.argwhere(share > 0).tolist(), count)
    windows = [_window(slide, working, size, *place) for place in places]
    return np.array(windows, np.uint8).reshape(-1, size, size, 3)


def fullest_window(
    slide: Slide, config: ModelConfig, given_mpp: float | None = None
) -> UInt8:
    """Return the window of a slide with the most tissue, (S, S, 3) uint8.

    A slide smaller than a window is continued by its mirror image.

    Raises:
        SlideError: The slide does not suit the model, or is damaged there.
    """
    size = config.window.size
    working = choose_level(slide, config.mpp, given_mpp)
    share = tissue_share(slide, working.height, working.width, size)
    row, column = np.unravel_index(int(share.argmax()), share.shape)
    return _window(slide, working, size, int(row), int(column))


def _window(slide: Slide, working: Working, size: int, row: int, column: int) -> UInt8:
    y, x = row * size, column * size
    height, width = min(size, working.height - y), min(size, working.width - x)
    pixels, damaged, why = read_working(slide, working, y, x, height, width)
    if damaged:
        raise SlideError(f"{slide.uri}: {why}")
    pad = ((0, size - height), (0, size - width), (0, 0))
    return np.pad(pixels, pad, mode="symmetric")


def _spread[T](items: Sequence[T], count: int) -> list[T]:
    """Return so many of them, at equal distances."""
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [items[i] for i in chosen]
