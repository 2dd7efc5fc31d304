"""TIFF slides through tifffile: flat, pyramidal, SVS, OME-TIFF, NDPI and more.

A rectangle is read by decoding only the tiles or strips that it touches, straight from
their bytes in the file into one array.

One file, because the checks of the headers decide which bytes the decoder may trust.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from PIL import Image

from medray.errors import SlideError, StoreError
from medray.slides.base import MAX_SIDE, Level, Slide, check_rectangle
from medray.slides.colors import JPEG, check_colors, to_rgb
from medray.slides.readable import MOST_UNREADABLE
from medray.slides.vendors import choose_image
from medray.storage import files, remote_files
from medray.types import UInt8

# A tile or strip that decodes to more than this is a bomb, not a slide.
_MAX_SEGMENT_BYTES = 1 << 30
# No slide has so many labels, thumbnails, levels and planes.
_MAX_PAGES = 500
_JPEG_START, _JPEG_SCAN, _JPEG_END = b"\xff\xd8", b"\xff\xda", b"\xff\xd9"
_ALT_JPEG, _ORIENTATION = 33007, 274
# What is wrong with a file is reported by SlideError, once.
logging.getLogger("tifffile").setLevel(logging.CRITICAL)


class TiffSlide(Slide):
    """A TIFF file as a slide; see medray.slides.base.Slide."""

    def __init__(
        self, uri: str, scene: int | None = None, plane: int | None = None
    ) -> None:
        """Open the file and read its headers.

        Args:
            uri: Path or address.
            scene: Which of several slides in it; see `choose_image`.
            plane: Which of several focal planes.

        Raises:
            SlideError: It is no TIFF, or one that cannot be a slide.
            StoreError: It cannot be read now.
        """
        self.uri = uri
        try:
            self._file = remote_files.open_file(uri)
        except FileNotFoundError as error:
            raise SlideError(f"{uri}: cannot be opened ({error})") from error
        # A slide that a cache drops may still be read: its last reader closes it.
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()
        try:
            self._tiff = tifffile.TiffFile(self._file, name=os.path.basename(uri))
            self._check_count()
            image = choose_image(uri, self._tiff, scene, plane)
            self._pages = image.levels
            for page in itertools.chain(*self._pages):
                _check_page(uri, page, page.keyframe)
                self._check_33007(page)
            self.format, self.resolution = image.format, image.mpp
            self.magnification = image.magnification
            self._size = self._file.seek(0, os.SEEK_END)
            remarks = [image.note, *self._remarks()]
            self.note = "; ".join(filter(None, remarks))
            self.levels = _levels(uri, [page for page, *_ in self._pages])
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

    def _check_count(self) -> None:
        """Bound how many images the header declares before they are looked at."""
        for count, image in enumerate(self._tiff.pages):
            levels = len(getattr(image, "subifds", None) or ())
            if count == _MAX_PAGES or levels > _MAX_PAGES:
                raise SlideError(
                    f"{self.uri}: declares more than {_MAX_PAGES} images or levels; "
                    f"the file is damaged or not a slide"
                )

    def _check_33007(self, page: Any) -> None:
        """Raise an error for Aperio's raw YCbCr, numbered as a kind of JPEG."""
        if page.keyframe.compression != _ALT_JPEG:
            return
        places = zip(page.dataoffsets, page.databytecounts, strict=False)
        first = next((offset for offset, count in places if offset and count), None)
        start = _JPEG_START if first is None else self._read_at(first, 2)
        if start != _JPEG_START:
            raise SlideError(
                f"{self.uri}: compression 33007 holds raw samples here, expected JPEG; "
                f"export it again with JPEG or without compression"
            )

    def _remarks(self) -> Iterator[str]:
        """Yield what the user should know of its tags and tiles."""
        turned = int(self._pages[0][0].keyframe.tags.valueof(_ORIENTATION, 1))
        if turned != 1:
            yield (
                f"its tag Orientation ({turned}) is not applied; other programs may "
                f"show it turned, check that its annotation lies right"
            )
        yield from self._leave_out_absent()

    def _leave_out_absent(self) -> Iterator[str]:
        """Leave out levels of which too many tiles were never stored.

        Yields:
            What the user should know of absent tiles.

        Raises:
            SlideError: Level 0 is such a level.
        """
        kept = []
        for level, pages in enumerate(self._pages):
            never, beyond = self._count_absent(pages)
            count = sum(len(page.databytecounts) for page in pages)
            said = f"{never} of {count} tiles or strips of level {level} were never"
            kept.append(pages)
            if never and self._knows_missing(level):
                yield f"{said} stored: computed from level {level - 1}"
            elif never > MOST_UNREADABLE * count:
                if level == 0:
                    raise SlideError(
                        f"{self.uri}: {said} stored, at most {MOST_UNREADABLE:.0%} may "
                        f"be missing; what lay there is unknown, copy, export or scan "
                        f"the slide again"
                    )
                kept.pop()
                yield f"{said} stored: this level is not used"
            elif never:
                yield f"{said} stored: unreadable"
            if beyond:
                yield (
                    f"{beyond} of {count} tiles or strips of level {level} lie beyond "
                    f"the end of the file, which is cut off: unreadable"
                )
            if level == 0:
                self.absent = (beyond + never) / count
        self._pages = tuple(kept)

    def _count_absent(self, pages: tuple[Any, ...]) -> tuple[int, int]:
        """Count tiles or strips never stored, and those that the file's end cuts."""
        offsets, counts = (
            np.concatenate([np.asarray(part, np.uint64) for part in parts])
            for parts in (
                [page.dataoffsets for page in pages],
                [page.databytecounts for page in pages],
            )
        )
        absent = (offsets == 0) | (counts == 0)
        end = np.uint64(self._size)
        left = end - np.minimum(offsets, end)  # the sum of both may overflow
        beyond = int(np.count_nonzero(~absent & (counts > left)))
        never = 0 if self.format == "philips" else int(np.count_nonzero(absent))
        return never, beyond

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> UInt8:
        """Read a rectangle; see medray.slides.base.Slide.read."""
        check_rectangle(self.levels, y, x, height, width, level)
        parts = [
            self._read_page(page, level, y, x, height, width)
            for page in self._pages[level]
        ]
        if len(parts) == 1:
            return parts[0]
        return np.stack([part[..., 0] for part in parts], axis=2)

    def _read_page(
        self, page: Any, level: int, y: int, x: int, height: int, width: int
    ) -> UInt8:
        """Read a rectangle of one page as RGB."""
        frame = page.keyframe
        planes = frame.samplesperpixel if frame.planarconfig == 2 else 1
        touched = [*_touched(frame, planes, y, x, height, width)]
        offsets, counts = page.dataoffsets, page.databytecounts
        missing = [i for i in touched if not (offsets[i] and counts[i])]
        if missing and not self._knows_missing(level):
            raise SlideError(
                f"{self.uri}: segment {missing[0]} of level {level} was never stored; "
                f"what lay there is unknown, copy or scan the slide again"
            )
        shape = (height, width, frame.samplesperpixel)
        raw = (np.zeros if missing else np.empty)(shape, frame.dtype)
        stored = (
            [i for i in touched if offsets[i] and counts[i]] if missing else touched
        )
        each = len(offsets) // planes
        for index, data in self._stored(page, level, stored):
            self._decode_into(raw, page, level, index, data, index // each, y, x)
        rgb = to_rgb(raw, frame)
        for index in missing:
            self._fill(rgb, frame, level, index % each, y, x)
        return rgb

    def _knows_missing(self, level: int) -> bool:
        """Return whether the content of a tile that was never stored is known."""
        # Philips leaves out glass. Aperio's tiles are in the finer level.
        return self.format == "philips" or (self.format == "svs" and level > 0)

    def _fill(
        self, rgb: UInt8, frame: Any, level: int, index: int, y: int, x: int
    ) -> None:
        """Paint one missing tile or strip: white, or the means of the finer level."""
        rows, columns = _segment_size(frame)
        across = math.ceil(frame.imagewidth / columns)
        top, left = index // across * rows, index % across * columns
        bottom = min(top + rows, frame.imagelength)
        right = min(left + columns, frame.imagewidth)
        y0, y1 = max(y, top), min(y + rgb.shape[0], bottom)
        x0, x1 = max(x, left), min(x + rgb.shape[1], right)
        target = rgb[y0 - y : y1 - y, x0 - x : x1 - x]
        if self.format == "philips":
            target[...] = 255
            return
        # The whole tile, so that its pixels do not depend on the rectangle.
        whole = self._reduced(level, top, left, bottom, right)
        target[...] = whole[y0 - top : y1 - top, x0 - left : x1 - left]

    def _reduced(
        self, level: int, top: int, left: int, bottom: int, right: int
    ) -> UInt8:
        """Compute a rectangle of a level as means of the next finer level's pixels."""
        coarse, fine = self.levels[level], self.levels[level - 1]
        down, across = fine.height / coarse.height, fine.width / coarse.width
        box = (left * across, top * down, right * across, bottom * down)
        x0, y0, x1, y1 = (
            math.floor(box[0]),
            math.floor(box[1]),
            math.ceil(box[2]),
            math.ceil(box[3]),
        )
        x1, y1 = min(x1, fine.width), min(y1, fine.height)
        if 3 * (y1 - y0) * (x1 - x0) > _MAX_SEGMENT_BYTES:
            raise SlideError(
                f"{self.uri}: a tile of level {level} was never stored, and is too "
                f"large to be computed from level {level - 1}; copy or scan the slide "
                f"again"
            )
        pixels = self.read(y0, x0, y1 - y0, x1 - x0, level - 1)
        inside = (
            box[0] - x0,
            box[1] - y0,
            min(box[2], fine.width) - x0,
            min(box[3], fine.height) - y0,
        )
        picture = Image.fromarray(pixels).resize(
            (right - left, bottom - top), Image.Resampling.BOX, inside
        )
        return np.asarray(picture)

    def _decode_into(
        self,
        raw: npt.NDArray[Any],
        page: Any,
        level: int,
        index: int,
        data: bytes,
        plane: int,
        y: int,
        x: int,
    ) -> None:
        """Decode one tile or strip and copy its part of the rectangle."""
        frame = page.keyframe
        options = {}
        if frame.compression in JPEG:
            options = {"jpegtables": page.jpegtables, "jpegheader": frame.jpegheader}
            # libjpeg fills up what is missing with grey, and only warns.
            if frame.jpegheader is None and not _has_end(data):
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
    ) -> Iterator[tuple[int, bytes]]:
        """Yield the stored bytes of tiles or strips."""
        offsets, counts = page.dataoffsets, page.databytecounts
        for index in indices:
            if offsets[index] + counts[index] > self._size:
                raise SlideError(
                    f"{self.uri}: segment {index} of level {level} ends at byte "
                    f"{offsets[index] + counts[index]}, the file at {self._size}; it "
                    f"is cut off, copy it again"
                )
        found: Iterator[bytes]
        if files.is_local(self.uri):
            found = (self._read_at(offsets[i], counts[i]) for i in indices)
        else:  # of an object all at once, a request for each would take its time
            starts = [offsets[i] for i in indices]
            lengths = [counts[i] for i in indices]
            found = iter(
                files.read_ranges(self.uri, starts, lengths) if indices else ()
            )
        for index, data in zip(indices, found, strict=True):
            if len(data) != counts[index]:
                raise SlideError(
                    f"{self.uri}: segment {index} of level {level} should hold "
                    f"{counts[index]} bytes, found {len(data)}; the file is cut off, "
                    f"copy it again"
                )
            yield index, data

    def _read_at(self, offset: int, count: int) -> bytes:
        with self._lock:
            try:
                self._file.seek(offset)
                data: bytes = self._file.read(count)
            except OSError as error:  # the system does not name a file that is open
                raise OSError(error.errno, error.strerror, self.uri) from error
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
    if frame.imagedepth > 1 or (frame.is_tiled and frame.tiledepth > 1):
        raise SlideError(
            f"{uri}: its tags ImageDepth and TileDepth are {frame.imagedepth} and "
            f"{frame.tiledepth}, of a volume; expected 1, convert it to a TIFF without"
        )
    check_colors(uri, frame)
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


def _has_end(data: bytes) -> bool:
    """Return whether a JPEG has its end marker, with or without padding after it."""
    if _JPEG_END in data[-64:]:
        return True
    # Inside the scan that follows the last SOS marker no other marker has this code.
    return data.rfind(_JPEG_END) > data.rfind(_JPEG_SCAN)


def _levels(uri: str, pages: list[Any]) -> tuple[Level, ...]:
    sizes = [(p.keyframe.imagelength, p.keyframe.imagewidth) for p in pages]
    height, width = sizes[0]
    levels = []
    for h, w in sizes:
        if h > height or w > width:
            raise SlideError(f"{uri}: level of {h} x {w} is larger than level 0")
        levels.append(Level(h, w, (height / h + width / w) / 2))
    return tuple(levels)


# --- pixels ---------------------------------------------------------------------------


def _touched(
    frame: Any, planes: int, y: int, x: int, height: int, width: int
) -> Iterator[int]:
    """Yield the indices of the tiles or strips that a rectangle touches."""
    rows, columns = _segment_size(frame)
    across = math.ceil(frame.imagewidth / columns)
    down = math.ceil(frame.imagelength / rows)
    for plane in range(planes):
        for row in range(y // rows, (y + height - 1) // rows + 1):
            for column in range(x // columns, (x + width - 1) // columns + 1):
                yield (plane * down + row) * across + column
