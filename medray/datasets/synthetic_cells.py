"""Generated cells in SIPaKMeD's layout: clusters, crops, contours; for size and tests.

The classes differ by the size of cell and nucleus and by colour; they resemble the real
ones no further. The same seed gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image
from skimage.draw import polygon2mask

from medray.types import UInt8

Points = npt.NDArray[np.float64]  # (n, 2) of x, y in pixels


class _Kind(NamedTuple):
    """A class: mean radius of the cell, pixels; its nucleus' share of it; RGB."""

    radius: float
    share: float
    cytoplasm: tuple[int, int, int]
    nucleus: tuple[int, int, int]


_KINDS = {
    "im_Dyskeratotic": _Kind(32, 0.45, (205, 140, 120), (95, 60, 85)),
    "im_Koilocytotic": _Kind(44, 0.36, (170, 190, 195), (85, 70, 110)),
    "im_Metaplastic": _Kind(36, 0.40, (150, 175, 170), (100, 85, 120)),
    "im_Parabasal": _Kind(28, 0.55, (140, 165, 180), (90, 80, 115)),
    "im_Superficial-Intermediate": _Kind(50, 0.20, (215, 175, 180), (70, 50, 80)),
}
CELL_CLASSES = tuple(_KINDS)
_GLASS = (236, 234, 228)
_FIELD = 176  # side of a cell's place in its cluster, pixels
_COLUMNS = 3  # cells side by side
_MARGIN = 6  # of a crop around its cell, pixels
_CORNERS = 48  # points of a contour


def generate_cells(
    folder: str | Path,
    *,
    clusters: int = 2,
    each: int = 6,
    seed: int = 0,
    crops: bool = True,
) -> None:
    """Write cells as SIPaKMeD has them, see medray.datasets.cells.

    Args:
        folder: To make.
        clusters: Cluster images per class.
        each: Cells a cluster.
        seed: Decides everything.
        crops: Write the folders CROPPED too; else only clusters and their contours.
    """
    for label, (name, kind) in enumerate(_KINDS.items()):
        place = Path(folder) / name
        (place / "CROPPED" if crops else place).mkdir(parents=True)
        for cluster in range(1, clusters + 1):
            rng = np.random.default_rng((seed, label, cluster))
            _write_cluster(rng, kind, place, f"{cluster:03d}", each, crops)


def _write_cluster(
    rng: np.random.Generator,
    kind: _Kind,
    place: Path,
    name: str,
    each: int,
    crops: bool,
) -> None:
    columns = min(each, _COLUMNS)
    size = (-(-each // columns) * _FIELD, columns * _FIELD)
    pixels = np.full((*size, 3), _GLASS, np.float64)
    cells = []
    for index in range(each):
        field = np.array([index % columns, index // columns])
        centre = (field + 0.5) * _FIELD + rng.uniform(-6, 6, 2)
        radius = kind.radius * rng.uniform(0.85, 1.15)
        cytoplasm = _outline(rng, centre, radius, 0.06)
        within = centre + rng.uniform(-0.15, 0.15, 2) * radius
        share = kind.share * rng.uniform(0.85, 1.15)
        nucleus = _outline(rng, within, radius * share, 0.03)
        for outline, colour in ((cytoplasm, kind.cytoplasm), (nucleus, kind.nucleus)):
            # Centres of pixels lie at halves here, at whole numbers there.
            corners = outline[:, ::-1] - 0.5
            inside = polygon2mask(size, corners)  # type: ignore[no-untyped-call]
            pixels[inside] = np.array(colour) * rng.uniform(0.92, 1.08)
        cells.append((cytoplasm, nucleus))
    pixels += rng.normal(0, 6, pixels.shape)
    picture = np.clip(pixels, 0, 255).astype(np.uint8)
    _save(picture, place / f"{name}.bmp")
    for number, (cytoplasm, nucleus) in enumerate(cells, 1):
        _write_contour(cytoplasm, place / f"{name}_cyt{number:02d}.dat")
        _write_contour(nucleus, place / f"{name}_nuc{number:02d}.dat")
        if crops:
            x0, y0 = np.floor(cytoplasm.min(axis=0)).astype(int) - _MARGIN
            x1, y1 = np.ceil(cytoplasm.max(axis=0)).astype(int) + _MARGIN
            stem = f"{name}_{number:02d}"
            _save(picture[y0:y1, x0:x1], place / "CROPPED" / f"{stem}.bmp")
            for part, outline in (("cyt", cytoplasm), ("nuc", nucleus)):
                path = place / "CROPPED" / f"{stem}_{part}.dat"
                _write_contour(outline - (x0, y0), path)


def _outline(
    rng: np.random.Generator, centre: Points, radius: float, wobble: float
) -> Points:
    """Draw an ellipse that is not quite one."""
    angles = np.linspace(0, 2 * np.pi, _CORNERS, endpoint=False)
    waves = wobble * np.sin(3 * angles + rng.uniform(0, 2 * np.pi))
    long = rng.uniform(1.0, 1.15)
    axes = radius * np.array([long, 1 / long])
    ring = np.stack([np.cos(angles), np.sin(angles)], 1) * axes * (1 + waves)[:, None]
    turn = rng.uniform(0, np.pi)
    cos, sin = np.cos(turn), np.sin(turn)
    turned: Points = ring @ np.array([[cos, sin], [-sin, cos]]) + centre
    return turned


def _write_contour(outline: Points, path: Path) -> None:
    """Write a closed contour with five digits, as the set has it."""
    closed = [*outline, outline[0]]
    path.write_text("".join(f"{x:.5g},{y:.5g}\n" for x, y in closed))


def _save(pixels: UInt8, path: Path) -> None:
    Image.fromarray(pixels).save(path)
