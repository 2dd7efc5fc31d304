"""Every TIFF is read as it was written, or refused by an error that names why."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tifffile
from PIL import Image

from medray.errors import SlideError
from medray.slides.opening import open_slide
from medray.slides.readable import check_readable, read_readable
from medray.slides.resolution import choose_level, settle_mpp

openslide = pytest.importorskip("openslide")

UInt8 = npt.NDArray[np.uint8]
_LUMA = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
)


def picture(height: int = 96, width: int = 112, seed: int = 3) -> UInt8:
    """Smooth colours, which lossy codecs keep within a few grey levels."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    resized = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return np.array(resized)


def to_ycbcr(rgb: UInt8) -> UInt8:
    ycc = rgb.astype(float) @ _LUMA.T + [0, 128, 128]
    return np.clip(np.rint(ycc), 0, 255).astype(np.uint8)


def whole(path: Path, level: int = 0) -> UInt8:
    with open_slide(path, reader="auto") as slide:
        size = slide.levels[level]
        return slide.read(0, 0, size.height, size.width, level)


def by_openslide(path: Path) -> UInt8 | None:
    """What OpenSlide makes of level 0, on white; None if it opens nothing."""
    try:
        with openslide.OpenSlide(path) as slide:
            rgba = np.asarray(slide.read_region((0, 0), 0, slide.dimensions))
    except openslide.OpenSlideError:
        return None
    color, alpha = rgba[..., :3].astype(int), rgba[..., 3:].astype(int)
    return ((color * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def far(ours: UInt8, other: UInt8) -> int:
    assert ours.shape == other.shape
    return int(np.abs(ours.astype(int) - other).max())


# --- the sweep ------------------------------------------------------------------------

_LOSSLESS = (None, "packbits", "lzw", "deflate", "zstd", "lzma")
_CODECS = ("jpeg", "jpeg2000", "jpegxl", "webp", "png", "jpegxr")
_KINDS = ("rgb", "rgba", "grey", "white", "palette", "ycbcr")


def variants() -> list[tuple[Any, ...]]:
    """Return compression, kind, planar, bits, tiled, byte order, BigTIFF of each.

    Left out is what tifffile itself writes wrong: 12 bits in big-endian order, and JPEG
    of 16 bits, which it cuts to 12.
    """
    layouts = itertools.product((True, False), ("<", ">"), (False, True))
    return [
        (compression, kind, planar, bits, *layout)
        for layout in layouts
        for compression in (*_LOSSLESS, *_CODECS)
        for kind in _KINDS
        for planar in (False, True)
        for bits in (1, 2, 4, 8, 12, 16)
        if not (planar and kind in ("grey", "white", "palette"))
        if not (bits not in (8, 16) and compression)
        if not (bits not in (8, 16) and kind not in ("grey", "white"))
        if not (bits == 16 and kind in ("palette", "ycbcr"))
        if not (bits == 12 and layout[1] == ">")
        if not (bits == 16 and compression == "jpeg")
        if not (layout[2] and compression not in (None, "lzw", "jpeg"))
    ]


def stored(
    kind: str, planar: bool, bits: int, size: tuple[int, int]
) -> tuple[npt.NDArray[Any], UInt8, dict]:
    """Return the samples to write, what they must read as, and how to write them."""
    rgb = picture(*size)
    options: dict[str, Any] = {"photometric": "minisblack", "metadata": None}
    samples: npt.NDArray[Any] = rgb
    if kind in ("rgb", "rgba", "ycbcr"):
        options["photometric"] = "ycbcr" if kind == "ycbcr" else "rgb"
        expected = rgb
        if kind == "ycbcr":
            samples = to_ycbcr(rgb)
        if kind == "rgba":
            alpha = picture(*size, seed=9)[..., :1]
            samples = np.concatenate([rgb, alpha], axis=2)
            options["extrasamples"] = ["unassalpha"]
            blended = rgb * (alpha / 255.0) + 255 - alpha
            expected = np.floor(blended + 0.5).astype(np.uint8)
        if planar:
            samples = np.ascontiguousarray(np.moveaxis(samples, 2, 0))
        options["planarconfig"] = "separate" if planar else "contig"
    elif kind == "palette":
        samples = rgb[..., 0]
        colormap = np.random.default_rng(0).integers(0, 65536, (3, 256), np.uint16)
        options |= {"photometric": "palette", "colormap": colormap}
        expected = np.moveaxis((colormap >> 8)[:, samples], 0, 2).astype(np.uint8)
    else:
        top = (1 << bits) - 1
        samples = np.rint(rgb[..., 1] / 255.0 * top).astype(np.uint16)
        samples = samples if bits > 8 else samples.astype(np.uint8)
        eight = np.rint(samples * (255.0 / top)).astype(np.uint8)
        if kind == "white":
            options["photometric"] = "miniswhite"
            eight = 255 - eight
        options["bitspersample"] = bits
        return samples, np.repeat(eight[..., None], 3, 2), options
    if bits == 16:
        samples = samples.astype(np.uint16) * 257
    return samples, expected, options


def test_every_variant_is_right_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    right = unwritable = compared = 0
    refusals: list[tuple[str, Any, str]] = []
    for variant in variants():
        compression, kind, planar, bits, tiled, order, big = variant
        # libtiff reads 16 bits wrong in tiles that the image cuts: it is not asked there.
        size = (64, 128) if order == "<" else (40, 56)
        samples, expected, options = stored(kind, planar, bits, size)
        options |= {"tile": (64, 64)} if tiled else {"rowsperstrip": 16}
        if compression == "jpeg":
            options["compressionargs"] = {"level": 98}
        if kind == "ycbcr":
            options["subsampling"] = (1, 1)
        try:
            with tifffile.TiffWriter(path, byteorder=order, bigtiff=big) as tiff:
                tiff.write(samples, compression=compression, **options)
        except Exception:  # what tifffile and the codecs cannot write
            assert compression in _CODECS or bits not in (8, 16), variant
            unwritable += 1
            continue
        try:
            found = whole(path)
        except SlideError as error:
            refusals.append((f"{error}", compression, kind))
            continue
        # Lossy codecs also average colours over 2 x 2 pixels: their mean counts.
        exact = compression in (*_LOSSLESS, "png")
        limit = 1 + 2 * (kind == "ycbcr") if exact else 80
        assert far(found, expected) <= limit, variant
        assert np.abs(found.astype(int) - expected).mean() < 4, variant
        right += 1
        other = by_openslide(path) if tiled and order == "<" else None
        if other is not None:
            assert far(found, other) <= 2, variant
            compared += 1
    assert right > 600
    assert len(refusals) > 30
    for error, compression, kind in refusals:
        assert "x.tif: holds" in error
        assert compression in _CODECS
        assert kind in ("ycbcr", "palette")
    assert unwritable < right / 4
    assert compared > 80


# --- what samples mean ----------------------------------------------------------------


def tag(path: Path, name: str, value: object, page: int = 0) -> None:
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[page].tags[name].overwrite(value)


@pytest.mark.parametrize(("said", "ycbcr"), [(33003, True), (33005, False)])
@pytest.mark.parametrize("photometric", ["rgb", "ycbcr"])
def test_aperio_jpeg2000_is_ycbcr_or_rgb_by_its_number(
    tmp_path: Path, said: int, ycbcr: bool, photometric: str
) -> None:
    path, rgb = tmp_path / "x.svs", picture(128, 128)
    tifffile.imwrite(
        path,
        to_ycbcr(rgb) if ycbcr else rgb,
        photometric=photometric,
        subsampling=(1, 1) if photometric == "ycbcr" else None,
        planarconfig="contig",
        tile=(64, 64),
        compression=said,
        compressionargs={"level": 0, "reversible": True, "mct": False},
        description="Aperio Image Library v12.0.1\r\n128x128|AppMag = 20|MPP = 0,41",
        metadata=None,
    )
    assert far(whole(path), rgb) <= 3
    other = by_openslide(path)
    assert other is not None
    assert far(whole(path), other) <= 2
    with open_slide(path) as slide:
        assert slide.mpp == 0.41


@pytest.mark.parametrize(
    ("extra", "expected"),
    [(0, (90, 60, 30)), (1, (90 + 55, 60 + 55, 30 + 55)), (2, (126, 102, 79))],
)
def test_a_fourth_sample_counts_as_its_tag_says(
    tmp_path: Path, extra: int, expected: tuple[int, int, int]
) -> None:
    rgba = np.full((32, 48, 4), (90, 60, 30, 200), np.uint8)
    path = tmp_path / "x.tif"
    options = {"photometric": "rgb", "metadata": None}
    tifffile.imwrite(path, rgba, extrasamples=[extra], **options)
    assert far(whole(path), np.full((32, 48, 3), expected, np.uint8)) <= 1


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (np.zeros((32, 32), np.float32), {}, "float32"),
        (np.zeros((32, 32), np.int16), {}, "int16"),
        (np.zeros((32, 32), np.uint32), {}, "uint32"),
        (np.zeros((32, 32, 4), np.uint8), {"photometric": "separated"}, "photometric"),
        (
            np.zeros((32, 32, 3), np.uint8),
            {"photometric": "minisblack", "planarconfig": "contig"},
            "3 channels",
        ),
        (np.zeros((4, 32, 32), np.uint8), {"photometric": "minisblack"}, "channels"),
        (
            np.zeros((32, 32, 32), np.uint8),
            {"volumetric": True, "tile": (16, 16, 16)},
            "ImageDepth",
        ),
    ],
)
def test_what_is_no_picture_is_refused_by_name(
    tmp_path: Path, data: npt.NDArray[Any], options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, data, **({"photometric": "minisblack"} | options))
    with pytest.raises(SlideError, match=rf"x\.tif.*{message}"):
        open_slide(path)


def test_the_range_that_a_camera_declares_counts(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    grey = np.linspace(0, 1023, 32 * 32).reshape(32, 32).astype(np.uint16)
    for said, expected in ((1023, grey * (255 / 1023)), (65535, grey >> 8)):
        tags = [(281, 3, 1, said, True)]
        tifffile.imwrite(path, grey, extratags=tags, metadata=None)
        eight = np.rint(expected).astype(np.uint8)
        assert far(whole(path), np.repeat(eight[..., None], 3, 2)) <= 1


def test_alpha_of_grey_and_grey_of_one_bit(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    both = np.full((32, 32, 2), (40, 100), np.uint8)
    options: dict[str, Any] = {"metadata": None, "planarconfig": "contig"}
    options |= {"photometric": "minisblack", "extrasamples": ["unassalpha"]}
    tifffile.imwrite(path, both, **options)
    on_white = round(40 * 100 / 255 + 155)
    assert far(whole(path), np.full((32, 32, 3), on_white, np.uint8)) <= 1
    bits = np.arange(32 * 32).reshape(32, 32) % 3 == 0
    Image.fromarray((bits * 255).astype(np.uint8)).convert("1").save(path)
    black_and_white = np.repeat((bits * 255).astype(np.uint8)[..., None], 3, 2)
    np.testing.assert_array_equal(whole(path), black_and_white)


def test_subsampled_ycbcr_without_jpeg_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    options = {"photometric": "ycbcr", "subsampling": (1, 1), "metadata": None}
    tifffile.imwrite(path, to_ycbcr(picture()), compression="lzw", **options)
    assert far(whole(path), picture()) <= 3
    tag(path, "YCbCrSubSampling", (2, 2))
    with pytest.raises(SlideError, match="subsampled"):
        open_slide(path, reader="tifffile")


@pytest.mark.parametrize("seed", range(4))
def test_damaged_headers_raise_nothing_else(tmp_path: Path, seed: int) -> None:
    path, rng = tmp_path / "x.scn", np.random.default_rng(seed)
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None}
    text = scn([("scan", 9, 4000, 4000, 0, 2)])
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(picture(64, 64), description=text, tile=(64, 64), **options)
        tiff.write(picture(32, 32), tile=(64, 64), **options)
    content = path.read_bytes()
    ends = {"read": 0, "refused": 0}
    for _ in range(60):
        changed = bytearray(content)
        for place in rng.integers(0, len(changed), 30):
            changed[place if place < 900 else place % 900] = rng.integers(256)
        path.write_bytes(changed)
        try:
            whole(path)
            ends["read"] += 1
        except SlideError:
            ends["refused"] += 1
    assert sum(ends.values()) == 60


def test_raw_samples_under_the_number_of_a_jpeg_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.svs"
    description = "Aperio Image Library|AppMag = 20|MPP = 0.5"
    options = {"photometric": "rgb", "metadata": None, "description": description}
    tifffile.imwrite(path, picture(64, 64), tile=(64, 64), **options)
    tag(path, "Compression", 33007)
    with pytest.raises(SlideError, match="33007"):
        open_slide(path)


def test_padded_jpegs_are_whole_and_cut_ones_are_not(tmp_path: Path) -> None:
    path, rgb = tmp_path / "x.tif", picture(64, 128)
    options = {"photometric": "rgb", "metadata": None, "compression": "jpeg"}
    tifffile.imwrite(path, rgb, tile=(64, 64), **options)
    plain = whole(path)
    for padding, readable in ((bytes(700), True), (b"\xff" * 300, True), (b"", False)):
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            places = zip(page.dataoffsets, page.databytecounts, strict=True)
            content = path.read_bytes()
            tiles = [content[start : start + size] for start, size in places]
        # Without padding: cut after its half, then filled up, as a broken copy is.
        changed = [
            t + padding if readable else t[: len(t) // 2] + bytes(400) for t in tiles
        ]
        other = tmp_path / "y.tif"
        with tifffile.TiffWriter(other) as writer:
            writer.write(
                iter(changed),
                shape=rgb.shape,
                dtype=rgb.dtype,
                tile=(64, 64),
                **options,
            )
        if readable:
            np.testing.assert_array_equal(whole(other), plain)
        else:
            with pytest.raises(SlideError, match="without an end"):
                whole(other)


@pytest.mark.parametrize("orientation", [1, 6])
def test_pictures_of_sixteen_bits_and_turned_ones(
    tmp_path: Path, orientation: int
) -> None:
    grey = (np.arange(40 * 60).reshape(40, 60) * 27).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "x.png")
    eight = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, 2)
    assert far(whole(tmp_path / "x.png"), eight) <= 1
    exif = Image.Exif()
    exif[274] = orientation
    rgb = picture(40, 60)
    Image.fromarray(rgb).save(tmp_path / "t.png", exif=exif)
    with open_slide(tmp_path / "t.png") as slide:
        shown = np.rot90(rgb, -1) if orientation == 6 else rgb
        assert far(slide.read(0, 0, *shown.shape[:2]), shown) == 0
        assert ("Orientation 6" in slide.note) == (orientation == 6)
    Image.new("CMYK", (9, 9)).save(tmp_path / "c.jpg")
    with pytest.raises(SlideError, match=r"c\.jpg.*CMYK"):
        open_slide(tmp_path / "c.jpg")


# --- which image is the slide ---------------------------------------------------------


def test_colours_in_planes_of_their_own(tmp_path: Path) -> None:
    path, rgb = tmp_path / "x.ome.tif", picture(96, 64)
    planes = np.ascontiguousarray(np.moveaxis(rgb[..., ::-1], 2, 0))
    options: dict[str, Any] = {"photometric": "minisblack", "tile": (32, 32)}
    for names, message in (
        (["Blue", "Green", "Red"], ""),
        (["DAPI", "CD20", "Ki67"], "channels"),
    ):
        metadata = {"axes": "CYX", "Channel": {"Name": names}}
        tifffile.imwrite(path, planes, metadata=metadata, **options)
        if message:
            with pytest.raises(SlideError, match=message):
                open_slide(path)
        else:
            np.testing.assert_array_equal(whole(path), rgb)


def test_a_label_before_the_scan_of_an_ome_tiff_is_not_the_slide(
    tmp_path: Path,
) -> None:
    path, rgb = tmp_path / "x.ome.tif", picture(96, 64)
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for name, pixels, mpp in (
            ("label image", picture(200, 200), None),
            ("overview of the glass", picture(150, 90), 9.0),
            ("Series 3", rgb, 0.4),
        ):
            metadata: dict[str, Any] = {"axes": "YXS", "Name": name}
            if mpp:
                metadata |= {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
            tiff.write(pixels, photometric="rgb", metadata=metadata)
    np.testing.assert_array_equal(whole(path), rgb)
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.4)


def write_ndpi(path: Path, pages: list[tuple[UInt8, float, int]]) -> None:
    """Write pages of (pixels, magnification, focus in nm); NDPI has 64-bit offsets."""
    content = bytearray(b"II*\0" + bytes(8))
    link = 4
    for rgb, lens, focus in pages:
        place = len(content)
        content += rgb.tobytes() + b"Hamamatsu\0" + struct.pack("<3H", 8, 8, 8)
        end = place + rgb.nbytes
        entries = [
            (256, 4, 1, struct.pack("<I", rgb.shape[1])),
            (257, 4, 1, struct.pack("<I", rgb.shape[0])),
            (258, 3, 3, struct.pack("<I", end + 10)),
            (259, 4, 1, struct.pack("<I", 1)),
            (262, 4, 1, struct.pack("<I", 2)),
            (271, 2, 10, struct.pack("<I", end)),
            (273, 4, 1, struct.pack("<I", place)),
            (277, 4, 1, struct.pack("<I", 3)),
            (278, 4, 1, struct.pack("<I", rgb.shape[0])),
            (279, 4, 1, struct.pack("<I", rgb.nbytes)),
            (65420, 4, 1, struct.pack("<I", 1)),
            (65421, 11, 1, struct.pack("<f", lens)),
            (65424, 9, 1, struct.pack("<i", focus)),
        ]
        struct.pack_into("<Q", content, link, len(content))
        content += struct.pack("<H", len(entries))
        content += b"".join(struct.pack("<HHI", *e[:3]) + e[3] for e in entries)
        link = len(content)
        content += bytes(8 + 4 * len(entries))  # next page; upper halves of values
    path.write_bytes(content)


@pytest.mark.parametrize("first", [-3000, 0, 5000])
def test_the_focused_plane_of_an_ndpi(tmp_path: Path, first: int) -> None:
    path = tmp_path / "x.ndpi"
    offsets = sorted((-3000, 0, 5000), key=lambda offset: offset != first)
    planes = {offset: picture(64, 96, seed=abs(offset)) for offset in offsets}
    pages = [
        (planes[offset][::size, ::size].copy(), 20.0 / size, offset)
        for size in (1, 2)
        for offset in offsets
    ]
    write_ndpi(path, [*pages, (picture(80, 200), -1.0, 0), (picture(60, 90), -2.0, 0)])
    with open_slide(path) as slide:
        assert (slide.format, slide.magnification) == ("ndpi", 20.0)
        assert [level.height for level in slide.levels] == [64, 32]
        np.testing.assert_array_equal(slide.read(0, 0, 64, 96), planes[0])
        assert "3 focal planes" in slide.note
        assert "focal" in choose_level(slide, None, None).note
    for plane, offset in enumerate(sorted(offsets)):
        with open_slide(path, plane=plane) as slide:
            np.testing.assert_array_equal(slide.read(0, 0, 64, 96), planes[offset])


def test_channels_of_an_ndpi_are_not_levels(tmp_path: Path) -> None:
    path = tmp_path / "x.ndpi"
    write_ndpi(path, [(picture(64, 96, seed=seed), 20.0, 0) for seed in range(3)])
    with pytest.raises(SlideError, match="fluorescence"):
        open_slide(path)


def scn(images: list[tuple[str, int, int, int, int, int]]) -> str:
    """Leica's XML of images (name, offset, width, height in nm, first page, pages)."""
    parts = []
    for name, offset, width, height, ifd, count in images:
        pixels = "".join(f'<dimension r="{r}" ifd="{ifd + r}"/>' for r in range(count))
        parts.append(
            f'<image name="{name}"><pixels>{pixels}</pixels><view offsetX="{offset}" '
            f'offsetY="{offset}" sizeX="{width}" sizeY="{height}"/></image>'
        )
    name = "http://www.leica-microsystems.com/scn/2010/10/01"
    glass = '<collection sizeX="2600000" sizeY="7000000">'
    body = f"{glass}{''.join(parts)}</collection>"
    return f'<?xml version="1.0"?>\n<scn xmlns="{name}">{body}</scn>'


def test_the_macro_of_an_scn_is_not_the_slide(tmp_path: Path) -> None:
    path, scan = tmp_path / "x.scn", picture(128, 192)
    macro = ("macro", 0, 2600000, 7000000, 0, 1)
    one = ("scan", 900000, 192 * 400, 128 * 400, 1, 2)
    for images, levels in (([macro, one], 2), ([macro], 0), ([macro, one, one], 0)):
        with tifffile.TiffWriter(path) as tiff:
            options = {"photometric": "rgb", "metadata": None, "tile": (64, 64)}
            tiff.write(picture(140, 52), description=scn(images), **options)
            tiff.write(scan, **options)
            tiff.write(scan[::2, ::2].copy(), **options)
        if not levels:
            with pytest.raises(SlideError, match=r"scan it again|2 scans of one glass"):
                open_slide(path, reader="tifffile")
            if len(images) == 3:
                with open_slide(path, scene=0) as slide:
                    np.testing.assert_array_equal(slide.read(0, 0, 128, 192), scan)
            continue
        np.testing.assert_array_equal(whole(path), scan)
        with open_slide(path) as slide:
            assert (slide.format, len(slide.levels)) == ("scn", levels)
            assert slide.mpp == pytest.approx(0.4)
            assert "of 2 images" in slide.note


def test_tiles_that_overlap_are_left_to_openslide(tmp_path: Path) -> None:
    path = tmp_path / "x.bif"
    xmp = b'<EncodeInfo Ver="2"><SlideInfo><iScan ScanRes="0.25"/></SlideInfo></EncodeInfo>'
    tags = [(700, 1, len(xmp), xmp, True)]
    options = {"photometric": "rgb", "metadata": None, "tile": (64, 64)}
    tifffile.imwrite(path, picture(128, 128), extratags=tags, **options)
    for reader in ("tifffile", "auto"):  # OpenSlide does not take this one either
        with pytest.raises(SlideError, match=r"x\.bif: a Ventana BIF.*stitched"):
            open_slide(path, reader=reader)


def test_levels_of_any_factor_as_openslide_has_them(tmp_path: Path) -> None:
    path, rgb = tmp_path / "x.tif", picture(320, 480)
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None}
    options["tile"] = (64, 64)
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(rgb, **options)
        tiff.write(rgb[::5, ::5].copy(), subfiletype=1, **options)
        tiff.write(picture(90, 64), photometric="rgb", metadata=None, subfiletype=1)
    with open_slide(path) as slide, openslide.OpenSlide(path) as other:
        sizes = [(level.width, level.height) for level in slide.levels]
        assert sizes == list(other.level_dimensions) == [(480, 320), (96, 64)]
        np.testing.assert_array_equal(slide.read(0, 0, 64, 96, 1), rgb[::5, ::5])


def test_of_several_images_the_one_that_is_read_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "x.tif"
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(picture(50, 40), photometric="rgb", metadata=None)
        tiff.write(picture(200, 300), photometric="rgb", metadata=None)
    np.testing.assert_array_equal(whole(path), picture(200, 300))
    with open_slide(path) as slide:
        said = "of 2 images that of 200 x 300 pixels is read (--scene 1)"
        assert slide.note == said


@pytest.mark.parametrize(("dpi", "known"), [(300, False), (96, False), (101600, True)])
def test_dots_per_inch_of_a_printer_are_no_mpp(
    tmp_path: Path, dpi: int, known: bool
) -> None:
    path = tmp_path / "x.tif"
    resolution = {"resolution": (dpi, dpi), "resolutionunit": "INCH"}
    tifffile.imwrite(path, picture(), photometric="rgb", metadata=None, **resolution)
    with open_slide(path) as slide:
        assert slide.mpp == (pytest.approx(0.25) if known else None)
        assert (f"{dpi} dpi" in slide.note) != known


def test_pixels_that_are_not_square_are_refused(tmp_path: Path) -> None:
    for down, square in ((4e4, True), (4.02e4, True), (3e4, False)):
        path = tmp_path / "x.tif"
        resolution = {"resolution": (4e4, down), "resolutionunit": "CENTIMETER"}
        tifffile.imwrite(
            path, picture(), photometric="rgb", metadata=None, **resolution
        )
        with open_slide(path) as slide:
            assert (slide.resolution.x, slide.resolution.y) == (
                pytest.approx(0.25),
                pytest.approx(1e4 / down),
            )
            if square:
                assert settle_mpp(slide, None) == (slide.resolution, "")
            else:
                with pytest.raises(SlideError, match=r"0\.25 um wide.*square.*--mpp"):
                    settle_mpp(slide, None)
            told, note = settle_mpp(slide, 0.5)
            assert (told.x, told.y, told.source) == (0.5, 0.5, "--mpp")
            assert note.startswith("--mpp 0.5 overrules the file's 0.25")
            assert "XResolution" in note


# --- missing tiles --------------------------------------------------------------------


def lose_tile(path: Path, page: int, index: int) -> None:
    with tifffile.TiffFile(path) as tiff:
        counts = list(tiff.pages[page].databytecounts)
    counts[index] = 0
    tag(path, "TileByteCounts", counts, page)


def write_svs(path: Path, rgb: UInt8) -> None:
    text = "Aperio Image Library v12.0.1\r\n|AppMag = 40|MPP = 0.25"
    options = {"photometric": "rgb", "metadata": None, "tile": (64, 64)}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(rgb, description=text, **options)
        half = rgb.reshape(rgb.shape[0] // 2, 2, -1, 2, 3).mean((1, 3))
        tiff.write(np.rint(half).astype(np.uint8), description=text, **options)


def test_a_missing_tile_of_an_svs_is_computed_from_the_finer_level(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.svs"
    write_svs(path, picture(256, 384))
    expected = whole(path, 1)
    lose_tile(path, 1, 4)
    found = whole(path, 1)
    assert far(found, expected) <= 1
    with open_slide(path) as slide:
        np.testing.assert_array_equal(
            slide.read(70, 60, 30, 50, 1), found[70:100, 60:110]
        )
        assert "1 of 6 tiles" in slide.note
    lose_tile(path, 0, 0)  # and with it nothing is left to compute it from
    with open_slide(path) as slide, pytest.raises(SlideError, match="never stored"):
        slide.read(0, 0, 10, 10)


def test_a_missing_tile_is_unreadable_and_noted(tmp_path: Path) -> None:
    path, rgb = tmp_path / "x.tif", picture(768, 1024)
    tifffile.imwrite(path, rgb, tile=(256, 256), photometric="rgb", metadata=None)
    lose_tile(path, 0, 7)
    with open_slide(path) as slide:
        pixels, damaged, why = read_readable(slide, 0, 0, 768, 1024)
        assert damaged == [(256, 768, 256, 256)]
        assert "never stored" in why
        assert "1 of 12 tiles" in slide.note
        assert slide.absent == 1 / 12
    np.testing.assert_array_equal(pixels[:256], rgb[:256])


def lose_tiles(path: Path, page: int, lost: int) -> None:
    """Remove the bytes of a page's first tiles."""
    with tifffile.TiffFile(path) as tiff:
        counts = list(tiff.pages[page].databytecounts)
    tag(path, "TileByteCounts", [0] * lost + counts[lost:], page)


@pytest.mark.parametrize("kind", ["tif", "svs"])
@pytest.mark.parametrize(("lost", "readable"), [(0, True), (3, True), (4, False)])
def test_a_slide_that_lacks_more_than_a_tenth_is_refused(
    tmp_path: Path, kind: str, lost: int, readable: bool
) -> None:
    path = tmp_path / f"x.{kind}"
    if kind == "svs":
        write_svs(path, picture(320, 384))  # 30 tiles of 64
    else:
        options = {"photometric": "rgb", "metadata": None, "tile": (64, 64)}
        tifffile.imwrite(path, picture(320, 384), **options)
    lose_tiles(path, 0, lost)
    if readable:
        with open_slide(path) as slide:
            assert slide.absent == lost / 30
            assert bool(slide.note) == bool(lost)
    else:
        with pytest.raises(SlideError, match="4 of 30 tiles .* at most 10%"):
            open_slide(path)


@pytest.mark.parametrize("lost", [1, 2])
def test_a_level_that_lacks_more_than_a_tenth_is_not_used(
    tmp_path: Path, lost: int
) -> None:
    path, rgb = tmp_path / "x.tif", picture(512, 768)
    options: dict[str, Any] = {"photometric": "rgb", "metadata": None, "tile": (64, 64)}
    with tifffile.TiffWriter(path) as tiff:  # of 96, 24 and 6 tiles
        for level, step in enumerate((1, 2, 4)):
            reduced = {"subfiletype": 1} if level else {}
            tiff.write(rgb[::step, ::step], **options, **reduced)
    lose_tiles(path, 1, 1 + lost)
    with open_slide(path) as slide:
        assert slide.absent == 0.0
        sizes = [level.width for level in slide.levels]
        assert sizes == ([768, 384, 192] if lost == 1 else [768, 192])
        assert f"{1 + lost} of 24 tiles" in slide.note
        last = len(slide.levels) - 1
        found = slide.read(0, 0, 128, 192, last)
    np.testing.assert_array_equal(found, rgb[::4, ::4])


def test_philips_leaves_out_glass(tmp_path: Path) -> None:
    path, rgb = tmp_path / "x.tiff", picture(256, 384)
    spacings = "".join(
        '<DataObject ObjectType="PixelDataRepresentation"><Attribute '
        f'Name="DICOM_PIXEL_SPACING">"{mm}" "{mm}"</Attribute></DataObject>'
        for mm in ("0.00025", "0.0005")
    )
    text = (
        '<?xml version="1.0" encoding="UTF-8" ?><DataObject ObjectType="DPUfsImport">'
        f"<Attribute><Array>{spacings}</Array></Attribute></DataObject>"
    )
    options = {"photometric": "rgb", "tile": (64, 64), "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(rgb, description=text, software="Philips DP v1.0", **options)
        tiff.write(rgb[::2, ::2], subfiletype=1, **options)
    lose_tiles(path, 0, 6)
    with open_slide(path) as slide:
        assert (slide.format, slide.absent, slide.note) == ("philips", 0.0, "")
        assert (slide.read(0, 0, 64, 384) == 255).all()
        np.testing.assert_array_equal(slide.read(64, 64, 64, 128), rgb[64:128, 64:192])


def test_tiles_beyond_the_end_of_a_file_are_noted(tmp_path: Path) -> None:
    path, rgb = tmp_path / "x.tif", picture(512, 512)
    tifffile.imwrite(path, rgb, tile=(64, 64), photometric="rgb", metadata=None)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 3 * 64 * 64 * 5])
    with open_slide(path) as slide:
        assert slide.absent == 5 / 64
        assert "5 of 64 tiles or strips of level 0 lie beyond the end" in slide.note
        check_readable(slide)
    path.write_bytes(whole[: len(whole) - 3 * 64 * 64 * 7])
    with open_slide(path) as slide, pytest.raises(SlideError, match="11% of level 0"):
        check_readable(slide)
