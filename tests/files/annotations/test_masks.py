"""Annotations that are mask images."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from annotated import ONE, TWO, only, png, read
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage

from medray.annotations.rasterize import rasterise
from medray.annotations.reading import read_annotation
from medray.classes import Classes
from medray.errors import SlideError


@pytest.mark.parametrize("folder", ["bcss", "ocdc", "glomeruli_pas"])
def test_real_outlines_and_masks_give_the_same_labels(
    shared_data: Path, folder: str
) -> None:
    def edge(label: np.ndarray) -> np.ndarray:
        return ndimage.binary_dilation(label) ^ ndimage.binary_erosion(label)

    ious = []
    for path in sorted((shared_data / "he_seg" / folder / "svg").glob("*.svg")):
        mask_path = path.parents[1] / "masks" / f"{path.stem}.png"
        with Image.open(mask_path) as mask:
            truth = np.asarray(mask.convert("L")) > 0
        height, width = truth.shape
        size = {"height": height, "width": width}
        drawn = read_annotation(str(path), **size, classes=ONE)
        labels = rasterise(drawn, ONE, y=0, x=0, **size) > 0
        # The outlines run through pixel centres, so along edges, the slide's own
        # included, they lie half a pixel and some smoothing inside the mask; small
        # glomeruli (2 % of the field) suffer most from that.
        ious.append((labels & truth).sum() / (labels | truth).sum())
        near = ndimage.distance_transform_edt(~np.pad(edge(truth) | edge(labels), 1,
                                                      constant_values=True))  # fmt: skip
        assert near[1:-1, 1:-1][labels != truth].max(initial=0) <= 3, path.name
        masks = read_annotation(str(mask_path), **size, classes=ONE)
        np.testing.assert_array_equal(
            rasterise(masks, ONE, y=0, x=0, **size) > 0, truth
        )
    assert np.mean(ious) >= 0.97
    assert min(ious) >= 0.96


@settings(max_examples=40, deadline=None)
@given(
    hnp.arrays(np.uint8, (23, 31), elements=st.integers(0, 2)),
    st.sampled_from(["png", "tif"]),
)
def test_masks_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, mask: np.ndarray, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("m") / f"a.{suffix}"
    Image.fromarray(mask).save(path)
    areas = read_annotation(str(path), height=23, width=31, classes=TWO)
    labels = rasterise(areas, TWO, y=0, x=0, height=23, width=31)
    np.testing.assert_array_equal(labels, mask)


def test_instance_masks_and_smaller_masks(tmp_path: Path) -> None:
    instances = np.zeros((50, 50), np.uint16)
    instances[10:20, 10:20], instances[30:40, 30:40] = 300, 4
    path = str(tmp_path / "a.png")
    Image.fromarray(instances).save(path)
    areas = read_annotation(path, height=100, width=100, classes=ONE)
    labels = rasterise(areas, ONE, y=0, x=0, height=100, width=100)
    np.testing.assert_array_equal(labels, (instances > 0).repeat(2, 0).repeat(2, 1))
    with pytest.raises(SlideError, match=r"a\.png.*\[4, 300\]"):
        read_annotation(path, height=50, width=50, classes=TWO)
    with pytest.raises(SlideError, match="50 x 50.*70 x 90"):
        read_annotation(path, height=90, width=70, classes=ONE)


@pytest.mark.parametrize("kind", ["P", "RGB", "I;16", "L;2", "L;4", "deep tif"])
def test_masks_of_any_depth(tmp_path: Path, kind: str) -> None:
    mask = np.random.default_rng(0).integers(0, 3, (13, 17), np.uint8)
    path = tmp_path / "a.png"
    if kind == "deep tif":
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, mask.astype(np.uint16), compression="zlib", bigtiff=True)
    elif kind == "P":
        picture = Image.fromarray(mask).convert("P")
        picture.putpalette([0, 0, 0, 200, 10, 10, 10, 200, 10])
        picture.save(path)
    elif kind == "RGB":
        Image.fromarray(np.stack([mask] * 3, axis=2)).save(path)
    elif kind == "I;16":
        Image.fromarray(mask.astype(np.uint16)).save(path)
    else:
        depth = int(kind[-1])
        bits = [format(v, f"0{depth}b") for v in mask.ravel()]
        rows = ["".join(bits[i : i + 17]).ljust(17 * depth + 8, "0")
                for i in range(0, mask.size, 17)]  # fmt: skip
        used = (17 * depth + 7) // 8
        raw = b"".join(
            b"\0" + bytes(int(row[k * 8 : k * 8 + 8], 2) for k in range(used))
            for row in rows
        )
        path.write_bytes(png(13, 17, depth, raw))
    areas = read_annotation(str(path), height=13, width=17, classes=TWO)
    assert all(area.polygon.is_valid for area in areas)
    labels = rasterise(areas, TWO, y=0, x=0, height=13, width=17)
    np.testing.assert_array_equal(labels, mask)


@pytest.mark.parametrize("foreground", [1, 255])
@pytest.mark.parametrize("kind", ["1 png", "L png", "1 tif", "miniswhite"])
def test_masks_of_one_class(tmp_path: Path, foreground: int, kind: str) -> None:
    mask = np.random.default_rng(1).integers(0, 2, (13, 24)).astype(bool)
    path = tmp_path / f"a.{'png' if 'png' in kind else 'tif'}"
    if kind == "L png":
        Image.fromarray(mask.astype(np.uint8) * np.uint8(foreground)).save(path)
    elif kind == "1 png":
        Image.fromarray(mask).save(path)
    elif kind == "1 tif":
        tifffile.imwrite(path, mask, photometric="minisblack")
    else:
        tifffile.imwrite(path, ~mask, photometric="miniswhite")
    areas = read_annotation(str(path), height=13, width=24, classes=ONE)
    labels = rasterise(areas, ONE, y=0, x=0, height=13, width=24)
    np.testing.assert_array_equal(labels, mask)


def test_mask_sizes(tmp_path: Path) -> None:
    """Level 2 of a slide may be rounded up or down; level 0 may not."""
    path = str(tmp_path / "a.png")
    Image.fromarray(np.ones((25, 26), np.uint8)).save(path)
    read_annotation(path, height=101, width=101, classes=ONE)
    for height, width in ((25, 27), (26, 26), (24, 26), (101, 130), (12, 13)):
        with pytest.raises(SlideError, match=rf"26 x 25.*{width} x {height}"):
            read_annotation(path, height=height, width=width, classes=ONE)
    (tmp_path / "b.png").write_bytes(png(2**16, 2**16, 8, b""))
    with pytest.raises(SlideError, match=r"b\.png.*65536 x 65536"):
        read(str(tmp_path / "b.png"))
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (9, 9, 3), np.uint8)).save(
        tmp_path / "c.png"
    )
    with pytest.raises(SlideError, match=r"c\.png.*colour"):
        read(str(tmp_path / "c.png"), ONE, 9)


def test_masks_as_large_as_slides_are_read(tmp_path: Path) -> None:
    side = 14_000  # twice what Pillow lets pass
    picture = Image.new("1", (side, side))
    picture.paste(1, (100, 200, 13_000, 300))
    picture.save(tmp_path / "a.png")
    areas = read(str(tmp_path / "a.png"), ONE, side)
    assert only(areas).bounds == (100, 200, 13_000, 300)


def test_a_bomb_for_a_mask_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by fuzzing: a small file that declares gigabytes."""
    path = tmp_path / "bomb.png"
    Image.new("1", (30_000, 30_000)).save(path)
    assert path.stat().st_size < 300_000

    def decode(*_: object) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(Image.Image, "load", decode)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(SlideError, match="the mask is 30000 x 30000, the slide 300 x"):
        read_annotation(str(path), height=260, width=300, classes=Classes())


@pytest.mark.parametrize("kind", ["LA png", "RGBA png", "RGBA tif", "LA tif"])
def test_masks_with_an_alpha_channel(tmp_path: Path, kind: str) -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 10:20] = 255
    channels = 1 if "LA" in kind else 3
    path = tmp_path / f"a.{kind[-3:]}"

    def write(values: np.ndarray, alpha: np.ndarray) -> None:
        pixels = np.dstack([values] * channels + [alpha])
        if kind.endswith("png"):
            Image.fromarray(pixels).save(path)
        else:
            grey = "minisblack" if channels == 1 else "rgb"
            tifffile.imwrite(
                path,
                pixels,
                photometric=grey,
                planarconfig="contig",
                extrasamples=["unassalpha"],
            )

    opaque = np.full_like(mask, 255)
    for alpha in (opaque, mask, mask // 2):
        write(mask, alpha)
        areas = read_annotation(str(path), height=20, width=30, classes=ONE)
        labels = rasterise(areas, ONE, y=0, x=0, height=20, width=30)
        np.testing.assert_array_equal(labels, mask > 0)
    black = np.zeros_like(mask)
    for values, alpha in ((black, mask), (opaque, mask), (mask, 255 - mask)):
        write(values, alpha)
        with pytest.raises(SlideError, match=r"a\.\w+: .*alpha channel"):
            read_annotation(str(path), height=20, width=30, classes=ONE)


@pytest.mark.parametrize("mode", ["P", "L"])
def test_masks_with_transparent_values(tmp_path: Path, mode: str) -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 10:20] = 2
    picture = Image.fromarray(mask)
    if mode == "P":
        picture = picture.convert("P")
        picture.putpalette([0, 0, 0, 9, 9, 9, 99, 0, 0])
    path = str(tmp_path / "a.png")
    picture.save(path, transparency=0)
    areas = read_annotation(path, height=20, width=30, classes=TWO)
    assert only(areas).area == 100
    picture.save(path, transparency=2)
    with pytest.raises(SlideError, match=r"a\.png: .*values \[2\] are transparent"):
        read_annotation(path, height=20, width=30, classes=TWO)


def test_a_stack_of_masks_is_refused_and_a_pyramid_is_not(tmp_path: Path) -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 10:20] = 1
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, np.stack([mask, mask]), photometric="minisblack")
    with pytest.raises(SlideError, match=r"a\.tif: .*found 2 images of one size"):
        read_annotation(str(path), height=40, width=60, classes=ONE)
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(mask, photometric="minisblack")
        tiff.write(mask[::2, ::2], photometric="minisblack", subfiletype=1)
    areas = read_annotation(str(path), height=40, width=60, classes=ONE)
    assert only(areas).area == 100
