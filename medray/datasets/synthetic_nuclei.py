"""Nuclei of a generated field: where they lie, and what each kind looks like."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medray.datasets.synthetic_tissue import Float, smooth_noise

_STAMP = 25  # side of a nucleus' picture, pixels


def jittered_grid(
    rng: np.random.Generator,
    shape: tuple[int, int],
    spacing: float,
    where: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int64]:
    """Return jittered grid positions (n, 2) inside `where`."""
    ys, xs = (np.arange(0, n, spacing) for n in shape)
    points = np.stack(np.meshgrid(ys, xs, indexing="ij"), axis=-1).reshape(-1, 2)
    points = points + rng.uniform(-0.55, 0.55, points.shape) * spacing
    points = np.clip(points.round().astype(np.int64), 0, np.array(shape) - 1)
    points = points[rng.random(len(points)) > 0.12]
    inside: npt.NDArray[np.int64] = points[where[points[:, 0], points[:, 1]]]
    return inside


def place_glands(
    rng: np.random.Generator, where: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Place round glands: their areas, their lumina, positions of their nuclei."""
    shape = where.shape
    glands, lumen = np.zeros(shape, bool), np.zeros(shape, bool)
    nuclei = [np.zeros((0, 2), np.int64)]
    zone = smooth_noise(rng, (shape[0], shape[1]), 300) > -0.2
    for y, x in jittered_grid(rng, (shape[0], shape[1]), 150.0, where & zone):
        radius = rng.uniform(30, 58)
        reach = int(radius * 1.4) + 8
        y0, x0 = max(0, y - reach), max(0, x - reach)
        y1, x1 = min(shape[0], y + reach), min(shape[1], x + reach)
        box = (slice(y0, y1), slice(x0, x1))
        if not where[box].all() or glands[box].any():
            continue
        yy, xx = np.ogrid[box]
        angle = np.arctan2(yy - y, xx - x)
        phase = rng.uniform(0, 2 * np.pi)
        limit = radius * (1 + 0.13 * np.cos(2 * angle + phase))
        distance = np.hypot(yy - y, xx - x)
        glands[box] |= distance < limit + 9
        lumen[box] |= distance < limit - 17
        count = int(2 * np.pi * radius / 8.5)
        turn = np.linspace(0, 2 * np.pi, count, endpoint=False)
        turn = turn + rng.normal(0, 0.03, count)
        away = radius * (1 + 0.13 * np.cos(2 * turn + phase)) + rng.normal(
            0, 1.8, count
        )
        ring = np.stack([y + away * np.sin(turn), x + away * np.cos(turn)], axis=1)
        nuclei.append(ring.round().astype(np.int64))
    points = np.clip(np.concatenate(nuclei), 0, np.array(shape) - 1)
    return glands, lumen, points


def _ellipse(rng: np.random.Generator, a: float, b: float) -> Float:
    """Return 1 inside, 0 outside, soft at the rim, and wobbly: (25, 25)."""
    y, x = np.mgrid[:_STAMP, :_STAMP] - _STAMP // 2 + rng.uniform(-0.5, 0.5, (2, 1, 1))
    turn = rng.uniform(0, np.pi)
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    angle = np.arctan2(v, u)
    wobble = 1 + 0.10 * np.cos(3 * angle + rng.uniform(0, 6)) * min(1.0, b / 6)
    radius = np.hypot(u / a, v / b) / wobble
    soft: Float = np.clip((1 - radius) * min(a, b) + 0.5, 0, 1).astype(np.float32)
    return soft


def spindle(rng: np.random.Generator) -> Float:
    """Small, dark, long: fibroblasts."""
    return _ellipse(rng, rng.uniform(5.0, 7.0), rng.uniform(1.9, 2.8)) * np.float32(
        0.95
    )


def lymphocyte(rng: np.random.Generator) -> Float:
    """Small, round, very dark."""
    size = rng.uniform(3.2, 4.0)
    return _ellipse(rng, size, size) * np.float32(rng.uniform(0.9, 1.15))


def epithelial(rng: np.random.Generator) -> Float:
    """Small, oval: the ordered nuclei of a gland."""
    return _ellipse(rng, rng.uniform(4.4, 5.4), rng.uniform(3.0, 3.8)) * np.float32(0.9)


def vesicular(rng: np.random.Generator) -> Float:
    """Large, pale, with a dark rim and a nucleolus: tumour."""
    a = rng.uniform(6.5, 10.5)
    b = a * rng.uniform(0.65, 1.0)
    body = _ellipse(rng, a, b)
    core = ndimage.gaussian_filter((body > 0.9).astype(np.float32), 1.4)
    nucleus: Any = body * (0.62 - 0.36 * core)
    y, x = _STAMP // 2 + rng.integers(-3, 4, 2)
    nucleus[y - 1 : y + 2, x - 1 : x + 2] = 0.9
    chromatin = rng.standard_normal(nucleus.shape).astype(np.float32)
    speckle = ndimage.gaussian_filter(chromatin, 0.8)
    textured: Float = nucleus + np.float32(0.10) * body * speckle
    return textured


def stamp(
    canvas: Float, points: npt.NDArray[np.int64], draw: Any, rng: np.random.Generator
) -> None:
    """Print nuclei of one kind, of 64 different ones, at `points`."""
    bank = [draw(rng).astype(np.float32) for _ in range(64)]
    half = _STAMP // 2
    height, width = canvas.shape
    kinds = rng.integers(len(bank), size=len(points))
    for (y, x), kind in zip(points.tolist(), kinds.tolist(), strict=True):
        y0, x0 = max(0, y - half), max(0, x - half)
        y1, x1 = min(height, y + half + 1), min(width, x + half + 1)
        part = bank[kind][y0 - y + half : y1 - y + half, x0 - x + half : x1 - x + half]
        target = canvas[y0:y1, x0:x1]
        np.maximum(target, part, out=target)
