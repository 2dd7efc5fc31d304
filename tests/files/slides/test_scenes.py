"""Several slides or focal planes in one file: one is read and noted, or chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile

from medray.errors import SlideError
from medray.slides.opening import open_slide

TILED: dict[str, Any] = {"photometric": "rgb", "tile": (32, 32)}


def pixels(seed: int, height: int = 64, width: int = 96) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def read(path: Path, **chosen: int) -> tuple[np.ndarray, str]:
    with open_slide(path, **chosen) as slide:
        level = slide.levels[0]
        return slide.read(0, 0, level.height, level.width), slide.note


def test_images_of_an_ome_tiff(tmp_path: Path) -> None:
    path = tmp_path / "x.ome.tif"
    images = [("first", 3), ("label", 4), ("second", 5)]
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for name, seed in images:
            tiff.write(pixels(seed), metadata={"axes": "YXS", "Name": name}, **TILED)
    found, note = read(path)
    np.testing.assert_array_equal(found, pixels(3))
    assert note == "image 'first' is read, of 3 (--scene 0)"
    for scene, (_, seed) in enumerate(images):
        np.testing.assert_array_equal(read(path, scene=scene)[0], pixels(seed))
    for scene in (3, -1):
        with pytest.raises(SlideError, match=rf"scenes 0 to 2, found --scene {scene}"):
            open_slide(path, scene=scene)


def test_focal_planes_of_an_ome_tiff(tmp_path: Path) -> None:
    path = tmp_path / "x.ome.tif"
    planes = np.stack([pixels(seed) for seed in range(4)])
    with tifffile.TiffWriter(path, ome=True) as tiff:
        options = TILED | {"metadata": {"axes": "ZYXS"}}
        tiff.write(planes, subifds=1, **options)
        tiff.write(planes[:, ::2, ::2].copy(), subfiletype=1, **TILED)
    found, note = read(path)
    np.testing.assert_array_equal(found, planes[0])
    assert note == "several planes (Z=4): the first is read; --plane 0 to 3 chooses"
    for plane in range(4):
        found, note = read(path, plane=plane)
        np.testing.assert_array_equal(found, planes[plane])
        assert f"--plane {plane} is read" in note
        with open_slide(path, plane=plane) as slide:
            half = slide.levels[1]
            coarse = slide.read(0, 0, half.height, half.width, 1)
        np.testing.assert_array_equal(coarse, planes[plane, ::2, ::2])
    with pytest.raises(SlideError, match="planes 0 to 3, found --plane 4"):
        open_slide(path, plane=4)


def test_focal_planes_of_an_svs(tmp_path: Path) -> None:
    path = tmp_path / "x.svs"
    plain = TILED | {"metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        for size in (1, 2):
            for seed in range(3):
                tiff.write(
                    pixels(seed)[::size, ::size].copy(),
                    description="Aperio Image Library v12\r\n|AppMag = 20|MPP = 0.5",
                    **plain,
                )
    assert "3 focal planes: the first of each level is read" in read(path)[1]
    for plane in range(3):
        with open_slide(path, plane=plane) as slide:
            np.testing.assert_array_equal(slide.read(0, 0, 64, 96), pixels(plane))
            half = slide.read(0, 0, 32, 48, 1)
            np.testing.assert_array_equal(half, pixels(plane)[::2, ::2])
    with pytest.raises(SlideError, match="one scene only, found --scene 1"):
        open_slide(path, scene=1)


def test_an_svs_whose_levels_lack_planes(tmp_path: Path) -> None:
    path = tmp_path / "x.svs"
    said = "Aperio Image Library v12\r\n|AppMag = 20|MPP = 0.5"
    plain = TILED | {"metadata": None, "description": said}
    with tifffile.TiffWriter(path) as tiff:
        for seed in range(2):
            tiff.write(pixels(seed), **plain)
        tiff.write(pixels(0)[::2, ::2].copy(), **plain)
    for plane, levels in ((None, 2), (0, 2), (1, 1)):
        with open_slide(path, plane=plane) as slide:
            assert len(slide.levels) == levels
            assert slide.note.startswith("2 focal planes")
            np.testing.assert_array_equal(slide.read(0, 0, 64, 96), pixels(plane or 0))


def test_images_of_a_plain_tiff(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    with tifffile.TiffWriter(path) as tiff:
        for seed in (1, 2):
            size = (32 * seed, 48 * seed)
            tiff.write(pixels(seed, *size), photometric="rgb", metadata=None)
    for scene in (0, 1):
        found, _ = read(path, scene=scene)
        size = (32 * (scene + 1), 48 * (scene + 1))
        np.testing.assert_array_equal(found, pixels(scene + 1, *size))


@pytest.mark.parametrize("name", ["x.png", "x.tif"])
def test_what_a_file_does_not_have_is_refused(tmp_path: Path, name: str) -> None:
    from PIL import Image

    Image.fromarray(pixels(0)).save(tmp_path / name)
    np.testing.assert_array_equal(read(tmp_path / name, scene=0, plane=0)[0], pixels(0))
    for what in ("scene", "plane"):
        with pytest.raises(SlideError, match=f"one {what} only, found --{what} 1"):
            open_slide(tmp_path / name, **{what: 1})
