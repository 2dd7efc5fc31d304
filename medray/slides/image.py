"""Plain fields (PNG, JPEG, BMP, WebP, GIF) and arrays as slides of one level."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from medray.errors import SlideError
from medray.slides.base import Level, Mpp, Slide, check_rectangle
from medray.slides.colors import on_white
from medray.storage import files
from medray.types import UInt8

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF")
# These formats are decoded whole; larger fields should come as tiled TIFF.
_MAX_PIXELS = 2**28
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16", "I;16B", "I;16L", "I")
_ORIENTATION = 274
# Of 16 bits. Cameras of 12 write less than this into them, which would be black.
_DARKEST_FULL = 4096
Image.MAX_IMAGE_PIXELS = None  # bounded here instead


class ArraySlide(Slide):
    """An array (H, W, 3) uint8 RGB as a slide; see medray.slides.base.Slide."""

    format = "array"
    resolution: Mpp | None = None
    magnification: float | None = None

    def __init__(self, pixels: UInt8, uri: str = "array") -> None:
        """Take the pixels as level 0."""
        self.uri = uri
        height, width = pixels.shape[:2]
        self.levels: tuple[Level, ...] = (Level(height, width, 1.0),)
        self._pixels = pixels

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> UInt8:
        """Read a rectangle; see medray.slides.base.Slide.read."""
        check_rectangle(self.levels, y, x, height, width, level)
        return self._pixels[y : y + height, x : x + width]

    def close(self) -> None:
        """Do nothing."""


def open_image(uri: str) -> ArraySlide:
    """Read a PNG, JPEG, BMP, WebP or GIF as a slide without resolution.

    It is turned as its EXIF Orientation says, as browsers and editors show it; grey of
    16 bits keeps its upper 8.

    Raises:
        SlideError: The file cannot be read, holds other colours than RGB or several
            pictures, or is too large for these formats.
    """
    try:
        data = files.read_bytes(uri)
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
        width, height = picture.size
        if width * height > _MAX_PIXELS:
            raise SlideError(
                f"{uri}: {height} x {width} pixels, at most {_MAX_PIXELS} are read "
                f"from {picture.format}; convert it to a tiled TIFF"
            )
        # Phones add a small or a depth picture to a JPEG (MPO); the first is meant.
        count = 1 if picture.format == "MPO" else getattr(picture, "n_frames", 1)
        if count > 1:
            raise SlideError(
                f"{uri}: holds {count} pictures, expected one; save the one that is "
                f"meant as a file of its own"
            )
        turned = picture.getexif().get(_ORIENTATION, 1)
        upright = ImageOps.exif_transpose(picture)
        slide = ArraySlide(_to_rgb(uri, upright), uri)
        slide.format = str(picture.format).lower()
        notes = [f"turned as its EXIF Orientation {turned} says"] if turned != 1 else []
        if _is_wide(upright) and np.asarray(upright).max() < _DARKEST_FULL:
            notes.append(
                "its samples of 16 bits use a 16th of their range: nearly black; "
                "scale them to 65535"
            )
        slide.note = "; ".join(notes)
    except SlideError:
        raise
    except UnidentifiedImageError as error:  # its message has an address of memory
        raise SlideError(
            f"{uri}: expected a PNG, JPEG, BMP, WebP or GIF image, found something else"
        ) from error
    except Exception as error:  # Pillow's plugins raise exceptions of many kinds
        raise SlideError(
            f"{uri}: expected a PNG, JPEG, BMP, WebP or GIF image, found "
            f"{type(error).__name__}: {error}"
        ) from error
    return slide


def _to_rgb(uri: str, picture: Image.Image) -> UInt8:
    """Return the pixels (H, W, 3) uint8 RGB of a picture, laid on white."""
    if picture.mode not in _MODES:
        raise SlideError(
            f"{uri}: holds {picture.mode} pixels, expected RGB or grey; convert it to "
            f"RGB, the colours depend on its profile"
        )
    if _is_wide(picture):  # Pillow would cut them at 255
        grey = np.asarray(picture)
        pixels = (grey >> 8).astype(np.uint8)
        pixels[grey == picture.info.get("transparency", -1)] = 255
        return np.repeat(pixels[..., None], 3, axis=2)
    transparent = "A" in picture.mode or "transparency" in picture.info
    pixels = np.asarray(picture.convert("RGBA" if transparent else "RGB"))
    return on_white(pixels) if transparent else pixels


def _is_wide(picture: Image.Image) -> bool:
    """Return whether a picture is grey of 16 bits."""
    return picture.mode.startswith("I")
