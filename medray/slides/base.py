"""The interface of slides to the rest of medray, for all file formats."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Protocol, Self

from medray.errors import SlideError
from medray.types import UInt8

MAX_SIDE = 2**20
"""Longest side in pixels; a header that claims more is damaged or malicious."""
SANE_MPP = (0.01, 100.0)
"""Plausible microns per pixel; a tag outside this range holds something else."""

_MOST_OBLONG = 1.01


@dataclass(frozen=True)
class Mpp:
    """Microns per pixel of level 0.

    Attributes:
        x: Across.
        y: Down.
        source: Where the values come from, such as `XResolution` or `--mpp`.
    """

    x: float
    y: float
    source: str

    @property
    def is_square(self) -> bool:
        """Whether both are the same within 1 %."""
        return 1 / _MOST_OBLONG <= self.x / self.y <= _MOST_OBLONG

    def __str__(self) -> str:
        """Name the value and where it comes from."""
        both = f"{self.x:.6g}" if self.is_square else f"{self.x:.6g} x {self.y:.6g}"
        return f"{both} um per pixel ({self.source})"


class NeedsOpenSlideError(SlideError):
    """A TIFF that tifffile would misread or not read, and OpenSlide may read.

    Attributes:
        vendor: Vendor that OpenSlide must detect; "" if any will do.
    """

    def __init__(self, message: str, vendor: str = "") -> None:
        """Take the message and OpenSlide's name of the vendor."""
        super().__init__(message)
        self.vendor = vendor


@dataclass(frozen=True)
class Level:
    """One level of a slide's pyramid.

    Attributes:
        height: Pixels.
        width: Pixels.
        downsample: Level-0 pixels per pixel of this level, along one axis.
    """

    height: int
    width: int
    downsample: float


class Slide(Protocol):
    """One image, from a single field to a gigapixel pyramid; base of the readers.

    Attributes:
        uri: Path or address.
        format: Format of the file, such as `svs`, `ome-tiff`, `png`.
        levels: From the largest, level 0, to the smallest.
        resolution: Microns per pixel of level 0; None if the file does not say.
        magnification: Magnification of the objective; None if the file does not say.
        note: Remark for the user on how it is read, or "".
        absent: Share of level 0, 0 to 1, without pixels in the file, by its header.
    """

    uri: str
    format: str
    levels: tuple[Level, ...]
    resolution: Mpp | None
    magnification: float | None
    note: str = ""
    absent: float = 0.0

    @property
    def mpp(self) -> float | None:
        """Microns per pixel of level 0, along x; None if the file does not say."""
        return self.resolution.x if self.resolution else None

    @abstractmethod
    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> UInt8:
        """Read a rectangle that lies inside a level.

        Args:
            y: First row, in pixels of `level` (OpenSlide takes those of level 0).
            x: First column, in pixels of `level`.
            height: Rows.
            width: Columns.
            level: Level to read.

        Returns:
            (height, width, 3) uint8 RGB.

        Raises:
            ValueError: The rectangle does not lie inside the level.
            SlideError: The file is damaged there.

        Examples:
            >>> with medray.open_slide("slides/slide_000.tif") as slide:
            ...     slide.read(y=0, x=128, height=256, width=512).shape
            (256, 512, 3)
        """
        ...

    @abstractmethod
    def close(self) -> None:
        """Close the file."""
        ...

    def __enter__(self) -> Self:
        """Return the slide itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


def check_rectangle(
    levels: tuple[Level, ...], y: int, x: int, height: int, width: int, level: int
) -> None:
    """Raise an error for a rectangle that does not lie inside its level.

    Raises:
        ValueError: It does not, or there is no such level.
    """
    if not 0 <= level < len(levels):
        raise ValueError(f"expected levels 0 to {len(levels) - 1}, found {level}")
    inside = levels[level]
    fits = y >= 0 and x >= 0 and height > 0 and width > 0
    if not fits or y + height > inside.height or x + width > inside.width:
        raise ValueError(
            f"rectangle y={y} x={x} height={height} width={width} does not lie inside "
            f"level {level} of height={inside.height} width={inside.width}"
        )


def sane_mpp(value: float | None) -> float | None:
    """Return `value` if it is plausible as microns per pixel, else None."""
    if value is None or not SANE_MPP[0] <= value <= SANE_MPP[1]:
        return None
    return value


def mpp_of(x: float | None, y: float | None, source: str) -> Mpp | None:
    """Return the microns per pixel of a file.

    Args:
        x: Microns per pixel along x; None if the file does not say.
        y: Microns per pixel along y; None if the file does not say.
        source: Where the values come from.

    Returns:
        None if neither is given and plausible. If only one is, pixels are taken to be
        square, and the source says so.
    """
    x, y = sane_mpp(x), sane_mpp(y)
    if x is None or y is None:
        known = x or y
        missing = "y" if x else "x"
        return Mpp(known, known, f"{source}; no plausible {missing}") if known else None
    return Mpp(x, y, source)
