"""A generated H&E-like field: tissue, tumour, nuclei, stain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medray.datasets.synthetic_nuclei import (
    epithelial,
    jittered_grid,
    lymphocyte,
    place_glands,
    spindle,
    stamp,
    vesicular,
)
from medray.datasets.synthetic_tissue import (
    Float,
    Points,
    draw_fibres,
    draw_tissue,
    fill_outlines,
    place_nests,
    place_outlines,
    smooth_noise,
)

# As medray.slides.stains.HED, but to three digits: what is drawn must not change.
_HAEMATOXYLIN = np.array([0.650, 0.704, 0.286])
_EOSIN = np.array([0.072, 0.990, 0.105])
_INKS = ((40, 60, 190), (30, 130, 60), (25, 25, 30))


@dataclass(frozen=True)
class Scene:
    """What was drawn.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
        outlines: Bézier knots of each tumour outline, (n, 2) of y, x in pixels; the
            curve through them is that of `bezier`.
        mask: (H, W) uint8, 1 inside the outlines.
    """

    pixels: npt.NDArray[np.uint8]
    outlines: list[Points]
    mask: npt.NDArray[np.uint8]


Lesions = Literal["large", "small"]
"""One to three areas of 5 to 20 % of the field; or many nests, 1 to 5 % together."""


def draw_scene(
    seed: int,
    *,
    height: int = 2048,
    width: int = 2048,
    tumour: bool = True,
    lesions: Lesions = "large",
    artefacts: bool = True,
) -> Scene:
    """Draw one slide at about 0.5 um per pixel.

    Args:
        seed: Decides everything.
        height: Pixels.
        width: Pixels.
        tumour: Draw tumour areas; False for a healthy slide.
        lesions: How large they are.
        artefacts: Some slides have a small fold, and some a stroke of a marker pen.
    """
    rng = np.random.default_rng(seed)
    shape = (height, width)
    tissue = draw_tissue(rng, shape)
    draw = place_outlines if lesions == "large" else place_nests
    outlines = draw(rng, tissue) if tumour else []
    mask = fill_outlines(outlines, shape)
    inside = mask.astype(bool)
    glands, lumen, ring = place_glands(rng, tissue & ~inside)
    clusters = smooth_noise(rng, shape, 90) > 1.1

    haematoxylin = np.zeros(shape, np.float32)
    stroma = tissue & ~inside & ~glands
    stamp(
        haematoxylin, jittered_grid(rng, shape, 15.5, stroma & ~clusters), spindle, rng
    )
    stamp(
        haematoxylin,
        jittered_grid(rng, shape, 10.5, stroma & clusters),
        lymphocyte,
        rng,
    )
    stamp(haematoxylin, ring, epithelial, rng)
    stamp(
        haematoxylin, jittered_grid(rng, shape, 40.0, inside & tissue), lymphocyte, rng
    )
    stamp(
        haematoxylin, jittered_grid(rng, shape, 19.0, inside & tissue), vesicular, rng
    )

    fibres = draw_fibres(rng, shape)
    mottle = smooth_noise(rng, shape, 60)
    eosin = 0.42 + 0.10 * mottle + 0.13 * fibres * np.where(inside | glands, 0.4, 1.0)
    eosin = np.where(lumen, 0.04, np.clip(eosin, 0.08, None)) * tissue
    bluish = 0.10 + 0.04 * smooth_noise(rng, shape, 45)
    haematoxylin = np.maximum(haematoxylin, np.clip(bluish, 0, None) * tissue)
    haematoxylin[lumen] = 0.02
    if rng.random() < 0.35 and artefacts:
        fold = _fold(rng, shape) & tissue
        haematoxylin[fold] *= 1.5
        eosin[fold] *= 1.7
    pixels = _stain(rng, haematoxylin, eosin.astype(np.float32))
    if rng.random() < 0.35 and artefacts:
        _draw_pen(rng, pixels)
    return Scene(pixels, outlines, mask)


def _stain(rng: np.random.Generator, haematoxylin: Float, eosin: Float) -> Any:
    """Turn stain into light by Beer-Lambert's law, as this slide was stained.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    hue_h, hue_e = rng.normal(0, 0.03, (2, 3))
    strength_h, strength_e = rng.uniform(0.85, 1.2), rng.uniform(0.75, 1.25)
    h = ndimage.gaussian_filter(haematoxylin, 0.7) * np.float32(strength_h)
    e = ndimage.gaussian_filter(eosin, 0.7) * np.float32(strength_e)
    glass = rng.uniform(236, 248) + rng.uniform(-2, 2, 3)
    pixels = np.empty((*h.shape, 3), np.uint8)
    noise = rng.standard_normal(h.shape, dtype=np.float32)
    for channel in range(3):
        per_h = np.float32(_HAEMATOXYLIN[channel] + hue_h[channel])
        per_e = np.float32(_EOSIN[channel] + hue_e[channel])
        light = np.float32(glass[channel]) * np.exp(-(per_h * h + per_e * e))
        light += np.float32(2.0) * np.roll(noise, 7 * channel, axis=channel % 2)
        pixels[..., channel] = np.clip(light, 0, 255)
    return pixels


def _fold(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Return a band where the tissue lies double."""
    along = np.linspace(0, 1, shape[1])
    middle = rng.uniform(0.2, 0.8) + rng.uniform(-0.3, 0.3) * along
    middle = (middle + 0.02 * np.sin(9 * along + rng.uniform(0, 6))) * shape[0]
    band: npt.NDArray[np.bool_] = np.abs(
        np.arange(shape[0])[:, None] - middle
    ) < rng.uniform(8, 16)
    return band


def _draw_pen(rng: np.random.Generator, pixels: npt.NDArray[np.uint8]) -> None:
    """Draw a marker stroke over glass and tissue near a border."""
    height, width = pixels.shape[:2]
    ink = np.array(_INKS[rng.integers(len(_INKS))])
    along = np.linspace(0, 1, 400)
    y = (
        rng.uniform(0.03, 0.12) + 0.03 * np.sin(5 * along + rng.uniform(0, 6))
    ) * height
    x = (rng.uniform(0.05, 0.3) + 0.6 * along) * width
    line = np.ones((height, width), bool)
    line[y.astype(int).clip(0, height - 1), x.astype(int).clip(0, width - 1)] = False
    thick = rng.uniform(0.008, 0.013) * min(height, width)
    top = min(height, int(0.25 * height))
    stroke = ndimage.distance_transform_edt(line[:top]) < thick
    pixels[:top][stroke] = (0.15 * pixels[:top][stroke] + 0.85 * ink).astype(np.uint8)
