"""Generated H&E-like slides with known tumour outlines, for the demo and the tests.

Tumour differs from other tissue by what its nuclei look like (large, pale with a dark
rim and nucleolus, crowded, without order) and not by its mean colour: haematoxylin per
area is about the same in tumour, in stroma with its many small dark nuclei, and among
lymphocytes. A threshold on colour fails, a model with some context does not.

Everything follows from the seed; the same seed gives the same bytes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image
from rasterio import features
from scipy import ndimage
from shapely.geometry import Polygon

Float = npt.NDArray[np.float32]
Points = npt.NDArray[np.float64]  # (n, 2) of y, x in level-0 pixels

# As medray.slides.stains.HED, but to three digits: what is drawn must not change.
_HAEMATOXYLIN = np.array([0.650, 0.704, 0.286])
_EOSIN = np.array([0.072, 0.990, 0.105])
_INKS = ((40, 60, 190), (30, 130, 60), (25, 25, 30))
_STAMP = 25  # side of a nucleus' picture, pixels
_FIELD, _TILE = 2048, 512  # of `write_pyramid`, pixels


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
) -> Scene:
    """Draw one slide at about 0.5 um per pixel.

    Args:
        seed: Decides everything.
        height: Pixels.
        width: Pixels.
        tumour: Draw tumour areas; False for a healthy slide.
        lesions: How large they are.
    """
    rng = np.random.default_rng(seed)
    shape = (height, width)
    tissue = _tissue(rng, shape)
    draw = _outlines if lesions == "large" else _nests
    outlines = draw(rng, tissue) if tumour else []
    mask = _fill(outlines, shape)
    inside = mask.astype(bool)
    glands, lumen, ring = _glands(rng, tissue & ~inside)
    clusters = _smooth(rng, shape, 90) > 1.1

    haematoxylin = np.zeros(shape, np.float32)
    stroma = tissue & ~inside & ~glands
    _stamp(haematoxylin, _grid(rng, shape, 15.5, stroma & ~clusters), _spindle, rng)
    _stamp(haematoxylin, _grid(rng, shape, 10.5, stroma & clusters), _lymphocyte, rng)
    _stamp(haematoxylin, ring, _epithelial, rng)
    _stamp(haematoxylin, _grid(rng, shape, 40.0, inside & tissue), _lymphocyte, rng)
    _stamp(haematoxylin, _grid(rng, shape, 19.0, inside & tissue), _vesicular, rng)

    fibres = _fibres(rng, shape)
    mottle = _smooth(rng, shape, 60)
    eosin = 0.42 + 0.10 * mottle + 0.13 * fibres * np.where(inside | glands, 0.4, 1.0)
    eosin = np.where(lumen, 0.04, np.clip(eosin, 0.08, None)) * tissue
    bluish = 0.10 + 0.04 * _smooth(rng, shape, 45)
    haematoxylin = np.maximum(haematoxylin, np.clip(bluish, 0, None) * tissue)
    haematoxylin[lumen] = 0.02
    if rng.random() < 0.35:
        fold = _fold(rng, shape) & tissue
        haematoxylin[fold] *= 1.5
        eosin[fold] *= 1.7
    pixels = _stain(rng, haematoxylin, eosin.astype(np.float32))
    if rng.random() < 0.35:
        _draw_pen(rng, pixels)
    return Scene(pixels, outlines, mask)


# --- fields ---------------------------------------------------------------------------


def _smooth(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> Float:
    """Give noise of mean 0 and deviation 1 that varies over `scale` pixels."""
    small = [int(np.ceil(n / scale * 2)) + 4 for n in shape]
    noise = ndimage.gaussian_filter(rng.standard_normal(small).astype(np.float32), 1.0)
    noise = (noise - noise.mean()) / noise.std()
    zoom = [(n + 2 * scale) / (m - 1) for n, m in zip(shape, small, strict=True)]
    wide: Float = ndimage.zoom(noise, zoom, order=1)[: shape[0], : shape[1]]
    return wide


def _tissue(rng: np.random.Generator, shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Give irregular tissue with rips, and glass around it."""
    y, x = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j]
    centre = rng.uniform(-0.2, 0.2, 2)
    distance = (np.abs(y - centre[0]) ** 2.6 + np.abs(x - centre[1]) ** 2.6) ** (
        1 / 2.6
    )
    field = (
        1.0
        - distance
        + 0.16 * _smooth(rng, shape, 220)
        + 0.03 * _smooth(rng, shape, 30)
    )
    rips = np.abs(_smooth(rng, shape, 150)) < 0.025
    rips &= _smooth(rng, shape, 260) > 0.6
    tissue: npt.NDArray[np.bool_] = (field > 0.08) & ~rips
    return tissue


def _fibres(rng: np.random.Generator, shape: tuple[int, int]) -> Float:
    """Give wavy streaks whose direction changes over the slide."""
    streaks = []
    for sigma in ((1.2, 14.0), (14.0, 1.2)):
        noise = rng.standard_normal((shape[0] // 2 + 1, shape[1] // 2 + 1))
        half = ndimage.gaussian_filter(noise.astype(np.float32), [s / 2 for s in sigma])
        half /= half.std()
        streaks.append(half.repeat(2, 0).repeat(2, 1)[: shape[0], : shape[1]])
    share = 1 / (1 + np.exp(-3 * _smooth(rng, shape, 160)))
    mixed: Float = (share * streaks[0] + (1 - share) * streaks[1]).astype(np.float32)
    return mixed


# --- outlines -------------------------------------------------------------------------


def bezier(knots: Points) -> npt.NDArray[np.float64]:
    """Give the control points of the closed smooth curve through `knots`.

    Catmull-Rom as cubic Béziers: segment i runs from knot i to knot i + 1.

    Returns:
        (n, 3, 2): first and second control point and end of each segment.
    """
    before, after = np.roll(knots, 1, axis=0), np.roll(knots, -1, axis=0)
    beyond = np.roll(knots, -2, axis=0)
    first = knots + (after - before) / 6
    second = after - (beyond - knots) / 6
    return np.stack([first, second, after], axis=1)


def _fill(outlines: list[Points], shape: tuple[int, int]) -> npt.NDArray[np.uint8]:
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


def _outlines(rng: np.random.Generator, tissue: npt.NDArray[np.bool_]) -> list[Points]:
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


def _nests(rng: np.random.Generator, tissue: npt.NDArray[np.bool_]) -> list[Points]:
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
    """Give the knots of a wobbling circle."""
    angles = np.linspace(0, 2 * np.pi, 16, endpoint=False)
    wobble = sum(
        rng.normal(0, 0.16 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi))
        for k in (2, 3, 4, 5)
    )
    reach = radius * np.clip(1 + wobble, 0.55, 1.35)
    ring = np.stack([np.sin(angles), np.cos(angles)], axis=1)
    knots: Points = centre + reach[:, None] * ring
    return knots


# --- nuclei ---------------------------------------------------------------------------


def _grid(
    rng: np.random.Generator,
    shape: tuple[int, int],
    spacing: float,
    where: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int64]:
    """Give jittered grid positions (n, 2) inside `where`."""
    ys, xs = (np.arange(0, n, spacing) for n in shape)
    points = np.stack(np.meshgrid(ys, xs, indexing="ij"), axis=-1).reshape(-1, 2)
    points = points + rng.uniform(-0.55, 0.55, points.shape) * spacing
    points = np.clip(points.round().astype(np.int64), 0, np.array(shape) - 1)
    points = points[rng.random(len(points)) > 0.12]
    inside: npt.NDArray[np.int64] = points[where[points[:, 0], points[:, 1]]]
    return inside


def _glands(
    rng: np.random.Generator, where: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Place round glands: their areas, their lumina, positions of their nuclei."""
    shape = where.shape
    glands, lumen = np.zeros(shape, bool), np.zeros(shape, bool)
    nuclei = [np.zeros((0, 2), np.int64)]
    zone = _smooth(rng, (shape[0], shape[1]), 300) > -0.2
    for y, x in _grid(rng, (shape[0], shape[1]), 150.0, where & zone):
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
    """Give 1 inside, 0 outside, soft at the rim, and wobbly: (25, 25)."""
    y, x = np.mgrid[:_STAMP, :_STAMP] - _STAMP // 2 + rng.uniform(-0.5, 0.5, (2, 1, 1))
    turn = rng.uniform(0, np.pi)
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    angle = np.arctan2(v, u)
    wobble = 1 + 0.10 * np.cos(3 * angle + rng.uniform(0, 6)) * min(1.0, b / 6)
    radius = np.hypot(u / a, v / b) / wobble
    soft: Float = np.clip((1 - radius) * min(a, b) + 0.5, 0, 1).astype(np.float32)
    return soft


def _spindle(rng: np.random.Generator) -> Float:
    """Small, dark, long: fibroblasts."""
    return _ellipse(rng, rng.uniform(5.0, 7.0), rng.uniform(1.9, 2.8)) * np.float32(
        0.95
    )


def _lymphocyte(rng: np.random.Generator) -> Float:
    """Small, round, very dark."""
    size = rng.uniform(3.2, 4.0)
    return _ellipse(rng, size, size) * np.float32(rng.uniform(0.9, 1.15))


def _epithelial(rng: np.random.Generator) -> Float:
    """Small, oval: the ordered nuclei of a gland."""
    return _ellipse(rng, rng.uniform(4.4, 5.4), rng.uniform(3.0, 3.8)) * np.float32(0.9)


def _vesicular(rng: np.random.Generator) -> Float:
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


def _stamp(
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


# --- light ----------------------------------------------------------------------------


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
    """Give a band where the tissue lies double."""
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


# --- files ----------------------------------------------------------------------------


def write_slide(
    folder: Path,
    name: str,
    scene: Scene,
    *,
    mpp: float = 0.5,
    layout: Literal["tiles", "strips", "pyramid"] = "tiles",
    compression: Literal["jpeg", "deflate", "lzw"] = "jpeg",
) -> Path:
    """Write FOLDER/NAME.tif: tiles of 512, strips, or tiles with two coarser levels."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.tif"
    options: dict[str, Any] = {
        "photometric": "rgb",
        "compression": compression,
        "compressionargs": {"level": 90} if compression == "jpeg" else None,
        "resolution": (1e4 / mpp, 1e4 / mpp),
        "resolutionunit": "CENTIMETER",
        "software": "medray",
        "datetime": None,
        "metadata": None,
    }
    options |= {"rowsperstrip": 64} if layout == "strips" else {"tile": (512, 512)}
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as tiff:
        levels = 2 if layout == "pyramid" else 0
        tiff.write(scene.pixels, subifds=levels, **options)
        for level in range(1, levels + 1):
            step = 2**level
            tiff.write(scene.pixels[::step, ::step], subfiletype=1, **options)
    path.write_bytes(buffer.getvalue())
    return path


def write_svg(folder: Path, name: str, scene: Scene) -> Path:
    """Write FOLDER/NAME.svg: outlines as an annotator draws them, in a group."""
    folder.mkdir(parents=True, exist_ok=True)
    height, width = scene.mask.shape
    paths = []
    for knots in scene.outlines:
        start = f"M {knots[0][1]:.2f},{knots[0][0]:.2f}"
        curves = " ".join(
            "C " + " ".join(f"{x:.2f},{y:.2f}" for y, x in segment)
            for segment in bezier(knots)
        )
        paths.append(f'    <path d="{start} {curves} Z"/>\n')
    text = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">\n'
        f'  <g id="tumour" fill="none" stroke="#00c000" stroke-width="6">\n'
        f"{''.join(paths)}  </g>\n</svg>\n"
    )
    path = folder / f"{name}.svg"
    path.write_text(text)
    return path


def generate(
    folder: Path,
    *,
    slides: int,
    seed: int,
    height: int = 2048,
    width: int = 2048,
    prefix: str = "slide",
    lesions: Lesions = "large",
) -> list[Path]:
    """Write slides, their annotations and groups.csv; what is there is left alone.

    Two slides in a row are of one patient; every sixth slide is without tumour.

    Returns:
        The slides: FOLDER/slides/PREFIX_000.tif and so on.
    """
    folder = Path(folder)
    paths, rows = [], []
    for index in range(slides):
        name = f"{prefix}_{index:03d}"
        path = folder / "slides" / f"{name}.tif"
        if not path.exists():
            tumour = index % 6 != 5
            scene = draw_scene(
                seed + index,
                height=height,
                width=width,
                tumour=tumour,
                lesions=lesions,
            )
            write_svg(folder / "annotations", name, scene)
            write_slide(folder / "slides", name, scene)
        paths.append(path)
        rows.append((name, f"patient_{index // 2:03d}"))
    with open(folder / "groups.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("slide", "group"))
        writer.writerows(rows)
    return paths


def write_pyramid(
    path: Path,
    height: int,
    width: int,
    *,
    seed: int = 0,
    tissue: float = 1.0,
    mpp: float = 0.5,
) -> None:
    """Write a slide of any size quickly: one generated field, repeated.

    A pyramidal JPEG BigTIFF with levels of 1, 1/4, 1/16, ... of the size. Fields of
    2048 pixels either show tissue or are glass, which is not stored at all.

    Args:
        path: The file.
        height: Level-0 pixels.
        width: Likewise.
        seed: Of the field.
        tissue: Share of the fields that show tissue, spread evenly.
        mpp: Microns per pixel of level 0.
    """
    field = draw_scene(seed, height=_FIELD, width=_FIELD).pixels
    across = -(-width // _FIELD)
    count = -(-height // _FIELD) * across
    shown = np.floor(np.arange(1, count + 1) * tissue) > np.floor(
        np.arange(count) * tissue
    )
    shown = shown.reshape(-1, across)
    factors = [1]
    while max(height, width) / factors[-1] > 1024 and factors[-1] < _FIELD:
        factors.append(factors[-1] * 4)
    options: dict[str, Any] = {
        "dtype": "uint8",
        "photometric": "ycbcr",
        "subsampling": (2, 2),
        "compression": "jpeg",
        "tile": (_TILE, _TILE),
        "software": "medray",
        "metadata": None,
        "resolutionunit": "CENTIMETER",
    }
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for factor in factors:
            size = (-(-height // factor), -(-width // factor), 3)
            tiff.write(
                _repeated(field, shown, factor, size),
                shape=size,
                subfiletype=0 if factor == 1 else 1,
                resolution=(1e4 / (mpp * factor),) * 2,
                **options,
            )


def _repeated(
    field: npt.NDArray[np.uint8],
    shown: npt.NDArray[np.bool_],
    factor: int,
    size: tuple[int, int, int],
) -> Iterator[bytes]:
    """Give the encoded tiles of one level, row by row; none of glass."""
    small = np.asarray(Image.fromarray(field).reduce(factor))
    side = len(small)
    encoded: dict[Any, bytes] = {}
    for y in range(0, size[0], _TILE):
        for x in range(0, size[1], _TILE):
            rows = np.arange(y, y + _TILE)
            columns = np.arange(x, x + _TILE)
            flags = shown[y // side : (y + _TILE - 1) // side + 1]
            flags = flags[:, x // side : (x + _TILE - 1) // side + 1]
            if not flags.any():
                yield b""
                continue
            key = (y % side, x % side, flags.shape, flags.tobytes())
            if key not in encoded:
                tile = small[np.ix_(rows % side, columns % side)]
                inside = np.ix_(
                    np.minimum(rows // side, len(shown) - 1),
                    np.minimum(columns // side, shown.shape[1] - 1),
                )
                tile = np.where(shown[inside][..., None], tile, np.uint8(245))
                picture = imagecodecs.jpeg8_encode(
                    tile, level=60, colorspace="RGB", outcolorspace="YCBCR"
                )
                encoded[key] = bytes(picture)
            yield encoded[key]
