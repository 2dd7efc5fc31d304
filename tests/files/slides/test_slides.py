import io
import os
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from medray.errors import SlideError
from medray.slides.fingerprint import slide_digest, slide_fingerprint
from medray.slides.image import ArraySlide
from medray.slides.opening import open_slide
from medray.slides.readable import read_readable
from medray.slides.resolution import Working, choose_level, read_working
from medray.slides.thumbnail import read_thumbnail
from medray.storage import files, ome_zarr

REAL = (
    "CMU-1-Small-Region.svs",
    "TCGA-CR-7395-01A-01-TS1.svs",
    "CMU-1-Small-Region.derived-pyramid.tiff",
    "hamamatsu-test3-DAPI-387.ndpi",
)


@pytest.mark.parametrize("name", REAL)
def test_every_level_of_real_slides_equals_openslide(
    shared_data: Path, name: str
) -> None:
    uri = shared_data / "wsi" / name
    rng = np.random.default_rng(0)
    with open_slide(uri, reader="tifffile") as ours:
        with open_slide(uri, reader="openslide") as theirs:
            sizes = [(level.height, level.width) for level in ours.levels]
            other = [(level.height, level.width) for level in theirs.levels]
            # OpenSlide makes coarser levels of NDPI itself.
            assert sizes == other[: len(sizes)]
            assert ours.mpp == pytest.approx(theirs.mpp) if theirs.mpp else True
            assert ours.magnification == theirs.magnification
            for level, (height, width) in enumerate(sizes):
                whole = ours.read(0, 0, height, width, level)
                np.testing.assert_array_equal(
                    whole, theirs.read(0, 0, height, width, level)
                )
                for _ in range(5):
                    y, x = rng.integers(height), rng.integers(width)
                    h, w = (
                        rng.integers(1, height - y + 1),
                        rng.integers(1, width - x + 1),
                    )
                    part = ours.read(int(y), int(x), int(h), int(w), level)
                    np.testing.assert_array_equal(part, whole[y : y + h, x : x + w])


@pytest.mark.parametrize(
    ("name", "mpp", "magnification", "levels"),
    [
        (REAL[0], 0.499, 20.0, 1),
        (REAL[1], None, None, 2),
        (REAL[2], 0.499, None, 4),
        (REAL[3], 0.2282, 40.0, 4),
    ],
)
def test_facts_of_real_slides(
    shared_data: Path,
    name: str,
    mpp: float | None,
    magnification: float | None,
    levels: int,
) -> None:
    with open_slide(shared_data / "wsi" / name) as slide:
        assert slide.mpp == (pytest.approx(mpp, abs=1e-4) if mpp else None)
        assert slide.magnification == magnification
        assert len(slide.levels) == levels


@st.composite
def tiffs(draw: st.DrawFn) -> tuple[bytes, np.ndarray]:
    """A TIFF of any layout, and what it must read as."""
    height, width = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    seed = draw(st.integers(0, 99))
    kind = draw(st.sampled_from(["rgb", "rgba", "grey", "white", "palette", "grey16"]))
    rng = np.random.default_rng(seed)
    options: dict[str, object] = {
        "compression": draw(st.sampled_from([None, "lzw", "deflate", "zstd"])),
        "photometric": "minisblack",
        "metadata": None,
    }
    if options["compression"] and kind != "palette":
        options["predictor"] = draw(st.booleans())
    if draw(st.booleans()):
        options["tile"] = draw(st.sampled_from([(16, 16), (32, 64), (128, 128)]))
    else:
        options["rowsperstrip"] = draw(st.integers(1, 40))
    if kind in ("rgb", "rgba"):
        samples = 3 if kind == "rgb" else 4
        dtype = draw(st.sampled_from([np.uint8, np.uint16]))
        top = 255 if dtype == np.uint8 else 65535
        data = rng.integers(0, top + 1, (height, width, samples)).astype(dtype)
        eight = data if dtype == np.uint8 else (data >> 8).astype(np.uint8)
        options["photometric"] = "rgb"
        expected = eight[..., :3]
        if kind == "rgba":
            options["extrasamples"] = ["unassalpha"]
            alpha = eight[..., 3:] / 255
            expected = np.floor(expected * alpha + 255 * (1 - alpha) + 0.5)
        if draw(st.booleans()):
            data = np.ascontiguousarray(data.transpose(2, 0, 1))
            options["planarconfig"] = "separate"
    elif kind == "grey16":
        data = rng.integers(0, 65536, (height, width)).astype(np.uint16)
        expected = np.repeat((data >> 8).astype(np.uint8)[..., None], 3, 2)
    elif kind == "palette":
        data = rng.integers(0, 256, (height, width)).astype(np.uint8)
        colormap = rng.integers(0, 65536, (3, 256)).astype(np.uint16)
        options |= {"photometric": "palette", "colormap": colormap}
        expected = np.moveaxis((colormap >> 8)[:, data], 0, 2)
    else:
        data = rng.integers(0, 256, (height, width)).astype(np.uint8)
        options["photometric"] = "miniswhite" if kind == "white" else "minisblack"
        expected = np.repeat((255 - data if kind == "white" else data)[..., None], 3, 2)
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, data, **options)
    return buffer.getvalue(), expected.astype(np.uint8)


@settings(max_examples=120, deadline=None)
@given(tiffs(), st.data())
def test_any_rectangle_of_any_tiff(
    tiff: tuple[bytes, np.ndarray], data: st.DataObject
) -> None:
    content, expected = tiff
    files.write_bytes("memory://slides/x.tif", content)
    height, width = expected.shape[:2]
    y, x = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    h, w = data.draw(st.integers(1, height - y)), data.draw(st.integers(1, width - x))
    with open_slide("memory://slides/x.tif") as slide:
        assert slide.levels[0].height == height
        part = slide.read(y, x, h, w)
    np.testing.assert_array_equal(part, expected[y : y + h, x : x + w])


def pyramid(path: Path, *, pages: bool, ome: bool = False, **options: object) -> list:
    """Write a three-level pyramid as SubIFDs or as separate pages."""
    rng = np.random.default_rng(1)
    full = rng.integers(0, 256, (640, 512, 3), dtype=np.uint8)
    levels = [full, full[::2, ::2], full[::4, ::4]]
    common = {"tile": (64, 64), "photometric": "rgb", "metadata": None} | options
    with tifffile.TiffWriter(path, ome=ome) as tiff:
        first = dict(common)
        if ome:
            first["metadata"] = {"axes": "YXS", "PhysicalSizeX": 250.0}
            first["metadata"] |= {"PhysicalSizeXUnit": "nm"}
        tiff.write(full, subifds=0 if pages else 2, **first)
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, **common)
    return levels


@pytest.mark.parametrize("pages", [True, False])
def test_pyramids_as_subifds_and_as_pages(tmp_path: Path, pages: bool) -> None:
    levels = pyramid(tmp_path / "p.tif", pages=pages)
    with open_slide(tmp_path / "p.tif") as slide:
        assert [level.downsample for level in slide.levels] == [1, 2, 4]
        for index, pixels in enumerate(levels):
            np.testing.assert_array_equal(
                slide.read(5, 7, 90, 80, index), pixels[5:95, 7:87]
            )


def test_ome_tiff_says_its_resolution(tmp_path: Path) -> None:
    pyramid(tmp_path / "p.ome.tif", pages=False, ome=True)
    with open_slide(tmp_path / "p.ome.tif") as slide:
        assert (slide.format, slide.mpp) == ("ome-tiff", pytest.approx(0.25))
        assert len(slide.levels) == 3


def test_only_the_touched_tiles_are_read(tmp_path: Path) -> None:
    pyramid(tmp_path / "p.tif", pages=False)
    with open_slide(tmp_path / "p.tif") as slide:
        read: list[int] = []
        file = slide._file  # type: ignore[attr-defined]

        class Counting:
            def seek(self, *args: int) -> int:
                return file.seek(*args)

            def read(self, count: int) -> bytes:
                read.append(count)
                return file.read(count)

        slide._file = Counting()  # type: ignore[attr-defined]
        slide.read(70, 70, 50, 120)
        slide._file = file  # type: ignore[attr-defined]
    tile = 64 * 64 * 3
    assert read == [tile, tile]  # 50 x 120 pixels inside one row of two tiles


def test_our_own_ome_zarr_is_a_slide(tmp_path: Path) -> None:
    uri = str(tmp_path / "x.ome.zarr")
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (700, 600, 3), dtype=np.uint8)
    from medray.geometry import Rectangle

    ome_zarr.create_image(uri, 700, 600, mpp=0.25, name="x", attributes={})
    ome_zarr.write_region(uri, Rectangle(0, 0, 700, 600), np.moveaxis(pixels, 2, 0))
    ome_zarr.build_pyramid(uri)
    with open_slide(uri) as slide:
        assert slide.mpp == 0.25
        assert len(slide.levels) == 2
        np.testing.assert_array_equal(slide.read(3, 5, 650, 30), pixels[3:653, 5:35])


def test_plain_fields(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).convert("L").save(tmp_path / "b.bmp")
    with open_slide(tmp_path / "a.png") as slide:
        np.testing.assert_array_equal(slide.read(1, 2, 30, 20), pixels[1:31, 2:22])
    with open_slide(tmp_path / "b.bmp") as slide:
        assert slide.read(0, 0, 40, 30).shape == (40, 30, 3)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.tif", b"", "expected a TIFF"),
        ("text.tif", b"Dear colleague, the slide follows.", "expected a TIFF"),
        ("empty.png", b"", "expected a PNG"),
        ("text.svs", b"\x00" * 64, "expected a TIFF"),
        ("cut.tif", b"II*\x00\x08\x00\x00\x00\xff\xff", "expected a TIFF"),
    ],
)
def test_what_is_no_slide_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideError, match=message) as error:
        open_slide(tmp_path / name)
    assert name in str(error.value)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="nowhere.tif"):
        open_slide(tmp_path / "nowhere.tif")


def test_a_cut_off_slide_fails_where_it_is_cut(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", metadata=None)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.truncate(size - 3 * 128 * 128 - 5)
    with open_slide(path, reader="tifffile") as slide:
        np.testing.assert_array_equal(slide.read(0, 0, 128, 128), pixels[:128, :128])
        with pytest.raises(SlideError, match=r"x\.tif.*cut off"):
            slide.read(256, 256, 256, 256)
        # The rest is still there, whatever rectangle asks for it.
        whole, damaged, why = read_readable(slide, 0, 0, 512, 512)
        assert damaged == [(256, 256, 256, 256)]
        assert "cut off" in why
        np.testing.assert_array_equal(whole[:256], pixels[:256])
        np.testing.assert_array_equal(whole[256:, :256], pixels[256:, :256])
        assert (whole[256:, 256:] == 255).all()
        part, damaged, _ = read_readable(slide, 200, 200, 300, 90)
        np.testing.assert_array_equal(part, whole[200:500, 200:290])
        assert damaged == [(56, 56, 244, 34)]


def test_declared_sizes_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "huge.tif"
    tifffile.imwrite(path, np.zeros((16, 16, 3), np.uint8), photometric="rgb")
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["ImageWidth"].overwrite(2**31 - 1)
        tiff.pages[0].tags["ImageLength"].overwrite(2**31 - 1)
    with pytest.raises(SlideError, match="huge.tif"):
        open_slide(path)


def test_a_rectangle_outside_is_refused() -> None:
    slide = ArraySlide(np.zeros((10, 10, 3), np.uint8))
    with pytest.raises(ValueError, match="inside"):
        slide.read(5, 5, 6, 1)
    with pytest.raises(ValueError, match="levels"):
        slide.read(0, 0, 1, 1, level=1)


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(0, 255))
@example(height=1, width=9, side=3, seed=1)  # Pillow's reduce is off by 0.667 here
def test_thumbnail_pixels_are_block_means(
    height: int, width: int, side: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    thumbnail, downsample, damaged = read_thumbnail(ArraySlide(pixels), side)
    assert not damaged.any()
    factor = int(downsample)
    shape = (-(-height // factor), -(-width // factor))
    assert thumbnail.shape == (*shape, 3)
    assert max(shape) <= side
    means = [
        pixels[y : y + factor, x : x + factor].mean(axis=(0, 1))
        for y in range(0, height, factor)
        for x in range(0, width, factor)
    ]
    # Rounded once, from the exact sum: half a grey level, and 1e-9 for NumPy's mean.
    assert np.abs(thumbnail.reshape(-1, 3) - means).max() <= 0.5 + 1e-9


def test_thumbnails_of_large_blocks_are_not_darker() -> None:
    """Of 244 x 244 pixels, where Pillow's fixed point makes 254 of white."""
    white = ArraySlide(np.full((244, 488, 3), 255, np.uint8))
    assert (read_thumbnail(white, 2)[0] == 255).all()


def test_digest_follows_the_content(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    path.write_bytes(b"a" * 1000)
    first, fingerprint = slide_digest(str(path)), slide_fingerprint(str(path))
    assert slide_digest(str(path)) == first
    path.write_bytes(b"a" * 999 + b"b")
    # As if a second later: file systems may tell times in steps of milliseconds.
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 1))
    assert slide_digest(str(path)) != first
    assert slide_fingerprint(str(path)) != fingerprint
    with open(tmp_path / "large.tif", "wb") as file:
        file.truncate(200 << 20)
    large = slide_digest(str(tmp_path / "large.tif"))
    with open(tmp_path / "large.tif", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert slide_digest(str(tmp_path / "large.tif")) != large


def test_the_level_is_chosen_by_resolution(tmp_path: Path) -> None:
    pyramid(tmp_path / "p.ome.tif", pages=False, ome=True)  # 0.25, 0.5, 1.0
    with open_slide(tmp_path / "p.ome.tif") as slide:
        level0 = slide.levels[0]
        chosen = choose_level(slide, 0.5, None)
        assert (chosen.level, chosen.scale, chosen.note) == (1, 1.0, "")
        assert choose_level(slide, None, None).level == 0
        # No level fits: the next finer one is averaged down.
        between = choose_level(slide, 0.7, None)
        assert (between.level, between.scale) == (1, pytest.approx(1.4))
        assert between.downsample == pytest.approx(2.8)
        assert between.height == round(slide.levels[1].height / 1.4)
        assert between.mpp == pytest.approx(0.7)
        assert "averaged down" in between.note
        finer = choose_level(slide, 0.15, None)
        assert (finer.level, finer.scale) == (0, pytest.approx(0.6))
        assert finer.height == round(level0.height / 0.6)
        with pytest.raises(SlideError, match=r"0\.1.*0\.25, 0\.5, 1.*too coarse"):
            choose_level(slide, 0.1, None)
    unknown = ArraySlide(np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(SlideError, match=r"does not say.*works at 0\.5; give --mpp"):
        choose_level(unknown, 0.5, None)
    assert choose_level(unknown, None, None).mpp is None
    given = choose_level(unknown, 0.5, 0.25)
    assert (given.level, given.scale, given.mpp) == (0, 2.0, 0.5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(8, 120),
    st.integers(8, 120),
    st.floats(0.5, 4.0),
    st.integers(0, 9),
    st.data(),
)
def test_resampled_pixels_do_not_depend_on_the_rectangle(
    height: int, width: int, scale: float, seed: int, data: st.DataObject
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    slide = ArraySlide(pixels)
    size = (max(1, round(height / scale)), max(1, round(width / scale)))
    working = Working(0, scale, *size, scale, None)
    whole, _, _ = read_working(slide, working, 0, 0, *size)
    assert whole.shape == (*size, 3)
    y = data.draw(st.integers(0, size[0] - 1))
    x = data.draw(st.integers(0, size[1] - 1))
    h = data.draw(st.integers(1, size[0] - y))
    w = data.draw(st.integers(1, size[1] - x))
    part, _, _ = read_working(slide, working, y, x, h, w)
    np.testing.assert_array_equal(part, whole[y : y + h, x : x + w])


def test_averaging_by_a_whole_factor_is_the_mean_of_blocks() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    working = Working(0, 3.0, 20, 30, 3.0, None)
    reduced, _, _ = read_working(ArraySlide(pixels), working, 0, 0, 20, 30)
    mean = pixels.reshape(20, 3, 30, 3, 3).mean(axis=(1, 3))
    assert np.abs(reduced - mean).max() <= 0.5 + 1e-3
    flat = np.full((50, 50, 3), 77, np.uint8)
    enlarged, _, _ = read_working(
        ArraySlide(flat), Working(0, 0.7, 71, 71, 0.7, None), 0, 0, 71, 71
    )
    assert (enlarged == 77).all()


@pytest.mark.parametrize(
    ("reader", "lost"), [("tifffile", 1.0), ("openslide", 1.0), ("tifffile", 0.5)]
)
def test_a_damaged_tile_costs_only_itself(
    tmp_path: Path, reader: str, lost: float
) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (128, 192, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    path = tmp_path / "slide.tif"
    tifffile.imwrite(
        path,
        pixels,
        tile=(256, 256),
        photometric="rgb",
        compression="jpeg",
        metadata=None,
    )
    with open_slide(path) as slide:
        whole = slide.read(0, 0, 1024, 1536)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        place, size = page.dataoffsets[8], page.databytecounts[8]
    with path.open("r+b") as file:
        file.seek(place + size - int(size * lost))
        file.write(bytes(int(size * lost)))
    with open_slide(path, reader=reader) as slide:
        with pytest.raises(SlideError, match="slide.tif"):
            slide.read(0, 0, 1024, 1536)
        found, damaged, why = read_readable(slide, 0, 0, 1024, 1536)
    assert damaged == [(256, 512, 256, 256)]
    assert "JPEG" in why
    whole[256:512, 512:768] = 255
    np.testing.assert_array_equal(found, whole)
