"""medray's own OME-Zarr images (channel, y, x) as slides."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from medray.errors import FormatError, MedrayError, SlideError, StoreError
from medray.geometry import Rectangle
from medray.slides.base import MAX_SIDE, Level, Mpp, Slide, check_rectangle, mpp_of
from medray.storage import group_attributes, ome_zarr, zarr_group
from medray.types import UInt8

# What is read of a shard's chunks at once; medray's have 12 MiB.
_MAX_SHARD_BYTES = 1 << 30


class ZarrSlide(Slide):
    """An OME-Zarr 0.5 image as a slide; see medray.slides.base.Slide."""

    format = "ome-zarr"
    magnification: float | None = None

    def __init__(self, uri: str) -> None:
        """Open the group and its levels.

        Raises:
            SlideError: It is no OME-Zarr image of 8-bit RGB.
        """
        self.uri = uri
        try:
            attributes: Any = zarr_group.open_group(uri).attrs
            scales = attributes["ome"]["multiscales"][0]
            paths = [str(level["path"]) for level in scales["datasets"]]
            self._arrays = [ome_zarr.open_level(uri, int(path)) for path in paths]
            self.resolution = _mpp(scales)
            self._unreadable = _rectangles(
                attributes.get(group_attributes.UNREADABLE, [])
            )
        except StoreError:
            raise
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
        _check_sizes(uri, self._arrays)
        self.levels = tuple(
            Level(h, w, float(2**level)) for level, (h, w) in enumerate(sizes)
        )
        if self._unreadable:
            pixels = sum(place.height * place.width for place in self._unreadable)
            self.absent = pixels / math.prod(sizes[0])
            self.note = (
                f"{self.absent:.2%} of it could not be read from the slide that it was "
                f"made of"
            )

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> UInt8:
        """Read a rectangle; see medray.slides.base.Slide.read."""
        check_rectangle(self.levels, y, x, height, width, level)
        for place in self._unreadable:
            top, left = place.y >> level, place.x >> level
            bottom, right = -(-place.bottom >> level), -(-place.right >> level)
            if top < y + height and bottom > y and left < x + width and right > x:
                raise SlideError(
                    f"{self.uri}: could not be read at y={place.y} x={place.x} from "
                    f"the slide that it was made of; make it again of a whole one"
                )
        try:
            part = self._arrays[level][:, y : y + height, x : x + width]
        except FormatError as error:
            raise SlideError(f"{error}") from error
        return np.ascontiguousarray(np.moveaxis(part, 0, 2))

    def close(self) -> None:
        """Do nothing: chunks are opened and closed as they are read."""


def _check_sizes(uri: str, arrays: list[Any]) -> None:
    """Bound what the metadata declare before anything is read.

    Raises:
        SlideError: A level is too large, or not half of the one before.
    """
    top = arrays[0].shape[1:]
    for level, array in enumerate(arrays):
        found, stored = array.shape[1:], array.stored
        halved = [max(1, -(-n >> level)) for n in top]
        off = [abs(a - b) > 1 for a, b in zip(found, halved, strict=True)]
        if (
            not 0 < min(top) <= max(top) <= MAX_SIDE
            or any(off)
            or math.prod(stored) > _MAX_SHARD_BYTES
        ):
            raise SlideError(
                f"{uri}: level {level} has {found} pixels in shards of {stored}, level "
                f"0 has {top}; expected half as many a side at each level, at most "
                f"{MAX_SIDE}, in shards of at most 1 GiB; the metadata are damaged"
            )


def _rectangles(found: Any) -> list[Rectangle]:
    """Read what `group_attributes.note_unreadable` wrote.

    Raises:
        TypeError: It is something else.
    """
    places = [Rectangle(*place) for place in found]
    for place in places:
        if {type(place.y), type(place.x), type(place.height), type(place.width)} != {
            int
        }:
            raise TypeError(f"unreadable: expected whole numbers, found {place}")
    return places


def _mpp(scales: Any) -> Mpp | None:
    axes = scales["axes"][-2:]
    if any(axis.get("unit") != "micrometer" for axis in axes):
        return None
    transforms = scales["datasets"][0]["coordinateTransformations"]
    scale = next(t["scale"] for t in transforms if t["type"] == "scale")
    return mpp_of(float(scale[-1]), float(scale[-2]), "OME-Zarr scale")
