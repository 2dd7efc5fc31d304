import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from scipy import ndimage
from shapely import affinity
from shapely.geometry import Point, Polygon, box

from medray.annotations import Area, geojson_features, rasterise, read_annotation
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
    uri = svg(tmp_path, '<rect width="9" height="9"/>', 'viewBox="0 0 1000 500"')
    with pytest.raises(SlideError, match=r"a\.svg.*1000 x 500.*1000 x 1000"):
        read(uri)


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ('<rect data-class="stroma" width="9" height="9"/>', "stroma"),
        ('<g id="Stroma"><g><rect width="9" height="9"/></g></g>', "stroma"),
        ('<g inkscape:label="tumour"><rect width="9" height="9"/></g>', "tumour"),
        ('<g id="tumour"><rect class="x stroma" width="9" height="9"/></g>', "stroma"),
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


def test_entity_bombs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.svg"
    path.write_text(
        '<!DOCTYPE svg [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]>'
        '<svg xmlns="http://www.w3.org/2000/svg"><text>&b;</text></svg>'
    )
    with pytest.raises(SlideError, match="EntitiesForbidden"):
        read(str(path))


@pytest.mark.parametrize("folder", ["bcss", "ocdc", "glomeruli_pas"])
def test_real_outlines_and_masks_give_the_same_labels(
    shared_data: Path, folder: str
) -> None:
    for path in sorted((shared_data / "he_seg" / folder / "svg").glob("*.svg")):
        mask_path = path.parents[1] / "masks" / f"{path.stem}.png"
        truth = np.asarray(Image.open(mask_path).convert("L")) > 0
        height, width = truth.shape
        size = {"height": height, "width": width}
        drawn = read_annotation(str(path), **size, classes=ONE)
        labels = rasterise(drawn, ONE, y=0, x=0, **size) > 0
        # The outlines run through pixel centres, so along edges, the slide's own
        # included, they lie half a pixel and some smoothing inside the mask.
        padded = np.pad(truth, 4)
        inner = ndimage.binary_erosion(padded, iterations=4)[4:-4, 4:-4]
        outer = ndimage.binary_dilation(padded, iterations=4)[4:-4, 4:-4]
        assert not (inner & ~labels).any(), path.name
        assert not (labels & ~outer).any(), path.name
        masks = read_annotation(str(mask_path), **size, classes=ONE)
        np.testing.assert_array_equal(
            rasterise(masks, ONE, y=0, x=0, **size) > 0, truth
        )


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


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(0, 5000)] * 2, st.floats(5, 900)), max_size=6),
    st.sampled_from([1.0, 2.0, 4.0]),
    st.data(),
)
def test_labels_do_not_depend_on_how_the_slide_is_cut(
    circles: list[tuple[float, float, float]], downsample: float, data: st.DataObject
) -> None:
    areas = [Area(Point(x, y).buffer(r), None) for x, y, r in circles]
    side = int(5000 / downsample)
    draw = {"downsample": downsample, "height": 0, "width": 0}
    whole = rasterise(areas, ONE, y=0, x=0, **draw | {"height": side, "width": side})
    cut = data.draw(st.integers(1, side - 1))
    parts = [
        rasterise(areas, ONE, y=y, x=0, **draw | {"height": h, "width": side})
        for y, h in ((0, cut), (cut, side - cut))
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


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
    area = only(read(str(tmp_path / "b.xml"), TWO)).area
    assert area == pytest.approx(10000 - 100 + math.pi * 50 * 30, rel=1e-3)


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
