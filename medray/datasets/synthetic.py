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
from pathlib import Path
from typing import Any, Literal

import imagecodecs
import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from medray.datasets.synthetic_scene import Lesions, Scene, draw_scene
from medray.datasets.synthetic_tissue import bezier

_FIELD, _TILE = 2048, 512  # of `write_pyramid`, pixels


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
    2048 pixels either show tissue or are glass.

    Args:
        path: The file.
        height: Height of the slide, level-0 pixels.
        width: Width of the slide, level-0 pixels.
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
    """Yield the encoded tiles of one level, row by row."""
    small = np.asarray(Image.fromarray(field).reduce(factor))
    side = len(small)
    encoded: dict[Any, bytes] = {}
    for y in range(0, size[0], _TILE):
        for x in range(0, size[1], _TILE):
            rows = np.arange(y, y + _TILE)
            columns = np.arange(x, x + _TILE)
            flags = shown[y // side : (y + _TILE - 1) // side + 1]
            flags = flags[:, x // side : (x + _TILE - 1) // side + 1]
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
