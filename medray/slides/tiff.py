"""TIFF slides through tifffile: flat, pyramidal, SVS, OME-TIFF, NDPI and more.

A rectangle is read by decoding only the tiles or strips that it touches, straight from
their bytes in the file into one array.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from defusedxml import ElementTree

from medray.errors import SlideError, StoreError
from medray.slides.slide import MAX_SIDE, Level, Slide, check_rectangle, sane_mpp
from medray.store import files

UInt8 = npt.NDArray[np.uint8]

# A tile or strip that decodes to more than this is a bomb, not a slide.
_MAX_SEGMENT_BYTES = 1 << 30
# No slide has so many labels, thumbnails, levels and planes.
_MAX_PAGES = 500
_JPEG_END = b"\xff\xd9"
_MICRONS = {
    "m": 1e6,
    "cm": 1e4,
    "mm": 1e3,
    "µm": 1.0,
    "um": 1.0,
    "nm": 1e-3,
    "pm": 1e-6,
    "Å": 1e-4,
    "in": 25400.0,
}
# What is wrong with a file is said by SlideError, once.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class TiffSlide(Slide):
    """A TIFF file as a slide; see medray.slides.slide.Slide."""

    def __init__(self, uri: str) -> None:
        """Open the file and read its headers.

        Raises:
            SlideError: It is no TIFF, or one that cannot be a slide.
            StoreError: It cannot be read now.
        """
        self.uri = uri
        try:
            self._file = files.open_file(uri)
        except FileNotFoundError as error:
            raise SlideError(f"{uri}: cannot be opened ({error})") from error
        # A slide that a cache drops may still be read: its last reader closes it.
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        try:
            self._tiff = tifffile.TiffFile(self._file, name=os.path.basename(uri))
            self._pages = list(self._find_pages())
            self.levels = _levels(uri, self._pages)
            self.format, self.mpp, self.magnification = _facts(self._tiff)
            self._size = self._file.seek(0, os.SEEK_END)
        except (SlideError, StoreError):
            self._file.close()
            raise
        except Exception as error:  # tifffile raises what a broken file leads it to
            self._file.close()
            found = f"{type(error).__name__}: {error}" if str(error) else "no TIFF"
            raise SlideError(
                f"{uri}: expected a TIFF slide, found {found}; the file is damaged or "
                f"not a slide"
            ) from error

    def _find_pages(self) -> Iterator[Any]:
        """Give the page of each level, largest first."""
        for count, image in enumerate(self._tiff.pages):
            levels = len(getattr(image, "subifds", None) or ())
            if count == _MAX_PAGES or levels > _MAX_PAGES:
                raise SlideError(
                    f"{self.uri}: declares more than {_MAX_PAGES} images or levels; "
                    f"the file is damaged or not a slide"
                )
        if not self._tiff.series:
            raise SlideError(f"{self.uri}: the TIFF holds no image")
        series = self._tiff.series[0]
        for level in series.levels:
            page = level.pages[0]
            if page is None:
                raise SlideError(f"{self.uri}: a level of the pyramid is missing")
            _check_page(self.uri, page, page.keyframe)
            yield page

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> UInt8:
        """Read a rectangle; see medray.slides.slide.Slide.read."""
        check_rectangle(self.levels, y, x, height, width, level)
        page = self._pages[level]
        frame = page.keyframe
        planes = frame.samplesperpixel if frame.planarconfig == 2 else 1
        samples = frame.samplesperpixel
        raw = np.empty((height, width, samples), frame.dtype)
        touched = [*_touched(frame, planes, y, x, height, width)]
        for index, data in self._stored(page, level, touched):
            plane = index // (len(page.dataoffsets) // planes)
            self._decode_into(raw, page, level, index, data, plane, y, x)
        return _to_rgb(raw, frame)

    def _decode_into(
        self,
        raw: npt.NDArray[Any],
        page: Any,
        level: int,
        index: int,
        data: bytes | None,
        plane: int,
        y: int,
        x: int,
    ) -> None:
        """Decode one tile or strip and copy its part of the rectangle."""
        frame = page.keyframe
        options = {}
        if frame.compression in (6, 7, 34892, 33007):
            options = {"jpegtables": page.jpegtables, "jpegheader": frame.jpegheader}
            # libjpeg fills up what is missing with grey, and only warns.
            if data and frame.jpegheader is None and _JPEG_END not in data[-64:]:
                raise SlideError(
                    f"{self.uri}: segment {index} of level {level} is a JPEG without "
                    f"an end; the file is damaged there"
                )
        try:
            segment, place, shape = frame.decode(data, index, **options)
        except Exception as error:  # codecs raise exceptions of many kinds
            raise SlideError(
                f"{self.uri}: segment {index} of level {level} cannot be decoded "
                f"({type(error).__name__}: {error}); the file is damaged there"
            ) from error
        top, left = place[2], place[3]
        height, width = shape[1], shape[2]
        y0, y1 = max(y, top), min(y + raw.shape[0], top + height)
        x0, x1 = max(x, left), min(x + raw.shape[1], left + width)
        target = raw[y0 - y : y1 - y, x0 - x : x1 - x]
        if segment is None:  # a tile that was never stored is glass
            target[...] = np.iinfo(raw.dtype).max if raw.dtype.kind == "u" else 0
            return
        part = segment[0, y0 - top : y1 - top, x0 - left : x1 - left]
        if part.shape[:2] != target.shape[:2]:
            raise SlideError(
                f"{self.uri}: segment {index} of level {level} holds "
                f"{segment.shape[1]} x {segment.shape[2]} pixels, expected "
                f"{height} x {width}; the file is damaged there"
            )
        if frame.planarconfig == 2:
            target[..., plane] = part[..., 0]
        else:
            target[...] = part

    def _stored(
        self, page: Any, level: int, indices: list[int]
    ) -> Iterator[tuple[int, bytes | None]]:
        """Give the stored bytes of tiles or strips; None of what was never stored."""
        offsets, counts = page.dataoffsets, page.databytecounts
        stored = [index for index in indices if counts[index]]
        for index in stored:
            if offsets[index] + counts[index] > self._size:
                raise SlideError(
                    f"{self.uri}: segment {index} of level {level} ends at byte "
                    f"{offsets[index] + counts[index]}, the file at {self._size}; it "
                    f"is cut off, copy it again"
                )
        found: Iterator[bytes]
        if files.is_local(self.uri):
            found = (self._read_at(offsets[i], counts[i]) for i in stored)
        else:  # of an object all at once, a request for each would take its time
            starts, lengths = [offsets[i] for i in stored], [counts[i] for i in stored]
            found = iter(files.read_ranges(self.uri, starts, lengths) if stored else ())
        for index in indices:
            data = next(found) if counts[index] else None
            if data is not None and len(data) != counts[index]:
                raise SlideError(
                    f"{self.uri}: segment {index} of level {level} should hold "
                    f"{counts[index]} bytes, found {len(data)}; the file is cut off, "
                    f"copy it again"
                )
            yield index, data

    def _read_at(self, offset: int, count: int) -> bytes:
        with self._lock:
            self._file.seek(offset)
            data: bytes = self._file.read(count)
        return data

    def close(self) -> None:
        """Close the file."""
        self._tiff.close()
        self._file.close()


# --- headers --------------------------------------------------------------------------


def _check_page(uri: str, page: Any, frame: Any) -> None:
    """Bound what the header declares before anything is allocated for it."""
    height, width = frame.imagelength, frame.imagewidth
    if not (0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        raise SlideError(
            f"{uri}: declares {height} x {width} pixels, at most {MAX_SIDE} a side "
            f"are read; the header is damaged"
        )
    if frame.dtype is None or frame.dtype.kind not in "ub" or frame.dtype.itemsize > 2:
        raise SlideError(
            f"{uri}: holds {frame.bitspersample}-bit samples of type {frame.dtype}, "
            f"expected 8 or 16 bit unsigned; convert it first"
        )
    if frame.photometric not in (0, 1, 2, 3, 6) or frame.samplesperpixel > 4:
        raise SlideError(
            f"{uri}: holds {frame.samplesperpixel} samples a pixel, photometric "
            f"{frame.photometric!s}; expected RGB, RGBA, grey or palette"
        )
    colors = 3 << frame.bitspersample
    if frame.photometric == 3 and np.size(frame.colormap) != colors:
        raise SlideError(
            f"{uri}: expected a palette of {colors} values, found "
            f"{np.size(frame.colormap)}; the header is damaged"
        )
    rows, columns = _segment_size(frame)
    decoded = rows * columns * frame.samplesperpixel * frame.dtype.itemsize
    if decoded > _MAX_SEGMENT_BYTES:
        raise SlideError(
            f"{uri}: one tile or strip decodes to {decoded} bytes, at most "
            f"{_MAX_SEGMENT_BYTES} are held; save it with smaller tiles"
        )
    planes = frame.samplesperpixel if frame.planarconfig == 2 else 1
    expected = planes * math.ceil(height / rows) * math.ceil(width / columns)
    places = [np.asarray(part) for part in (page.dataoffsets, page.databytecounts)]
    if any(part.dtype.kind not in "ui" or part.min(initial=0) < 0 for part in places):
        raise SlideError(f"{uri}: its tiles or strips have no places; it is damaged")
    found = min(map(len, places))
    if found != expected:
        raise SlideError(
            f"{uri}: {height} x {width} pixels need {expected} tiles or strips, found "
            f"{found}; the header is damaged"
        )


def _segment_size(frame: Any) -> tuple[int, int]:
    if frame.is_tiled:
        return max(1, frame.tilelength), max(1, frame.tilewidth)
    rows = frame.rowsperstrip or frame.imagelength
    return max(1, min(rows, frame.imagelength)), frame.imagewidth


def _levels(uri: str, pages: list[Any]) -> tuple[Level, ...]:
    sizes = [(p.keyframe.imagelength, p.keyframe.imagewidth) for p in pages]
    height, width = sizes[0]
    levels = []
    for h, w in sizes:
        if h > height or w > width:
            raise SlideError(f"{uri}: level of {h} x {w} is larger than level 0")
        levels.append(Level(h, w, (height / h + width / w) / 2))
    return tuple(levels)


def _facts(tiff: Any) -> tuple[str, float | None, float | None]:
    """Give format, microns per pixel and magnification, as the tags say."""
    page = tiff.series[0].pages[0].keyframe
    description = page.description or ""
    if tiff.is_svs:
        values = dict(re.findall(r"\|\s*([^|=]+?)\s*=\s*([^|]*)", description))
        return "svs", sane_mpp(_float(values.get("MPP"))), _float(values.get("AppMag"))
    if tiff.is_ome:
        return "ome-tiff", sane_mpp(_ome_mpp(tiff.ome_metadata)), None
    if tiff.is_ndpi:
        magnification = page.ndpi_tags.get("Magnification") if page.ndpi_tags else None
        return "ndpi", _resolution_mpp(page), _float(magnification)
    kinds = ("scn", "bif", "qpi", "philips")
    name = next((k for k in kinds if getattr(tiff, f"is_{k}", False)), "tiff")
    return name, _resolution_mpp(page), None


def _float(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def _ome_mpp(xml: str | None) -> float | None:
    """Read PhysicalSizeX of the first image (OME schema 2016-06)."""
    if not xml:
        return None
    for element in ElementTree.fromstring(xml).iter():
        if element.tag.rpartition("}")[2] == "Pixels":
            size = _float(element.get("PhysicalSizeX"))
            unit = _MICRONS.get(element.get("PhysicalSizeXUnit", "µm"))
            return size * unit if size and unit else None
    return None


def _resolution_mpp(page: Any) -> float | None:
    """Read XResolution and ResolutionUnit (TIFF 6.0, section 8)."""
    tag, unit = page.tags.get("XResolution"), page.tags.get("ResolutionUnit")
    microns = {2: 25400.0, 3: 1e4}.get(int(unit.value) if unit else 2)
    if tag is None or microns is None:
        return None
    numerator, denominator = tag.value if len(tag.value) == 2 else (0, 1)
    return sane_mpp(microns * denominator / numerator) if numerator else None


# --- pixels ---------------------------------------------------------------------------


def _touched(
    frame: Any, planes: int, y: int, x: int, height: int, width: int
) -> Iterator[int]:
    """Give the indices of the tiles or strips that a rectangle touches."""
    rows, columns = _segment_size(frame)
    across = math.ceil(frame.imagewidth / columns)
    down = math.ceil(frame.imagelength / rows)
    for plane in range(planes):
        for row in range(y // rows, (y + height - 1) // rows + 1):
            for column in range(x // columns, (x + width - 1) // columns + 1):
                yield (plane * down + row) * across + column


def _to_rgb(raw: npt.NDArray[Any], frame: Any) -> UInt8:
    """Turn samples (H, W, S) of 1, 8 or 16 bit into (H, W, 3) uint8 RGB.

    16 bit samples keep their upper 8 bits; RGBA is laid on white.
    """
    if frame.photometric == 3:
        colormap = np.reshape(frame.colormap, (3, -1))  # 16 bit by the standard
        scale = 8 if colormap.max(initial=0) > 255 else 0
        palette = (colormap >> scale).astype(np.uint8)
        return np.moveaxis(palette[:, raw[..., 0]], 0, 2)
    if frame.bitspersample == 1 or raw.dtype.kind == "b":
        raw = raw.astype(np.uint8) * 255
    if raw.dtype.itemsize == 2:
        raw = (raw >> 8).astype(np.uint8)
    if frame.photometric == 0:
        raw = 255 - raw
    if raw.shape[2] == 3:
        return raw
    if raw.shape[2] <= 2:  # grey, perhaps with alpha
        return np.repeat(raw[..., :1], 3, axis=2)
    return on_white(raw)


def on_white(rgba: UInt8) -> UInt8:
    """Lay (H, W, 4) uint8 RGBA on white: (H, W, 3) uint8."""
    color, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    blended: UInt8 = ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(
        np.uint8
    )
    return blended
