"""Generated images of single cells, in a folder per class."""

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"healthy": (220, 160, 190), "sick": (120, 80, 170)}


def draw(rng: np.random.Generator, name: str, side: int) -> Image.Image:
    pixels = np.full((side, side, 3), 250.0)
    y, x = np.indices((side, side))
    cell = np.hypot(y - side / 2, x - side / 2) < side * rng.uniform(0.3, 0.45)
    pixels[cell] = COLOURS[name]
    return Image.fromarray(
        np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    )


def write_cells(folder: Path, patients: int = 12, each: int = 4) -> Path:
    """Cells of two classes, in several formats and sizes."""
    rng = np.random.default_rng(0)
    for name in COLOURS:
        (folder / name).mkdir(parents=True)
        for patient in range(patients):
            for number in range(each):
                suffix = ("png", "bmp", "jpg")[number % 3]
                image = draw(rng, name, 40 + 5 * number)
                image.save(folder / name / f"P{patient}_cell_{number}.{suffix}")
    return folder
