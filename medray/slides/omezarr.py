"""medray's own OME-Zarr images (channel, y, x) as slides."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from medray.errors import MedrayError, SlideError
from medray.slides.slide import Level, Slide, check_rectangle, sane_mpp
from medray.store import omezarr

UInt8 = npt.NDArray[np.uint8]


class ZarrSlide(Slide):
    """An OME-Zarr 0.5 image as a slide; see medray.slides.slide.Slide."""

    format = "ome-zarr"
    magnification: float | None = None

    def __init__(self, uri: str) -> None:
        """Open the group and its levels.

        Raises:
            SlideError: It is no OME-Zarr image of 8-bit RGB.
        """
        self.uri = uri
        try:
            scales: Any = omezarr.open_group(uri).attrs["ome"]["multiscales"][0]  # type: ignore[index,call-overload]
            paths = [str(level["path"]) for level in scales["datasets"]]
            self._arrays = [omezarr.open_level(uri, int(path)) for path in paths]
            self.mpp = sane_mpp(_mpp(scales))
        except (MedrayError, KeyError, IndexError, TypeError, ValueError) as error:
            raise SlideError(
                f"{uri}: expected an OME-Zarr 0.5 image as medray writes it ({error})"
            ) from error
        first = self._arrays[0]
        if first.ndim != 3 or first.shape[0] != 3 or first.dtype != np.uint8:
            raise SlideError(
                f"{uri}: expected (3, y, x) uint8, found {first.shape} {first.dtype}"
            )
        sizes = [array.shape[1:] for array in self._arrays]
        self.levels = tuple(
            Level(h, w, float(2**level)) for level, (h, w) in enumerate(sizes)
        )

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> UInt8:
        """Read a rectangle; see medray.slides.slide.Slide.read."""
        check_rectangle(self.levels, y, x, height, width, level)
        try:
            part: Any = self._arrays[level][:, y : y + height, x : x + width]
        except Exception as error:  # codecs raise exceptions of many kinds
            raise SlideError(
                f"{self.uri}: level {level} cannot be read at y={y} x={x} "
                f"({type(error).__name__}: {error}); ingest the slide again"
            ) from error
        return np.ascontiguousarray(np.moveaxis(np.asarray(part), 0, 2))

    def close(self) -> None:
        """Do nothing: chunks are opened and closed as they are read."""


def _mpp(scales: Any) -> float | None:
    if scales["axes"][-1].get("unit") != "micrometer":
        return None
    transforms = scales["datasets"][0]["coordinateTransformations"]
    scale = next(t["scale"] for t in transforms if t["type"] == "scale")
    return float(scale[-1])
