"""Slides that tifffile cannot open, through OpenSlide (an optional extra)."""

from __future__ import annotations

from typing import Any

import numpy as np

from medray.errors import SlideError
from medray.slides.base import MAX_SIDE, Level, Slide, check_rectangle, mpp_of
from medray.slides.colors import on_white
from medray.types import UInt8


class OpenSlideSlide(Slide):
    """A file of OpenSlide's as a slide; see medray.slides.base.Slide."""

    def __init__(self, uri: str, path: str = "") -> None:
        """Open the file.

        Args:
            uri: Of the slide.
            path: Of the file that OpenSlide is to open, if that is another one: a copy,
                or a file of a slide of several.

        Raises:
            SlideError: OpenSlide is not installed or cannot open the file.
        """
        self.uri, self._path = uri, path or uri
        self._slide = _open(uri, self._path)
        self.properties = properties = self._slide.properties
        self.format = str(properties.get("openslide.vendor", "openslide"))
        x, y = (_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
        self.resolution = mpp_of(x, y, "openslide.mpp-x")
        self.magnification = _number(properties.get("openslide.objective-power"))
        sizes = zip(
            self._slide.level_dimensions, self._slide.level_downsamples, strict=True
        )
        self.levels = tuple(Level(h, w, float(factor)) for (w, h), factor in sizes)
        if max(self.levels[0].height, self.levels[0].width) > MAX_SIDE:
            raise SlideError(f"{uri}: declares more than {MAX_SIDE} pixels a side")

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> UInt8:
        """Read a rectangle; see medray.slides.base.Slide.read."""
        check_rectangle(self.levels, y, x, height, width, level)
        factor = self.levels[level].downsample
        place = (round(x * factor), round(y * factor))
        try:
            rgba = self._slide.read_region(place, level, (width, height))
        except Exception as error:  # OpenSlideError, and what Pillow may add
            # After an error OpenSlide refuses everything else of the file too.
            self._reopen()
            raise SlideError(
                f"{self.uri}: level {level} cannot be read at y={y} x={x} ({error})"
            ) from error
        return on_white(np.asarray(rgba))

    def _reopen(self) -> None:
        self._slide.close()
        self._slide = _open(self.uri, self._path)

    def close(self) -> None:
        """Close the file."""
        self._slide.close()


def _open(uri: str, path: str) -> Any:
    try:
        import openslide
    except ImportError as error:
        raise SlideError(
            f"{uri}: openslide is not installed; pip install 'medray[openslide]'"
        ) from error
    try:
        return openslide.OpenSlide(path)
    except (openslide.OpenSlideError, OSError) as error:
        raise SlideError(f"{uri}: openslide cannot open it ({error})") from error


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
