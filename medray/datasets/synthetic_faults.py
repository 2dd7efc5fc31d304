"""Slides with known faults: blur, ink, folds, air bubbles, little tissue, staining.

Each function takes the pixels of a slide at 0.5 um per pixel and returns others, by its
seed. They are drawn from what these faults do to light, for tests of slide quality
control: what is found of them says less of slides that laboratories have.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medray.datasets.synthetic_tissue import smooth_noise
from medray.types import UInt8

MPP = 0.5
_INKS = {  # what each transmits of red, green and blue
    "blue": (0.12, 0.20, 0.72),
    "green": (0.10, 0.50, 0.22),
    "red": (0.80, 0.10, 0.16),
    "black": (0.10, 0.10, 0.11),
}
Float = npt.NDArray[np.float32]


def blur(rgb: UInt8, rng: np.random.Generator, sigma_um: float, share: float) -> UInt8:
    """Blur a slide, or a share of its width from one side; the camera's noise stays."""
    width = rgb.shape[1]
    span = round(width * share)
    start = 0 if rng.random() < 0.5 else width - span
    found = rgb.copy()
    for channel in range(3):
        part = rgb[:, start : start + span, channel].astype(np.float32)
        part = ndimage.gaussian_filter(part, sigma_um / MPP)
        part += rng.standard_normal(part.shape, np.float32) * 1.5
        found[:, start : start + span, channel] = np.clip(part, 0, 255)
    return found


def draw_pen(rgb: UInt8, rng: np.random.Generator, color: str) -> UInt8:
    """Draw a stroke of a marker, 60 to 300 um wide, across the slide."""
    stroke = _along(rgb.shape[:2], rng, rng.uniform(30, 150) / MPP)
    cover = ndimage.gaussian_filter(stroke.astype(np.float32), 3) * rng.uniform(0.8, 1)
    return _darkened(rgb, cover, _INKS[color])


def draw_fold(rgb: UInt8, rng: np.random.Generator) -> UInt8:
    """Lay the tissue double along one to three bands, 30 to 120 um wide."""
    found = rgb
    for _ in range(int(rng.integers(1, 4))):
        band = _along(rgb.shape[:2], rng, rng.uniform(15, 60) / MPP)
        band &= (
            ndimage.binary_opening(_tissue(rgb)[::8, ::8], iterations=2)
            .repeat(8, 0)
            .repeat(8, 1)[: rgb.shape[0], : rgb.shape[1]]
        )
        # The other layer is the tissue next to it, and out of focus.
        shift = rng.integers(80, 200, 2)
        over = np.roll(rgb, shift, (0, 1)).astype(np.float32) / 245
        over = ndimage.gaussian_filter(np.minimum(over, 1), (2, 2, 0))
        other = np.where(over.min(axis=2, keepdims=True) > 0.9, rgb / 245.0, over)
        found = np.where(band[..., None], found * np.minimum(other, 1), found)
    return np.clip(found, 0, 255).astype(np.uint8)


def draw_bubbles(rgb: UInt8, rng: np.random.Generator) -> UInt8:
    """Draw one or two air bubbles, 120 to 700 um in diameter: rim, haze, no focus."""
    found = rgb.astype(np.float32)
    y, x = np.ogrid[: rgb.shape[0], : rgb.shape[1]]
    for _ in range(int(rng.integers(1, 3))):
        radius = rng.uniform(60, 350) / MPP
        radius = min(radius, 0.3 * min(rgb.shape[:2]))
        centre = [rng.uniform(1.1 * radius, n - 1.1 * radius) for n in rgb.shape[:2]]
        angle = np.arctan2(y - centre[0], x - centre[1]).astype(np.float32)
        wobble = 1 + 0.06 * np.sin(2 * angle + rng.uniform(0, 6))
        distance = np.hypot(y - centre[0], x - centre[1]) / wobble - radius
        inside = distance < 0
        hazy = 0.75 * ndimage.gaussian_filter(found, (5, 5, 0)) + 0.25 * 225
        found = np.where(inside[..., None], hazy, found)
        rim = np.exp(-((distance / (rng.uniform(6, 15) / MPP)) ** 2))
        found *= 1 - rng.uniform(0.5, 0.85) * rim[..., None]
    return np.clip(found, 0, 255).astype(np.uint8)


def remove_tissue(rgb: UInt8, rng: np.random.Generator) -> UInt8:
    """Leave a crumb of tissue of at most 0.03 mm2, or none."""
    glass = 243 + rng.standard_normal(rgb.shape, np.float32) * 2
    found = np.clip(glass, 0, 255).astype(np.uint8)
    places = np.argwhere(_tissue(rgb)[::16, ::16]) * 16
    side = round(rng.choice([0, 60, 160]) / MPP)
    y, x = places[rng.integers(len(places))] if len(places) else (0, 0)
    part = (slice(y, y + side), slice(x, x + side))
    found[part] = rgb[part]
    return found


def restain(rgb: UInt8, rng: np.random.Generator) -> UInt8:
    """Stain a slide half or twice as strongly."""
    times = rng.choice([rng.uniform(0.35, 0.5), rng.uniform(1.9, 2.4)])
    light = (np.maximum(rgb, 1) / np.float32(245)) ** np.float32(times)
    return np.clip(light * 245, 0, 255).astype(np.uint8)


FAULTS: dict[str, tuple[str, Callable[[UInt8, np.random.Generator], UInt8]]] = {
    "blur 1 um": ("blur", lambda rgb, rng: blur(rgb, rng, 1, 1)),
    "blur 1.5 um": ("blur", lambda rgb, rng: blur(rgb, rng, 1.5, 1)),
    "blur 3 um": ("blur", lambda rgb, rng: blur(rgb, rng, 3, 1)),
    "blur 2 um in part": (
        "blur",
        lambda rgb, rng: blur(rgb, rng, 2, rng.uniform(0.4, 0.7)),
    ),
    "blue pen": ("pen", lambda rgb, rng: draw_pen(rgb, rng, "blue")),
    "green pen": ("pen", lambda rgb, rng: draw_pen(rgb, rng, "green")),
    "red pen": ("pen", lambda rgb, rng: draw_pen(rgb, rng, "red")),
    "black pen": ("pen", lambda rgb, rng: draw_pen(rgb, rng, "black")),
    "folds": ("fold", draw_fold),
    "bubbles": ("bubble", draw_bubbles),
    "little tissue": ("tissue", remove_tissue),
    "stain": ("stain", restain),
}
"""Functions of pixels and a generator, with the kind of their fault, by name."""


def _tissue(rgb: UInt8) -> npt.NDArray[np.bool_]:
    return rgb.max(axis=2) - rgb.min(axis=2) > 20


def _along(
    shape: tuple[int, int], rng: np.random.Generator, half_px: float
) -> npt.NDArray[np.bool_]:
    """Return a wavy band across an image, in any direction."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    turn = rng.uniform(0, np.pi)
    offset = rng.uniform(-0.25, 0.25) * min(shape)
    across = (y - shape[0] / 2) * np.cos(turn) + (x - shape[1] / 2) * np.sin(turn)
    along = (x - shape[1] / 2) * np.cos(turn) - (y - shape[0] / 2) * np.sin(turn)
    wave = 0.04 * min(shape) * np.sin(along / (0.1 * min(shape)) + rng.uniform(0, 6))
    ragged = 1 + 0.15 * smooth_noise(rng, shape, 120)
    band: npt.NDArray[np.bool_] = np.abs(across - offset - wave) < half_px * ragged
    return band


def _darkened(rgb: UInt8, cover: Float, transmits: tuple[float, ...]) -> UInt8:
    """Return pixels darkened by ink, where it covers them."""
    ink = 1 - cover[..., None] * (1 - np.asarray(transmits, np.float32))
    return np.clip(rgb * ink, 0, 255).astype(np.uint8)
