"""Whether stitching can be trusted: checks for any engine for whole slides.

An engine is a function from pixels, model and windows to a mask. The models below make
the right mask known beforehand: one sees its own input, one sees a constant, one is
wrong near the border of its window as convolutions are. `check_engine` needs nothing
but the engine; what only medray promises (regions, weights, workers) is checked by
`conformance_medray`. docs/conformance.md shows the results, other engines' among them.

Neither Ray nor medray's own engine is imported, so that this file runs in another
engine's environment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from medray.geometry import Windows
from medray.types import UInt8

Engine = Callable[[UInt8, nn.Module, Windows, int], UInt8]
"""(H, W, 3) uint8 pixels, a model, windows and a batch size to a (H, W) uint8 mask. The
model maps (N, 3, S, S) float32 of 0 to 255 to (N, CLASSES, S, S) probabilities.
"""

CLASSES = 4
WINDOWS = Windows(128, 96)
# Smaller than a window, thinner than one, no multiple of the stride, and one.
SIZES = ((100, 90), (129, 64), (300, 411), (320, 320))


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        name: Of the check.
        asked: What must hold.
        passed: Whether it does.
        found: What was seen.
    """

    name: str
    asked: str
    passed: bool
    found: str

    def __str__(self) -> str:
        state = "ok    " if self.passed else "FAILED"
        found = "" if self.passed else f": {self.found}"
        return f"{state} {self.name:18} {self.asked}{found}"


class Identity(nn.Module):
    """A model that predicts the class that the red channel names."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return certainty of class `red` at each pixel."""
        # What an engine pads with may be no class.
        red = pixels[:, 0].round().long().clamp(0, CLASSES - 1)
        hot = nn.functional.one_hot(red, CLASSES)
        return hot.permute(0, 3, 1, 2).float()


class Constant(nn.Module):
    """A model that predicts class 3 everywhere."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return certainty of class 3 at each pixel."""
        n, _, height, width = pixels.shape
        scores = torch.zeros(n, CLASSES, height, width)
        scores[:, 3] = 1
        return scores


class WrongAtBorders(nn.Module):
    """A model that predicts class 0 up to `border` pixels from the border, else 1."""

    def __init__(self, border: int) -> None:
        super().__init__()
        self.border = border

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return certainty at each pixel, of the right class or of the wrong one."""
        n, _, height, width = pixels.shape
        scores = torch.zeros(n, CLASSES, height, width)
        scores[:, 0] = 1
        inside = slice(self.border, -self.border)
        scores[:, 1, inside, inside], scores[:, 0, inside, inside] = 1, 0
        return scores


class Network(nn.Module):
    """A small convolutional network of random weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 7, padding=3), nn.ReLU(), nn.Conv2d(16, CLASSES, 7, 1, 3)
        )
        for weights in self.parameters():
            weights.data = torch.randn(weights.shape, generator=generator) / 7
        self.requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return softmax probabilities."""
        return torch.softmax(self.layers(pixels / 255), dim=1)


class Counting(nn.Module):
    """A model that counts the windows that it receives."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.windows = Constant(), 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Count the windows, and predict class 3."""
        self.windows += len(pixels)
        scores: torch.Tensor = self.model(pixels)
        return scores


def labels_like(height: int, width: int, seed: int = 0) -> UInt8:
    """Draw (height, width) labels, blocky enough to show a shift by one pixel."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, CLASSES, (height // 5 + 1, width // 5 + 1), np.uint8)
    return blocks.repeat(5, 0).repeat(5, 1)[:height, :width]


def pixels_like(height: int, width: int, seed: int = 0) -> UInt8:
    """Draw (height, width, 3) pixels with a bit of structure."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width]


def check_engine(engine: Engine) -> list[Check]:
    """Run the checks on an engine; an exception fails the check that raised it."""
    return [
        run_check(
            "identity", "what the model sees is the mask, at any size", _identity
        )(engine),
        run_check(
            "constant", "no pixel is left out, borders and corners too", _constant
        )(engine),
        run_check(
            "borders", "no seam where windows are wrong near their borders", _borders
        )(engine),
        run_check(
            "batches", "the batch size changes at most 1e-4 of the pixels", _batches
        )(engine),
        run_check("repeat", "the same slide gives the same bits", _repeat)(engine),
        run_check("input", "the caller's pixels are not changed", _input)(engine),
        run_check("windows", "2048 x 2048 at 512 and 384 takes 25 windows", _windows)(
            engine
        ),
    ]


def run_check(name: str, asked: str, check: Callable[..., str]) -> Callable[..., Check]:
    """Turn a function that returns what is wrong ("" if nothing) into a check."""

    def run(*args: Any) -> Check:
        try:
            wrong = check(*args)
        except Exception as error:  # an engine may raise anything
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check(name, asked, not wrong, wrong or "as asked")

    return run


def as_pixels(labels: UInt8) -> UInt8:
    """Return labels as grey RGB."""
    return np.repeat(labels[..., None], 3, axis=2)


def describe_wrong(mask: UInt8, truth: UInt8) -> str:
    """Return what is wrong with a mask; "" if nothing."""
    if mask.shape != truth.shape:
        return f"mask of {mask.shape} for a slide of {truth.shape}"
    share = float((mask != truth).mean())
    return f"{share:.2%} of the pixels are wrong" if share else ""


def _identity(engine: Engine) -> str:
    def check(size: tuple[int, int]) -> str:
        labels = labels_like(*size)
        return describe_wrong(engine(as_pixels(labels), Identity(), WINDOWS, 4), labels)

    return _at_all_sizes(check)


def _constant(engine: Engine) -> str:
    def check(size: tuple[int, int]) -> str:
        mask = engine(pixels_like(*size), Constant(), WINDOWS, 4)
        return describe_wrong(mask, np.full(size, 3, np.uint8))

    return _at_all_sizes(check)


def _at_all_sizes(check: Callable[[tuple[int, int]], str]) -> str:
    found = []
    for height, width in SIZES:
        run = run_check("", "", check)((height, width))
        if not run.passed:
            found.append(f"{height} x {width}: {run.found}")
    return "; ".join(found)


def _borders(engine: Engine) -> str:
    border = 8  # half of it lies in the overlap of 32 px on either side of its middle
    mask = engine(pixels_like(416, 416), WrongAtBorders(border), WINDOWS, 4)
    inside = mask[border:-border, border:-border]
    return describe_wrong(inside, np.ones(inside.shape, np.uint8))


def _batches(engine: Engine) -> str:
    pixels = pixels_like(300, 411)
    masks = [engine(pixels, Network(), WINDOWS, batch) for batch in (1, 5)]
    share = float((masks[0] != masks[1]).mean())
    return f"{share:.2%} of pixels differ" if share > 1e-4 else ""


def _repeat(engine: Engine) -> str:
    pixels = pixels_like(300, 411)
    return describe_wrong(*(engine(pixels, Network(), WINDOWS, 4) for _ in range(2)))


def _input(engine: Engine) -> str:
    pixels = pixels_like(320, 320)
    before = pixels.copy()
    engine(pixels, Network(), WINDOWS, 1)
    changed = float((pixels != before).mean())
    return f"{changed:.2%} of the pixels were changed" if changed else ""


def _windows(engine: Engine) -> str:
    model = Counting()
    engine(pixels_like(2048, 2048), model, Windows(512, 384), 1)
    return f"{model.windows} windows" if model.windows != 25 else ""
