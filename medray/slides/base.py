"""The interface of slides to the rest of medray, for all file formats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

from medray.errors import SlideError
from medray.types import UInt8

# Larger sides are no slides but broken or hostile headers.
MAX_SIDE = 2**20
SANE_MPP = (0.01, 100.0)
"""Coarser or finer pixels are no microscope's; a tag that has them means something
else."""

_MOST_OBLONG = 1.01


@dataclass(frozen=True)
class Mpp:
    """Microns per pixel of level 0.

    Attributes:
        x: Across.
        y: Down.
        source: What says so, such as `XResolution` or `--mpp`.
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
    """A TIFF that OpenSlide may read and tifffile would read wrong, or not at all.

    Attributes:
        vendor: What OpenSlide must take it for; "" if it does not matter.
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
        downsample: How many level-0 pixels one pixel spans, a side.
    """

    height: int
    width: int
    downsample: float


class Slide(Protocol):
    """One image file, from a flat field to a gigapixel pyramid; the readers' base.

    Attributes:
        uri: Path or address.
        format: What it is, such as `svs`, `ome-tiff`, `png`.
        levels: Level 0 is the largest.
        resolution: Microns per pixel of level 0; None when the file does not say.
        magnification: Of the objective; None when the file does not say.
        note: What the user should know of how it is read ("" if nothing).
        absent: Share of level 0 that is not in the file, according to the header.
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
        """Microns per pixel of level 0 across; None when the file does not say."""
        return self.resolution.x if self.resolution else None

    def read(self, y: int, x: int, height: int, width: int, level: int = 0) -> UInt8:
        """Read a rectangle, in pixels of `level`, that lies inside the level.

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
        raise ValueError(f"there are levels 0 to {len(levels) - 1}, found {level}")
    inside = levels[level]
    fits = y >= 0 and x >= 0 and height > 0 and width > 0
    if not fits or y + height > inside.height or x + width > inside.width:
        raise ValueError(
            f"rectangle y={y} x={x} height={height} width={width} does not lie inside "
            f"level {level} of {inside.height} x {inside.width} pixels"
        )


def sane_mpp(value: float | None) -> float | None:
    """Return `value` if a microscope can have so many microns per pixel, else None."""
    if value is None or not SANE_MPP[0] <= value <= SANE_MPP[1]:
        return None
    return value


def mpp_of(x: float | None, y: float | None, source: str) -> Mpp | None:
    """Return what a file says of its microns per pixel.

    Args:
        x: Microns per pixel across; None when the file does not say.
        y: The same down.
        source: What says so.

    Returns:
        None where a microscope can have neither. A file that says one of them only is
        taken to have square pixels, and its source says so.
    """
    x, y = sane_mpp(x), sane_mpp(y)
    if x is None or y is None:
        known = x or y
        missing = "y" if x else "x"
        return Mpp(known, known, f"{source}; {missing} not given") if known else None
    return Mpp(x, y, source)
