"""Pictures of every kind that a folder may hold: right, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

from medray.datasets.cells import read_whole
from medray.errors import SlideError
from medray.slides.image import open_image
from medray.types import UInt8

GREY = np.arange(0, 240, dtype=np.uint8).reshape(12, 20)
COLOURS = np.stack([GREY, GREY[::-1], 255 - GREY], axis=2)
AS_RGB = np.repeat(GREY[..., None], 3, axis=2)
Save = Callable[[Path], Any]


def saved(picture: Image.Image, **options: Any) -> Save:
    return lambda path: picture.save(path, **options)


def with_alpha(mode: str) -> Image.Image:
    """Left half opaque, right half nothing."""
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[:, 10:] = 0
    pixels = GREY[..., None] if mode == "LA" else COLOURS
    return Image.fromarray(np.dstack([pixels, alpha]))


def left_on_white(pixels: UInt8) -> UInt8:
    pixels = pixels.copy()
    pixels[:, 10:] = 255
    return pixels


def palette() -> Image.Image:
    picture = Image.fromarray(GREY % 4, "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220])
    return picture


def of_palette() -> UInt8:
    table = np.reshape(
        [10, 20, 30, 40, 50, 60, 70, 80, 90, 200, 210, 220], (4, 3)
    ).astype(np.uint8)
    return table[GREY % 4]


def clear_first() -> UInt8:
    pixels = of_palette()
    pixels[GREY % 4 == 0] = 255
    return pixels


wide = GREY.astype(np.uint16) * 257
black_and_white = np.where(GREY[..., None] < 128, 0, 255).astype(np.uint8)
KINDS: dict[str, tuple[str, Save, UInt8]] = {
    "grey": ("png", saved(Image.fromarray(GREY)), AS_RGB),
    "grey of 16 bits": ("png", saved(Image.fromarray(wide)), AS_RGB),
    "grey of 16 bits, odd": ("png", saved(Image.fromarray(wide + 3)), AS_RGB),
    "TIFF of 16 bits": ("tif", lambda path: tifffile.imwrite(path, wide + 3), AS_RGB),
    "grey and alpha": (
        "png",
        saved(with_alpha("LA")),
        left_on_white(AS_RGB),
    ),
    "RGBA": ("png", saved(with_alpha("RGBA")), left_on_white(COLOURS)),
    "1 bit": (
        "png",
        saved(Image.fromarray(GREY >= 128)),
        np.repeat(black_and_white, 3, axis=2),
    ),
    "palette": ("png", saved(palette()), of_palette()),
    "palette with a clear colour": (
        "png",
        saved(palette(), transparency=0),
        clear_first(),
    ),
    "GIF": ("gif", saved(palette()), of_palette()),
    "WebP": ("webp", saved(Image.fromarray(COLOURS), lossless=True), COLOURS),
    "BMP": ("bmp", saved(Image.fromarray(COLOURS)), COLOURS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_read_as_it_looks(kind: str, tmp_path: Path) -> None:
    suffix, save, wanted = KINDS[kind]
    path = tmp_path / f"picture.{suffix}"
    save(path)
    np.testing.assert_array_equal(read_whole(str(path)), wanted)


def frames(path: Path) -> None:
    first, second = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    first.save(path, save_all=True, append_images=[second], duration=100)


@pytest.mark.parametrize(
    ("name", "save", "said"),
    [
        ("a.jpg", saved(Image.fromarray(COLOURS).convert("CMYK")), "holds CMYK pixels"),
        ("a.gif", frames, "holds 2 pictures, expected one"),
        ("a.webp", frames, "holds 2 pictures, expected one"),
        ("a.png", frames, "holds 2 pictures, expected one"),
        (
            "a.tif",
            lambda path: tifffile.imwrite(path, GREY.astype(np.float32)),
            "32-bit samples of type float32, expected unsigned",
        ),
        ("a.png", lambda path: path.write_bytes(b"\x89PNG no"), "expected a PNG"),
    ],
)
def test_what_has_no_one_meaning_is_refused(
    name: str, save: Save, said: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    save(path)
    with pytest.raises(SlideError, match=said) as refused:
        read_whole(str(path))
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_shown_upright(
    orientation: int, suffix: str, tmp_path: Path
) -> None:
    """Where the marked corner lies for each orientation, by EXIF 2.32."""
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8] = 255  # above, on the left
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: np.rot90(upright.swapaxes(0, 1), 2),
        8: np.rot90(upright, -1),
    }[orientation]
    picture = Image.fromarray(np.ascontiguousarray(stored))
    exif = picture.getexif()
    exif[0x0112] = orientation
    path = tmp_path / f"photo.{suffix}"
    picture.save(path, exif=exif, quality=100)
    slide = open_image(str(path))
    found = slide.read(0, 0, slide.levels[0].height, slide.levels[0].width)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() < 60
    assert ("Orientation" in slide.note) == (orientation != 1)


def test_a_picture_of_12_bits_in_16_is_remarked(tmp_path: Path) -> None:
    path = tmp_path / "camera.png"
    Image.fromarray(GREY.astype(np.uint16) * 16).save(path)
    assert "nearly black" in open_image(str(path)).note
    Image.fromarray(wide).save(path)
    assert open_image(str(path)).note == ""
