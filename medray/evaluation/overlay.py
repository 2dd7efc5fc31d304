"""Slides with what is true and what was predicted drawn over them, as pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from medray.classes import Classes, rgb_of
from medray.evaluation.html import SOFT
from medray.types import UInt8

_PANEL = (440, 294)  # height and width in pixels that a panel of an overlay may have
# Colour-blind safe (Okabe and Ito 2008).
AGREEMENT = {
    "correct": "#009e73",
    "wrongly marked": "#d55e00",
    "missed": "#0072b2",
    "another class": "#cc79a7",
}
CHANGE = {
    "right now": "#009e73",
    "wrong now": "#d55e00",
    "wrong otherwise": "#cc79a7",
}


def draw_overlay(
    rgb: UInt8,
    truth: UInt8,
    predicted: UInt8,
    classes: Classes,
    titles: tuple[str, str, str] = ("truth", "prediction", "agreement"),
) -> bytes:
    """Draw a slide with the truth, with the prediction, and with their agreement.

    Args:
        rgb: (h, w, 3) uint8, the slide at any coarse level.
        truth: (h, w) uint8 label values.
        predicted: (h, w) uint8 label values.
        classes: Gives the colours.
        titles: Of the three panels.

    Returns:
        A JPEG of the panels side by side, at most 900 pixels wide.

    Raises:
        ValueError: The three do not have the same height and width.
    """
    size, pixels, (true, found) = _enlarged(rgb, truth, predicted)
    panels = (
        _outlined(pixels, true, classes),
        _outlined(pixels, found, classes),
        _agreement(pixels, true, found),
    )
    return _sheet(dict(zip(titles, panels, strict=True)), size)


def draw_change(rgb: UInt8, truth: UInt8, before: UInt8, after: UInt8) -> bytes:
    """Draw how two predictions agree with the truth, and how their errors changed.

    Args:
        rgb: (h, w, 3) uint8, the slide at any coarse level.
        truth: (h, w) uint8 label values.
        before: (h, w) uint8 label values of prediction A.
        after: (h, w) uint8 label values of prediction B.

    Returns:
        A JPEG of the panels side by side, at most 900 pixels wide.

    Raises:
        ValueError: The four do not have the same height and width.
    """
    size, pixels, (true, old, new) = _enlarged(rgb, truth, before, after)
    panels = {
        "A": _agreement(pixels, true, old),
        "B": _agreement(pixels, true, new),
        "what changed": _painted(
            pixels,
            {
                CHANGE["right now"]: (old != true) & (new == true),
                CHANGE["wrong now"]: (old == true) & (new != true),
                CHANGE["wrong otherwise"]: (old != new) & (old != true) & (new != true),
            },
        ),
    }
    return _sheet(panels, size)


def _enlarged(
    rgb: UInt8, *labels: UInt8
) -> tuple[tuple[int, int], UInt8, tuple[UInt8, ...]]:
    """Return a panel's (height, width), and what to draw in it at twice that size.

    Drawn large and then reduced, outlines become smooth.
    """
    shapes = [rgb.shape[:2], *(label.shape for label in labels)]
    if len(set(shapes)) > 1:
        raise ValueError(f"slide and labels are of different sizes: {shapes}")
    height, width = shapes[0]
    scale = min(_PANEL[0] / height, _PANEL[1] / width, 4.0)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    drawn = (2 * size[0], 2 * size[1])
    pixels = _resized(rgb, drawn, Image.Resampling.BICUBIC)
    nearest = (_resized(label, drawn, Image.Resampling.NEAREST) for label in labels)
    return size, pixels, tuple(nearest)


def _sheet(panels: Mapping[str, UInt8], size: tuple[int, int]) -> bytes:
    """Put panels side by side under their titles, reduced to (height, width)."""
    gap, band = 8, 22
    count = len(panels)
    sheet_width = count * size[1] + (count - 1) * gap
    sheet = Image.new("RGB", (sheet_width, size[0] + band), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for i, (title, panel) in enumerate(panels.items()):
        left = i * (size[1] + gap)
        draw.text((left, 2), title, fill=SOFT, font=font)
        reduced = _resized(panel, size, Image.Resampling.BOX)
        sheet.paste(Image.fromarray(reduced), (left, band))
    buffer = io.BytesIO()
    # Without chroma subsampling: it washes out thin coloured lines.
    sheet.save(buffer, "JPEG", quality=85, subsampling=0)
    return buffer.getvalue()


def _resized(image: UInt8, size: tuple[int, int], how: Image.Resampling) -> UInt8:
    """Resize to (height, width)."""
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), how))


def _color(code: str) -> npt.NDArray[np.float32]:
    return np.array(rgb_of(code), np.float32)


def _outlined(rgb: UInt8, labels: UInt8, classes: Classes) -> UInt8:
    """Tint each class and draw its outline."""
    shown = rgb.astype(np.float32)
    for value in np.unique(labels[labels > 0]).tolist():
        color = _color(classes.colors[value])
        inside = labels == value
        shown[inside] = 0.8 * shown[inside] + 0.2 * color
        shown[inside & ~ndimage.binary_erosion(inside, iterations=3)] = color
    return shown.astype(np.uint8)


def _agreement(rgb: UInt8, truth: UInt8, predicted: UInt8) -> UInt8:
    """Colour each pixel by whether truth and prediction agree, on a pale slide."""
    places = {
        "correct": (truth == predicted) & (truth > 0),
        "wrongly marked": (truth == 0) & (predicted > 0),
        "missed": (truth > 0) & (predicted == 0),
        "another class": (truth != predicted) & (truth > 0) & (predicted > 0),
    }
    return _painted(rgb, {AGREEMENT[name]: where for name, where in places.items()})


def _painted(rgb: UInt8, places: Mapping[str, npt.NDArray[np.bool_]]) -> UInt8:
    """Paint places in their colours on a pale slide."""
    shown = np.repeat(rgb.mean(axis=2, keepdims=True) * 0.5 + 127, 3, axis=2)
    for color, where in places.items():
        shown[where] = 0.35 * shown[where] + 0.65 * _color(color)
    return shown.astype(np.uint8)
