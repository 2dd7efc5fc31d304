"""Plain fields (PNG, JPEG, BMP) and arrays as slides of one level."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from medray.errors import SlideError
from medray.slides.slide import Level, Slide, check_rectangle
from medray.slides.tiff import on_white
from medray.store import files

UInt8 = npt.NDArray[np.uint8]

# These formats are decoded whole; larger fields should come as tiled TIFF.
_MAX_PIXELS = 2**28
Image.MAX_IMAGE_PIXELS = None  # bounded here instead


class ArraySlide(Slide):
    """An array (H, W, 3) uint8 RGB as a slide; see medray.slides.slide.Slide."""

    format = "array"
    mpp: float | None = None
    magnification: float | None = None

    def __init__(self, pixels: UInt8, uri: str = "array") -> None:
        """Take the pixels as level 0."""
        self.uri = uri
        height, width = pixels.shape[:2]
        self.levels: tuple[Level, ...] = (Level(height, width, 1.0),)
        self._pixels = pixels

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> UInt8:
        """Read a rectangle; see medray.slides.slide.Slide.read."""
        check_rectangle(self.levels, y, x, height, width, level)
        return self._pixels[y : y + height, x : x + width]

    def close(self) -> None:
        """Do nothing."""


def open_image(uri: str) -> ArraySlide:
    """Read a PNG, JPEG or BMP as a slide without resolution.

    Raises:
        SlideError: The file cannot be read or is too large for these formats.
    """
    try:
        data = files.read_bytes(uri)
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "BMP"))
        width, height = picture.size
        if width * height > _MAX_PIXELS:
            raise SlideError(
                f"{uri}: {height} x {width} pixels, at most {_MAX_PIXELS} are read "
                f"from {picture.format}; convert it to a tiled TIFF"
            )
        transparent = "A" in picture.mode or "transparency" in picture.info
        pixels = np.asarray(picture.convert("RGBA" if transparent else "RGB"))
        slide = ArraySlide(on_white(pixels) if transparent else pixels, uri)
        slide.format = str(picture.format).lower()
    except SlideError:
        raise
    except Exception as error:  # Pillow's plugins raise exceptions of many kinds
        raise SlideError(
            f"{uri}: expected a PNG, JPEG or BMP image, found "
            f"{type(error).__name__}: {error}"
        ) from error
    return slide
