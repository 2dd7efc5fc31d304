import gzip
import json
import math
import struct
import zlib
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
import shapely
import tifffile
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from rasterio import features
from rasterio.transform import Affine
from scipy import ndimage
from shapely import affinity
from shapely.geometry import MultiPolygon, Point, Polygon, box

from medray.annotations import Area, geojson_features, rasterise, read_annotation
from medray.annotations.area import FillRule, fill
from medray.classes import Classes
from medray.errors import SlideError

ONE = Classes()
TWO = Classes(("background", "tumour", "stroma"))


def svg(tmp_path: Path, body: str, head: str = 'viewBox="0 0 1000 1000"') -> str:
    path = tmp_path / "a.svg"
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {head} '
        f'xmlns:inkscape="http://www.inkscape.org/namespaces/inkscape">{body}</svg>'
    )
    return str(path)


def read(uri: str, classes: Classes = ONE, size: int = 1000) -> list[Area]:
    return read_annotation(uri, height=size, width=size, classes=classes)


def only(areas: list[Area]) -> Polygon:
    assert len(areas) == 1
    assert areas[0].polygon.is_valid
    return areas[0].polygon


@pytest.mark.parametrize(
    ("body", "area"),
    [
        ('<rect x="10" y="20" width="100" height="50"/>', 5000),
        ('<circle cx="500" cy="500" r="100" fill="none" stroke="red"/>', 1e4 * math.pi),
        ('<ellipse cx="500" cy="500" rx="100" ry="50"/>', 5e3 * math.pi),
        ('<polygon points="0,0 100,0 100,100"/>', 5000),
        ('<polyline points="0,0 100,0 100,100"/>', 5000),
        ('<path d="M 0 0 h 100 v 100 h -100 z"/>', 10000),
        # one lobe of a parabola: area 2/3 of width times height
        ('<path d="M 100 100 Q 200 300 300 100"/>', 2 / 3 * 200 * 100),
        # fill rules: two squares in one path, the same way round
        ('<path d="M0 0H100V100H0z M20 20H80V80H20z"/>', 10000),
        ('<path fill-rule="evenodd" d="M0 0H100V100H0z M20 20H80V80H20z"/>', 6400),
        ('<path style="fill-rule:evenodd" d="M0 0H100V100H0z M20 20H80V80H20z"/>', 6400),
        ('<path d="M0 0H100V100H0z M20 20V80H80V20z"/>', 6400),
        # siblings: inside is a hole, inside that is filled again
        ('<rect width="100" height="100"/><rect x="10" y="10" width="80" height="80"/>'
         '<rect x="20" y="20" width="60" height="60"/>', 10000 - 6400 + 3600),
        # overlapping are united
        ('<rect width="100" height="100"/><rect x="50" width="100" height="100"/>', 15000),
        # the same outline twice is one
        ('<rect width="100" height="100"/><rect width="100" height="100"/>', 10000),
        # bow tie: both lobes
        ('<polygon points="0,0 100,100 100,0 0,100"/>', 5000),
        # what is not drawn
        ('<rect width="100" height="100"/><line x2="50" y2="50"/><text>x</text>'
         '<rect display="none" width="900" height="900"/>'
         '<defs><rect width="900" height="900"/></defs>', 10000),
        ('<style>.off{display:none}</style><rect width="100" height="100"/>'
         '<g class="off"><g><rect width="900" height="900"/></g></g>'
         '<g style="display:none"><rect width="900" height="900"/></g>', 10000),
        ('<rect width="100" height="100"/>' + "".join(
            f'<{tag}><rect width="900" height="900"/></{tag}>'
            for tag in ("clipPath", "marker", "mask", "pattern", "symbol")), 10000),
        # a rounded rectangle lacks four corners
        ('<rect width="100" height="50" rx="10"/>', 5000 - (4 - math.pi) * 100),
        # turned shapes keep their area, arcs too
        ('<rect width="100" height="50" x="400" y="9" rx="10" transform="rotate(40)"/>',
         5000 - (4 - math.pi) * 100),
        ('<ellipse cx="400" cy="100" rx="100" ry="50" transform="rotate(30) scale(2)"/>',
         2e4 * math.pi),
        ('<path d="M 100 100 A 50 50 0 0 1 200 100 z"/>', 1250 * math.pi),
        ('<path d="M 0 0 C 0 100 100 100 100 0"/>', 6000),
        ('<rect width="10%" height="5%"/>', 5000),
        ('<rect width="1in" height="25.4mm"/>', 96 * 96),
        # drawn where it is used
        ('<defs><g id="a"><rect width="100" height="50"/></g></defs>'
         '<use href="#a" x="300" transform="scale(2)"/>', 20000),
        ('<symbol id="a"><rect width="100" height="50"/></symbol><use href="#a"/>', 5000),
        # a hole in the union of two outlines
        ('<rect width="100" height="100"/><rect x="50" width="100" height="100"/>'
         '<rect x="60" y="10" width="20" height="20"/>', 15000 - 400),
        # one marked as a hole is cut out though it sticks out, or comes first
        ('<rect data-role="hole" x="50" width="100" height="50"/>'
         '<rect width="100" height="100"/>', 10000 - 2500),
        ('<rect width="100" height="100"/><g id="hole"><rect width="50" height="50"/></g>'
         '<rect class="outer" x="10" y="10" width="5" height="5"/>', 10000 - 2500 + 25),
        # too few points
        ('<rect width="100" height="100"/><polygon points="0,0 900,900"/>'
         '<polygon points="0,0 900,900 1,1"/><path d=""/><circle r="0"/>', 10000),
    ],
)  # fmt: skip
def test_svg_shapes_have_their_area(tmp_path: Path, body: str, area: float) -> None:
    assert only(read(svg(tmp_path, body))).area == pytest.approx(area, rel=2e-3)


def test_svg_nested_transforms(tmp_path: Path) -> None:
    body = (
        '<g transform="translate(300 200) rotate(30)"><g transform="scale(2 1.5)">'
        '<rect x="10" y="20" width="100" height="50" transform="skewX(10)"/></g></g>'
    )
    shape = affinity.skew(box(10, 20, 110, 70), xs=10, origin=(0, 0))
    shape = affinity.scale(shape, 2, 1.5, origin=(0, 0))
    shape = affinity.translate(affinity.rotate(shape, 30, origin=(0, 0)), 300, 200)
    found = only(read(svg(tmp_path, body)))
    assert found.symmetric_difference(shape).area < 1e-3 * shape.area


@pytest.mark.parametrize(
    "head",
    [
        'viewBox="0 0 500 500"',
        'viewBox="0,0,500,500" width="100%" height="100%"',
        'width="375pt" height="375pt"',
        'viewBox="0 0 500 500" width="10cm" height="10cm"',
        'width="500" height="500"',
        'width="500px" height="500px"',
    ],
)
def test_svg_space_is_scaled_to_the_slide(tmp_path: Path, head: str) -> None:
    body = '<rect x="50" y="100" width="200" height="100"/>'
    assert only(read(svg(tmp_path, body, head))).bounds == (100, 200, 500, 400)


def test_svg_viewbox_may_start_anywhere(tmp_path: Path) -> None:
    body = '<rect x="50" y="100" width="200" height="100"/>'
    shape = only(read(svg(tmp_path, body, 'viewBox="-100 50 1000 1000"')))
    assert shape.bounds == (150, 50, 350, 150)


def test_svg_of_another_shape_is_refused(tmp_path: Path) -> None:
    body = '<rect width="1000" height="1000"/>'
    for head in ("", 'width="100%" height="100%"', 'viewBox="0 0 1005 1000"'):
        assert only(read(svg(tmp_path, body, head))).area == pytest.approx(
            1e6, rel=0.01
        )
    for head in ('viewBox="0 0 5"', 'viewBox="a"', 'width="0" height="9"',
                 'width="-9" height="-9"', 'width="9"', 'viewBox="0 0 1e999 1"'):  # fmt: skip
        with pytest.raises(SlideError, match=r"a\.svg.*found (viewBox|width)"):
            read(svg(tmp_path, body, head))
    uri = svg(tmp_path, body, 'viewBox="0 0 1000 500"')
    with pytest.raises(SlideError, match=r"a\.svg.*1000 x 500.*1000 x 1000"):
        read(uri)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ('<rect data-class="stroma" width="9" height="9"/>', "stroma"),
        ('<g id="Stroma"><g><rect width="9" height="9"/></g></g>', "stroma"),
        ('<g inkscape:label="tumour"><rect width="9" height="9"/></g>', "tumour"),
        ('<g id="tumour"><rect class="x stroma" width="9" height="9"/></g>', "stroma"),
        ('<g><title>Stroma</title><rect width="9" height="9"/></g>', "stroma"),
        ('<rect width="9" height="9"><title>stroma</title></rect>', "stroma"),
        ('<a id="stroma"><rect width="9" height="9"/></a>', "stroma"),
        (
            '<g id="tumour"><title>not stroma</title><rect width="9" height="9"/></g>',
            "tumour",
        ),
        (
            '<defs><rect id="r" width="9" height="9"/></defs>'
            '<g id="stroma"><use href="#r"/></g>',
            "stroma",
        ),
    ],
)
def test_svg_classes(tmp_path: Path, body: str, name: str) -> None:
    assert [area.class_name for area in read(svg(tmp_path, body), TWO)] == [name]


def test_unknown_and_missing_classes_are_named(tmp_path: Path) -> None:
    body = '<rect data-class="tumor" width="9" height="9"/>'
    with pytest.raises(SlideError, match=r"'tumor'.*did you mean 'tumour'"):
        read(svg(tmp_path, body), TWO)
    with pytest.raises(SlideError, match=r"no class.*tumour.*stroma"):
        read(svg(tmp_path, '<rect width="9" height="9"/>'), TWO)


def test_svg_classes_are_drawn_in_order_and_holes_without_class_cut_all(
    tmp_path: Path,
) -> None:
    body = (
        '<g id="stroma"><rect width="90" height="90"/></g>'
        '<rect id="tumour" x="200" width="90" height="90"/>'
        '<rect class="stroma" x="250" width="90" height="90"/>'
        '<rect class="hole" x="80" width="130" height="90"/>'
    )
    areas = read(svg(tmp_path, body), TWO)
    assert [area.class_name for area in areas] == ["stroma", "tumour", "stroma"]
    labels = rasterise(areas, TWO, y=0, x=0, height=90, width=400)
    expected = [2] * 80 + [0] * 130 + [1] * 40 + [2] * 90 + [0] * 60
    np.testing.assert_array_equal(labels, [expected] * 90)


def nested(draw: st.DrawFn, low: int, high: int, depth: int) -> list[tuple[int, int]]:
    """Intervals that lie apart or one strictly inside another."""
    found: list[tuple[int, int]] = []
    while depth and high - low > 4 and draw(st.booleans()):
        start = draw(st.integers(low + 1, high - 3))
        stop = draw(st.integers(start + 1, high - 1))
        found += [(start, stop), *nested(draw, start, stop, depth - 1)]
        low = stop
    return found


@settings(max_examples=40, deadline=None)
@given(st.composite(nested)(0, 60, 4), st.randoms())
def test_nested_outlines_alternate(
    tmp_path_factory: pytest.TempPathFactory,
    boxes: list[tuple[int, int]],
    random: Random,
) -> None:
    expected = np.zeros((60, 60), np.uint8)
    for start, stop in boxes:
        expected[start:stop, start:stop] ^= 1
    random.shuffle(boxes)
    body = "".join(
        f'<rect x="{a}" y="{a}" width="{b - a}" height="{b - a}"/>' for a, b in boxes
    )
    uri = svg(tmp_path_factory.mktemp("n"), body, 'viewBox="0 0 60 60"')
    labels = rasterise(read(uri, ONE, 60), ONE, y=0, x=0, height=60, width=60)
    np.testing.assert_array_equal(labels, expected)


def test_a_doctype_without_entities_is_harmless(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    path.write_text(
        '<?xml version="1.0"?><!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" '
        '"http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">'
        '<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
    )
    assert only(read(str(path))).area == 81


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("<g>" * 120 + "</g>" * 120, "nested more than 100"),
        ('<g id="a"><use href="#a"/></g>', "draws itself"),
        ("".join(f'<g id="g{i}">' + f'<use href="#g{i + 1}"/>' * 10 + "</g>"
                 for i in range(9)) + '<g id="g9"><path d="M0 0H9V9"/></g>',
         "more than 1000000 elements"),
        ('<svg x="9" viewBox="0 0 9 9"><rect width="9" height="9"/></svg>', "ungroup"),
        ('<polygon points="0,0 1e999,0 1,1"/>', "finite"),
    ],
)  # fmt: skip
def test_hostile_drawings_are_refused(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(SlideError, match=rf"a\.svg.*{message}"):
        read(svg(tmp_path, body))


@pytest.mark.parametrize(
    "shape",
    [
        '<polygon points="0,0 nan,5 100,0 100,100 0,100"/>',
        '<polygon points="0,0 100,0 100,100 0"/>',
        '<path d="M0 0 L100 0 L100 100 L nan 5 L 0 100z"/>',
        '<path d="M0 0 L100 0 L100 100 L 5"/>',
        '<path d="M0 0 C 1 2 3 4"/>',
        '<rect width="9" height="9" transform="tranlsate(500 500)"/>',
        '<rect width="9" height="9" transform="translate(500"/>',
        '<g transform="matrix(1 0 0 1 5)"><rect width="9" height="9"/></g>',
        '<circle cx="abc" cy="50" r="9"/>',
        '<rect width="9em" height="9"/>',
        '<rect style="transform: translate(5px,5px)" width="9" height="9"/>',
        '<style>.a{transform:scale(2)}</style><rect class="a" width="9" height="9"/>',
        '<rect transform="scale(2)" transform-origin="5 5" width="9" height="9"/>',
    ],
)
def test_damaged_values_do_not_move_outlines(tmp_path: Path, shape: str) -> None:
    body = '<rect x="500" width="100" height="100"/>' + shape
    with pytest.raises(SlideError, match=r"a\.svg: (expected|a <).*(found|transform)"):
        read(svg(tmp_path, body))


@pytest.mark.parametrize(
    ("body", "bounds"),
    [
        ('<path d="m10+5 10.5.5,1e1-5e-1z M.5.5h9v9H.5z"/>', (0.5, 0.5, 30.5, 9.5)),
        ('<path d="M10 10a5 5 0 0110 0z"/>', (10, 5, 20, 10)),
        ('<polygon points=" 0,0,10-0 10,10\n"/>', (0, 0, 10, 10)),
        ('<rect width="9" height="9" transform="translate(5px, 4px) rotate(90deg)"/>',
         (0, 4, 5, 13)),
        ('<rect width="9" height="9" rx="auto" transform="none"/>', (0, 0, 9, 9)),
        ('<rect width="9" height="9" transform="rotate(180 9,9), scale(2)"/>',
         (0, 0, 18, 18)),
        ('<rect width="9" height="9" style="transform: none; text-transform:uppercase"/>',
         (0, 0, 9, 9)),
        ('<style>.a{display:none !important}</style><rect width="9" height="9"/>'
         '<rect class="a" width="90" height="90"/>'
         '<rect style="display:none!important" width="90" height="90"/>', (0, 0, 9, 9)),
    ],
)  # fmt: skip
def test_unusual_but_sound_values_are_read(
    tmp_path: Path, body: str, bounds: tuple[float, ...]
) -> None:
    found = shapely.total_bounds([a.polygon for a in read(svg(tmp_path, body))])
    assert found == pytest.approx(bounds, abs=0.1)


def test_entity_bombs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.svg"
    path.write_text(
        '<!DOCTYPE svg [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
        '<svg xmlns="http://www.w3.org/2000/svg"><text>&b;</text></svg>'
    )
    with pytest.raises(SlideError, match=r"b\.svg.*entity"):
        read(str(path))


@pytest.mark.parametrize("folder", ["bcss", "ocdc", "glomeruli_pas"])
def test_real_outlines_and_masks_give_the_same_labels(
    shared_data: Path, folder: str
) -> None:
    def edge(label: np.ndarray) -> np.ndarray:
        return ndimage.binary_dilation(label) ^ ndimage.binary_erosion(label)

    ious = []
    for path in sorted((shared_data / "he_seg" / folder / "svg").glob("*.svg")):
        mask_path = path.parents[1] / "masks" / f"{path.stem}.png"
        truth = np.asarray(Image.open(mask_path).convert("L")) > 0
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


halves = st.integers(-20, 6020).map(lambda n: n / 2)
polygons = st.lists(
    st.lists(st.tuples(halves, halves) | st.tuples(*[st.floats(-9, 3000)] * 2),
             min_size=3, max_size=7),
    max_size=5,
).map(lambda rings: [Area(fill([np.array(ring)]), None) for ring in rings])  # fmt: skip


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


def png(height: int, width: int, depth: int, raw: bytes) -> bytes:
    """A grey PNG, byte by byte (PNG 3, section 11)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw))
    return b"\x89PNG\r\n\x1a\n" + body + chunk(b"IEND", b"")


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


@settings(max_examples=40, deadline=None)
@given(polygons, st.sampled_from([1.0, 2.0, 4.0]), st.data())
def test_labels_do_not_depend_on_how_the_slide_is_cut(
    areas: list[Area], downsample: float, data: st.DataObject
) -> None:
    side = int(3000 / downsample)
    draw = {"classes": ONE, "downsample": downsample}
    whole = rasterise(areas, y=0, x=0, height=side, width=side, **draw)
    cuts = st.lists(st.integers(1, side - 1), max_size=3, unique=True).map(sorted)
    rows, columns = ([0, *data.draw(cuts), side] for _ in "yx")
    stitched = np.full_like(whole, 9)
    for y0, y1 in pairwise(rows):
        for x0, x1 in pairwise(columns):
            stitched[y0:y1, x0:x1] = rasterise(
                areas, y=y0, x=x0, height=y1 - y0, width=x1 - x0, **draw
            )
    np.testing.assert_array_equal(stitched, whole)


def test_a_cut_does_not_move_outlines_that_run_through_pixel_centres() -> None:
    """GDAL rounds differently by a window's origin, which decides such pixels."""
    rng = np.random.default_rng(0)
    for grid in (2, 3, 10) * 25:
        polygon = fill([rng.integers(0, 200 * grid, (5, 2)) / grid])
        areas = [Area(polygon, None)]
        whole = rasterise(areas, ONE, y=0, x=0, height=200, width=200)
        for cut in (1, 7, 37, 111):
            size = 200 - cut
            part = rasterise(areas, ONE, y=cut, x=cut, height=size, width=size)
            np.testing.assert_array_equal(part, whole[cut:, cut:])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([60, 400, 1500]), st.sampled_from([1, 2]))
def test_long_outlines_are_drawn_as_if_whole(
    seed: int, step: int, downsample: int
) -> None:
    """Points left out far from a block must not change it: GDAL, given all, agrees."""
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, step, (600, 2)) * downsample
    start = rng.uniform(-500, 3500, 2) * downsample
    # Many coordinates on half pixels, where rounding decides.
    ring = np.round(2 * (start + np.cumsum(steps, axis=0))) / 2
    polygon = Polygon(ring)  # crosses itself: every crossing of a row counts
    for top in (0, 1024, 2048):
        for left in (0, 1024, 2048):
            expected = features.rasterize(
                [(polygon, 1)],
                out_shape=(1024, 1024),
                transform=Affine(
                    downsample, 0, left * downsample, 0, downsample, top * downsample
                ),
            )
            labels = rasterise(
                [Area(polygon, None)], ONE, y=top, x=left, height=1024, width=1024,
                downsample=downsample,
            )  # fmt: skip
            np.testing.assert_array_equal(labels, expected)


def test_areas_in_parts_and_with_many_holes_are_drawn_whole() -> None:
    holes = [box(i, j, i + 5, j + 5).exterior.coords
             for i in range(5, 2990, 50) for j in range(5, 2990, 50)]  # fmt: skip
    sieve = Polygon(box(0, 0, 3000, 3000).exterior.coords, holes)
    other = MultiPolygon([box(0, 0, 20, 20), box(2500, 1020, 2520, 1060)])
    areas = [Area(sieve, "tumour"), Area(other, "stroma")]
    expected = np.ones((3000, 3000), np.uint8)
    for i in range(5, 2990, 50):
        for j in range(5, 2990, 50):
            expected[j : j + 5, i : i + 5] = 0
    expected[:20, :20] = expected[1020:1060, 2500:2520] = 2
    whole = rasterise(areas, TWO, y=0, x=0, height=3000, width=3000)
    np.testing.assert_array_equal(whole, expected)
    part = rasterise(areas, TWO, y=1007, x=2001, height=40, width=600)
    np.testing.assert_array_equal(part, expected[1007:1047, 2001:2601])
    nothing = Area(Polygon(), "stroma")
    assert not rasterise([], TWO, y=0, x=0, height=9, width=9).any()
    assert not rasterise([nothing], TWO, y=0, x=0, height=9, width=9).any()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(0, 40)] * 2), min_size=3, max_size=6),
    st.sampled_from([1.0, 2.0, 4.0]),
)
def test_a_pixel_belongs_to_the_area_that_holds_its_centre(
    ring: list[tuple[float, float]], downsample: float
) -> None:
    polygon = fill([np.array(ring)])
    assume(not polygon.is_empty)
    side = int(40 / downsample)
    size = {"y": 0, "x": 0, "height": side, "width": side, "downsample": downsample}
    labels = rasterise([Area(polygon, None)], ONE, **size)
    rows, columns = (np.indices((side, side)) + 0.5) * downsample
    inside = shapely.contains_xy(polygon, columns, rows)
    sure = shapely.distance(polygon.boundary, shapely.points(columns, rows)) > 1e-6
    np.testing.assert_array_equal(labels[sure], inside[sure])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(*[st.integers(0, 12)] * 2), min_size=3, max_size=8),
             min_size=1, max_size=3),
    st.sampled_from(["nonzero", "evenodd"]),
)  # fmt: skip
def test_filling_follows_the_winding_number(
    rings: list[list[tuple[int, int]]], rule: FillRule
) -> None:
    polygon = fill([np.array(ring) for ring in rings], rule)
    assert polygon.is_valid
    rng = np.random.default_rng(0)
    for x, y in rng.uniform(0, 12, (40, 2)):
        turns = 0.0  # the angle that the rings turn through, seen from the point
        for ring in rings:
            spokes = np.array([*ring, ring[0]]) - (x, y)
            angles = np.diff(np.arctan2(spokes[:, 1], spokes[:, 0]))
            turns += np.sum((angles + math.pi) % (2 * math.pi) - math.pi)
        winding = round(turns / (2 * math.pi))
        expected = winding % 2 if rule == "evenodd" else winding
        assert polygon.covers(Point(x, y)) == bool(expected)


def test_geojson_comes_back(tmp_path: Path) -> None:
    ring = Point(300, 300).buffer(100).difference(Point(300, 300).buffer(50))
    areas = [Area(ring, "tumour"), Area(box(500, 500, 700, 600), "stroma")]
    document = geojson_features(areas, TWO)
    path = tmp_path / "a.geojson.gz"
    path.write_bytes(gzip.compress(json.dumps(document).encode()))
    found = read(str(path), TWO)
    assert [area.class_name for area in found] == ["tumour", "stroma"]
    draw = {"y": 0, "x": 0, "height": 1000, "width": 1000}
    np.testing.assert_array_equal(
        rasterise(found, TWO, **draw), rasterise(areas, TWO, **draw)
    )


@pytest.mark.parametrize("wrap", ["collection", "list", "single"])
def test_geojson_kinds(tmp_path: Path, wrap: str) -> None:
    def ring(low: int, high: int) -> list[list[int]]:
        return [[low, low], [high, low], [high, high, 0], [low, high], [low, low]]

    parts = [
        {"type": "Polygon", "coordinates": [ring(0, 100), ring(10, 20), ring(15, 30)]},
        {"type": "MultiPolygon", "coordinates": [[ring(200, 210)], [ring(300, 310)]]},
        {"type": "Point", "coordinates": [1, 2]},
        {"type": "LineString", "coordinates": [[0, 0], [900, 900], [0, 900]]},
        {"type": "Polygon", "coordinates": []},
    ]
    collection = {"type": "GeometryCollection", "geometries": parts}
    feature = {"type": "Feature", "geometry": collection, "properties": None}
    named = feature | {"properties": {"classification": "stroma"}}
    nothing = {"type": "Feature", "geometry": None, "properties": {}}
    document = {
        "collection": {"type": "FeatureCollection", "features": [nothing, named]},
        "list": [nothing, named],
        "single": feature,
    }[wrap]
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    classes = ONE if wrap == "single" else TWO
    areas = read(str(path), classes)
    assert only(areas).area == 10000 - 100 - 225 + 25 + 200
    assert areas[0].class_name == (None if wrap == "single" else "stroma")
    assert len({f["id"] for f in geojson_features(areas * 2, classes)["features"]}) == 2


def test_xml_classes(tmp_path: Path) -> None:
    vertices = '<Vertices><Vertex X="10" Y="10"/><Vertex X="30" Y="20"/></Vertices>'

    def imagescope(name: str, attribute: str, text: str) -> str:
        path = tmp_path / "a.xml"
        path.write_text(
            f'<Annotations><Annotation Name="{name}"><Attributes><Attribute '
            f'Name="{attribute}" Value=""/></Attributes><Regions><Region Type="1" '
            f'Text="{text}">{vertices}</Region><Region Type="4">{vertices}</Region>'
            "</Regions></Annotation></Annotations>"
        )
        return str(path)

    for stated in (("Tumour", "", ""), ("", "tumour", ""), ("Layer 1", "", "TUMOUR")):
        areas = read(imagescope(*stated), TWO)
        assert (areas[0].class_name, only(areas).bounds) == ("tumour", (10, 10, 30, 20))
    with pytest.raises(SlideError, match=r"a\.xml.*'Layer 1'"):
        read(imagescope("Layer 1", "", ""), TWO)
    assert read(imagescope("", "", ""))[0].class_name is None

    corners = "".join(
        f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>'
        for i, (x, y) in enumerate([(0, 0), (9, 0), (9, 9)])
    )
    path = tmp_path / "b.xml"
    path.write_text(
        "<ASAP_Annotations><Annotations>"
        f'<Annotation Type="Spline" PartOfGroup="None">{corners}</Annotation>'
        f'<Annotation Type="PointSet" PartOfGroup="x">{corners}</Annotation>'
        "</Annotations></ASAP_Annotations>"
    )
    areas = read(str(path))
    assert (areas[0].class_name, only(areas).area) == (None, 40.5)


_WHOLE = {
    "a.svg": b'<svg viewBox="0 0 9 9"><g id="tumour"><path d="M0 0C1 2 3 4 5 6z"/></g></svg>',
    "a.geojson": b'[{"geometry":{"type":"Polygon","coordinates":[[[0,0],[9,0],[9,9]]]}}]',
    "a.xml": b'<Annotations><Annotation><Region><Vertex X="1" Y="2"/></Region></Annotation></Annotations>',
    "a.geojson.gz": gzip.compress(b"[]", mtime=0),
    "a.png": png(3, 3, 8, b"\0\0\1\0" * 3),
}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(_WHOLE)), st.data())
def test_damaged_files_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    content = _WHOLE[name]
    start = data.draw(st.integers(0, len(content)))
    stop = data.draw(st.integers(start, min(start + 8, len(content))))
    path = tmp_path_factory.mktemp("damaged") / name
    path.write_bytes(
        content[:start] + data.draw(st.binary(max_size=4)) + content[stop:]
    )
    message = f"{path}: on one line"
    try:
        read(str(path), ONE, 3)
    except SlideError as error:
        message = str(error)
    assert str(path) in message
    assert "\n" not in message


def test_asap_and_imagescope(tmp_path: Path) -> None:
    square = "".join(
        f'<Coordinate Order="{i}" X="{x}" Y="{y}"/>'
        for i, (x, y) in reversed(list(enumerate([(0, 0), (9, 0), (9, 9), (0, 9)])))
    )
    (tmp_path / "a.xml").write_text(
        '<ASAP_Annotations><Annotations><Annotation Name="1" Type="Polygon" '
        f'PartOfGroup="stroma"><Coordinates>{square}</Coordinates></Annotation>'
        "</Annotations></ASAP_Annotations>"
    )
    areas = read(str(tmp_path / "a.xml"), TWO)
    assert (areas[0].class_name, only(areas).area) == ("stroma", 81)

    def region(kind: int, negative: int, *points: tuple[int, int]) -> str:
        vertices = "".join(f'<Vertex X="{x}" Y="{y}" Z="0"/>' for x, y in points)
        return (
            f'<Region Type="{kind}" NegativeROA="{negative}" Text="">'
            f"<Vertices>{vertices}</Vertices></Region>"
        )

    (tmp_path / "b.xml").write_text(
        '<Annotations MicronsPerPixel="0.25"><Annotation Id="1" Name="Tumour"><Regions>'
        + region(0, 0, (0, 0), (100, 0), (100, 100), (0, 100))
        + region(0, 1, (10, 10), (20, 10), (20, 20), (10, 20))
        + region(2, 0, (200, 200), (300, 260))
        + "</Regions></Annotation></Annotations>"
    )
    areas = read(str(tmp_path / "b.xml"), TWO)
    assert {a.class_name for a in areas} == {"tumour"}
    assert sum(a.polygon.area for a in areas) == pytest.approx(
        10000 - 100 + math.pi * 50 * 30, rel=1e-3
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.svg", b""),
        ("a.svg", b"<svg"),
        ("a.svg", b"<html/>"),
        ("a.geojson", b"{"),
        ("a.geojson", b'{"type": "Other"}'),
        ("a.geojson", b"[" * 100000),
        ("a.geojson", b'[{"geometry":{"type":"Polygon","coordinates":[[[NaN,0]]]}}]'),
        ("a.geojson.gz", b"\x1f\x8bnonsense"),
        ("a.xml", b"<Other/>"),
        ("a.xml", b'<Annotations><Annotation Name="tumour"><Region><Vertex X="a"/>'),
        ("a.png", b"\x89PNG\r\n"),
        ("a.tif", b"II*\x00"),
        ("a.tif", b""),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlideError, match=name):
        read(str(tmp_path / name))


def test_areas_are_cut_off_at_the_border(tmp_path: Path) -> None:
    body = '<rect x="950" y="900" width="500" height="50"/>'
    assert only(read(svg(tmp_path, body))).area == 2500
    with pytest.raises(SlideError, match="outside the slide of 1000 x 1000"):
        read(svg(tmp_path, '<rect x="2000" width="9" height="9"/>'))
    assert read(svg(tmp_path, "")) == []


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
