"""Where tissue and tumour lie in a generated field."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from rasterio import features
from scipy import ndimage
from shapely.geometry import Polygon

Float = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]  # (n, 2) of y, x in level-0 pixels

# --- fields ---------------------------------------------------------------------------


def smooth_noise(
    rng: np.random.Generator, shape: tuple[int, int], scale: float
) -> Float:
    """Return noise of mean 0 and deviation 1 that varies over `scale` pixels."""
    small = [int(np.ceil(n / scale * 2)) + 4 for n in shape]
    noise = ndimage.gaussian_filter(rng.standard_normal(small).astype(np.float32), 1.0)
    noise = (noise - noise.mean()) / noise.std()
    zoom = [(n + 2 * scale) / (m - 1) for n, m in zip(shape, small, strict=True)]
    wide: Float = ndimage.zoom(noise, zoom, order=1)[: shape[0], : shape[1]]
    return wide


def draw_tissue(
    rng: np.random.Generator, shape: tuple[int, int]
) -> npt.NDArray[np.bool_]:
    """Return irregular tissue with rips, and glass around it."""
    y, x = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    centre = rng.uniform(-0.2, 0.2, 2)
    distance = (np.abs(y - centre[0]) ** 2.6 + np.abs(x - centre[1]) ** 2.6) ** (
        1 / 2.6
    )
    field = (
        1.0
        - distance
        + 0.16 * smooth_noise(rng, shape, 220)
        + 0.03 * smooth_noise(rng, shape, 30)
    )
    rips = np.abs(smooth_noise(rng, shape, 150)) < 0.025
    rips &= smooth_noise(rng, shape, 260) > 0.6
    tissue: npt.NDArray[np.bool_] = (field > 0.08) & ~rips
    return tissue


def draw_fibres(rng: np.random.Generator, shape: tuple[int, int]) -> Float:
    """Return wavy streaks whose direction changes over the slide."""
    streaks = []
    for sigma in ((1.2, 14.0), (14.0, 1.2)):
        noise = rng.standard_normal((shape[0] // 2 + 1, shape[1] // 2 + 1))
        half = ndimage.gaussian_filter(noise.astype(np.float32), [s / 2 for s in sigma])
        half /= half.std()
        streaks.append(half.repeat(2, 0).repeat(2, 1)[: shape[0], : shape[1]])
    share = 1 / (1 + np.exp(-3 * smooth_noise(rng, shape, 160)))
    mixed: Float = (share * streaks[0] + (1 - share) * streaks[1]).astype(np.float32)
    return mixed


# --- outlines -------------------------------------------------------------------------


def bezier(knots: Points) -> npt.NDArray[np.float64]:
    """Return the control points of the closed smooth curve through `knots`.

    Catmull-Rom as cubic Béziers: segment i runs from knot i to knot i + 1.

    Returns:
        (n, 3, 2): first and second control point and end of each segment.
    """
    before, after = np.roll(knots, 1, axis=0), np.roll(knots, -1, axis=0)
    beyond = np.roll(knots, -2, axis=0)
    first = knots + (after - before) / 6
    second = after - (beyond - knots) / 6
    return np.stack([first, second, after], axis=1)


def fill_outlines(
    outlines: list[Points], shape: tuple[int, int]
) -> npt.NDArray[np.uint8]:
    """Draw outlines as a mask of 0 and 1."""
    if not outlines:
        return np.zeros(shape, np.uint8)
    t = np.linspace(0, 1, 40, endpoint=False)[:, None, None]
    polygons = []
    for knots in outlines:
        control = bezier(knots)
        start, first, second, end = knots, control[:, 0], control[:, 1], control[:, 2]
        curve = (
            (1 - t) ** 3 * start
            + 3 * (1 - t) ** 2 * t * first
            + 3 * (1 - t) * t**2 * second
            + t**3 * end
        )
        points = curve.transpose(1, 0, 2).reshape(-1, 2)
        polygons.append(Polygon(points[:, ::-1]))
    filled: npt.NDArray[np.uint8] = features.rasterize(
        polygons, out_shape=shape, dtype="uint8"
    )
    return filled


def place_outlines(
    rng: np.random.Generator, tissue: npt.NDArray[np.bool_]
) -> list[Points]:
    """Place one to three organic outlines well inside the tissue."""
    room = ndimage.distance_transform_edt(ndimage.binary_closing(tissue[::8, ::8])) * 8
    side = min(tissue.shape)
    outlines: list[Points] = []
    for _ in range(int(rng.integers(1, 4))):
        candidates = np.argwhere(room > 0.10 * side)
        if not len(candidates):
            break
        centre = candidates[rng.integers(len(candidates))] * 8.0
        here = room[tuple((centre / 8).astype(int))]
        radius = min(rng.uniform(0.15, 0.21) * side, 0.95 * here)
        knots = _organic(rng, centre, radius)
        outlines.append(np.clip(knots, 1, np.array(tissue.shape) - 2).round(2))
        grid = np.indices(room.shape).transpose(1, 2, 0) * 8.0
        apart = np.hypot(*np.moveaxis(grid - centre, 2, 0)) - 1.5 * radius
        room = np.minimum(room, np.clip(apart, 0, None))
    return outlines


def place_nests(
    rng: np.random.Generator, tissue: npt.NDArray[np.bool_]
) -> list[Points]:
    """Scatter nests of tumour cells, 12 to 70 px in radius, over the tissue."""
    room = ndimage.distance_transform_edt(ndimage.binary_closing(tissue[::8, ::8])) * 8
    places = np.argwhere(room > 80) * 8.0
    rng.shuffle(places)
    outlines: list[Points] = []
    centres: list[Points] = []
    wanted = max(3, round(rng.integers(12, 25) * tissue.size / 2048**2))
    for centre in places:
        if len(outlines) == wanted:
            break
        if all(np.hypot(*(centre - other)) > 180 for other in centres):
            knots = _organic(rng, centre, 12 * (70 / 12) ** rng.random())
            outlines.append(np.clip(knots, 1, np.array(tissue.shape) - 2).round(2))
            centres.append(centre)
    return outlines


def _organic(rng: np.random.Generator, centre: Points, radius: float) -> Points:
    """Return the knots of a wobbling circle."""
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    wobble = sum(
        rng.normal(0, 0.16 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
        for k in (2, 3, 4, 5)
    )
    reach = radius * np.clip(1 + wobble, 0.55, 1.35)
    ring = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    knots: Points = centre + reach[:, None] * ring
    return knots
