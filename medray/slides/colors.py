"""What the samples of a TIFF mean: from stored numbers to RGB on white (TIFF 6.0)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.errors import SlideError
from medray.slides.base import NeedsOpenSlideError
from medray.types import UInt8

JPEG = (6, 7, 34892, 33007)
"""TIFF compressions that tifffile decodes as JPEG; it makes RGB of YCbCr."""
_OLD_JPEG, _APERIO_YCBCR, _APERIO_RGB = 6, 33003, 33005
# Codecs that store bytes as they are; others may transform colours themselves.
_LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 34926, 50000)
_COLORS = {0: 1, 1: 1, 2: 3, 3: 1, 6: 3}
_UNSPECIFIED, _ASSOCIATED, _UNASSOCIATED = 0, 1, 2  # ExtraSamples
_COEFFICIENTS, _REFERENCE = 529, 532  # YCbCrCoefficients, ReferenceBlackWhite
_MAX_SAMPLE_VALUE = 281
_LUMA = (0.299, 0.587, 0.114)
_FULL_RANGE = (0.0, 255.0, 128.0, 255.0, 128.0, 255.0)


def check_colors(uri: str, frame: Any) -> None:
    """Raise an error for samples that have no single meaning as RGB.

    Args:
        uri: Of the file, for the message.
        frame: tifffile's page, or its keyframe.

    Raises:
        NeedsOpenSlideError: libtiff can make RGB of them.
        SlideError: They are no picture in colours or grey, or undefined.
    """
    bits, dtype = frame.bitspersample, frame.dtype
    photometric, samples = int(frame.photometric), frame.samplesperpixel
    if not isinstance(bits, int):
        raise SlideError(
            f"{uri}: its samples have {bits} bits each, expected equal numbers; save "
            f"it with 8 bits a sample"
        )
    if dtype is None or dtype.kind not in "ub" or dtype.itemsize > 2:
        raise SlideError(
            f"{uri}: holds {bits}-bit samples of type {dtype}, expected unsigned "
            f"integers of 1 to 16 bits; convert it first"
        )
    colors = _COLORS.get(photometric)
    if colors is None or not colors <= samples <= 4:
        raise SlideError(
            f"{uri}: holds {samples} samples a pixel, photometric "
            f"{frame.photometric!s}; expected RGB, RGBA, grey, YCbCr or palette; "
            f"convert it to RGB"
        )
    extra = [int(value) for value in frame.extrasamples][: samples - colors]
    if len(extra) < samples - colors:
        raise SlideError(
            f"{uri}: holds {samples} samples a pixel, {colors} of them colour, and no "
            f"tag ExtraSamples that says what the others are; save it as RGB"
        )
    if colors == 1 and any(value == _UNSPECIFIED for value in extra):
        raise SlideError(
            f"{uri}: holds {samples} channels a pixel (photometric "
            f"{frame.photometric!s}), expected RGB or one channel of grey; save the "
            f"channels as RGB or as files of their own"
        )
    if extra and extra[0] not in (_UNSPECIFIED, _ASSOCIATED, _UNASSOCIATED):
        raise SlideError(
            f"{uri}: ExtraSamples is {extra[0]}, expected 0, 1 or 2; save it as RGB"
        )
    if photometric == 3:
        _check_palette(uri, frame, bits, samples)
    _check_compression(uri, frame, photometric)


def _check_palette(uri: str, frame: Any, bits: int, samples: int) -> None:
    if np.size(frame.colormap) != 3 << bits:
        raise SlideError(
            f"{uri}: expected a palette of {3 << bits} values, found "
            f"{np.size(frame.colormap)}; the header is damaged"
        )
    if frame.compression in JPEG:
        raise SlideError(
            f"{uri}: holds indices of a palette under JPEG, which does not keep them; "
            f"expected a lossless compression, save it as RGB"
        )
    if samples > 1:
        raise SlideError(
            f"{uri}: holds {samples} samples a pixel, expected one with a palette; "
            f"save it as RGB"
        )


def _check_compression(uri: str, frame: Any, photometric: int) -> None:
    compression = frame.compression
    if compression == _OLD_JPEG:
        raise NeedsOpenSlideError(
            f"{uri}: compression 6 (old-style JPEG) is not read, expected 7 (JPEG); "
            f"save it again"
        )
    if compression in (_APERIO_YCBCR, _APERIO_RGB):
        if frame.bitspersample != 8 or frame.samplesperpixel != 3:
            raise SlideError(
                f"{uri}: compression {int(compression)} with {frame.samplesperpixel} "
                f"samples of {frame.bitspersample} bits, expected 3 of 8; save it as "
                f"RGB"
            )
        return
    if photometric != 6 or (compression in JPEG and frame.planarconfig == 1):
        return
    if frame.is_subsampled or compression in JPEG:
        raise NeedsOpenSlideError(
            f"{uri}: holds subsampled or planar YCbCr under compression "
            f"{compression!s}, expected JPEG or full YCbCr; save it as RGB"
        )
    if compression not in _LOSSLESS or frame.bitspersample != 8:
        raise SlideError(
            f"{uri}: holds YCbCr of {frame.bitspersample} bits under compression "
            f"{compression!s}, which leaves open what is stored; save it as RGB"
        )


def to_rgb(raw: npt.NDArray[Any], frame: Any) -> UInt8:
    """Turn decoded samples into RGB.

    Up to 16 bits are scaled by their full range (16 bits keep their upper 8). Alpha is
    laid on white; a fourth sample that is not alpha (ExtraSamples 0) is left out.

    Args:
        raw: (H, W, S) bool, uint8 or uint16, as tifffile decodes them.
        frame: The page's, that `check_colors` let pass.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    photometric = int(frame.photometric)
    if photometric == 3:
        colormap = np.reshape(frame.colormap, (3, -1))  # 16 bit by the standard
        scale = 8 if colormap.max(initial=0) > 255 else 0
        palette = (colormap >> scale).astype(np.uint8)
        # As indices: bool would be a mask.
        return np.moveaxis(palette[:, raw[..., 0].astype(np.intp)], 0, 2)
    samples = _to_eight_bits(raw, frame)
    colors = samples[..., : _COLORS[photometric]]
    if photometric == 0:
        colors = 255 - colors
    elif frame.compression == _APERIO_YCBCR:
        # Whatever Photometric says: 33003 stores YCbCr, 33005 RGB (OpenSlide's rule).
        colors = _ycbcr_to_rgb(colors, _LUMA, _FULL_RANGE)
    elif photometric == 6 and frame.compression not in (*JPEG, _APERIO_RGB):
        luma = _rationals(frame, _COEFFICIENTS, _LUMA)
        colors = _ycbcr_to_rgb(colors, luma, _rationals(frame, _REFERENCE, _FULL_RANGE))
    if colors.shape[2] == 1:
        colors = np.repeat(colors, 3, axis=2)
    extra = frame.extrasamples
    if samples.shape[2] == _COLORS[photometric] or not extra or not int(extra[0]):
        return colors if colors.shape == samples.shape else colors.copy()
    alpha = samples[..., _COLORS[photometric], None]
    if int(extra[0]) == _ASSOCIATED:  # colours are multiplied by it already
        white = 255 - alpha.astype(np.uint16)
        blended: UInt8 = np.minimum(colors + white, 255).astype(np.uint8)
        return blended
    return on_white(np.concatenate([colors, alpha], axis=2))


def _to_eight_bits(raw: npt.NDArray[Any], frame: Any) -> UInt8:
    bits = frame.bitspersample
    top = (1 << bits) - 1
    if raw.dtype.itemsize == 2:
        # Cameras of 10 to 14 bits say so here, and leave the upper bits empty.
        said = np.max(frame.tags.valueof(_MAX_SAMPLE_VALUE, top), initial=0)
        if 255 < said < top and int(said) & (int(said) + 1) == 0:
            top = int(said)
    if top == 255:
        return raw.astype(np.uint8, copy=False)
    if top == 65535:
        return (raw >> 8).astype(np.uint8)
    wide = np.minimum(raw, top).astype(np.uint32)
    scaled: UInt8 = ((wide * 255 + top // 2) // top).astype(np.uint8)
    return scaled


def _rationals(frame: Any, tag: int, default: tuple[float, ...]) -> tuple[float, ...]:
    """Return the numbers of a tag of rationals; `default` if it has none that count."""
    value = frame.tags.valueof(tag)
    if not isinstance(value, tuple) or len(value) != 2 * len(default):
        return default
    pairs = zip(value[::2], value[1::2], strict=True)
    numbers = tuple(float(n) / float(d) if d else math.nan for n, d in pairs)
    return numbers if all(map(math.isfinite, numbers)) else default


def _ycbcr_to_rgb(
    raw: UInt8, luma: tuple[float, ...], reference: tuple[float, ...]
) -> UInt8:
    """Turn (H, W, 3) uint8 YCbCr into RGB (TIFF 6.0, section 21)."""
    red, green, blue = luma
    spans = []
    for index, full in enumerate((255.0, 127.0, 127.0)):
        black, white = reference[2 * index : 2 * index + 2]
        span = white - black or 1.0
        spans.append((raw[..., index].astype(np.float32) - black) * (full / span))
    y, cb, cr = spans
    r = y + cr * (2 - 2 * red)
    b = y + cb * (2 - 2 * blue)
    g = (y - red * r - blue * b) / (green or 1.0)
    rounded = np.rint(np.stack([r, g, b], axis=2))
    rgb: UInt8 = np.clip(rounded, 0, 255).astype(np.uint8)
    return rgb


def on_white(rgba: UInt8) -> UInt8:
    """Lay (H, W, 4) uint8 RGBA on white: (H, W, 3) uint8."""
    color, alpha = rgba[..., :3].astype(np.uint32), rgba[..., 3:].astype(np.uint32)
    blended: UInt8 = ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(
        np.uint8
    )
    return blended
