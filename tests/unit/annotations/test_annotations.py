"""GeoJSON, XML, and what all annotations have in common."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotated import ONE, TWO, only, png, read, svg
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import to_geojson
from shapely.affinity import rotate, scale
from shapely.geometry import Point, box

from medray.annotations.geojson_write import geojson_features
from medray.annotations.polygons import Area
from medray.annotations.rasterize import rasterise
from medray.annotations.reading import Annotation, read_marks
from medray.classes import Classes
from medray.errors import SlideError
from medray.geometry import Rectangle
from medray.slides.bounds import scanned_bounds


def test_unknown_and_missing_classes_are_named(tmp_path: Path) -> None:
    body = '<rect data-class="tumor" width="9" height="9"/>'
    with pytest.raises(SlideError, match=r"'tumor'.*did you mean 'tumour'"):
        read(svg(tmp_path, body), TWO)
    with pytest.raises(SlideError, match=r"no class.*tumour.*stroma"):
        read(svg(tmp_path, '<rect width="9" height="9"/>'), TWO)


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


# --- what the user sees ---------------------------------------------------------------


def marks(uri: str, classes: Classes = ONE, size: int = 1000) -> Annotation:
    return read_marks(uri, height=size, width=size, classes=classes)


def geojson(tmp_path: Path, *features: dict[str, Any]) -> str:
    path = tmp_path / "a.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return str(path)


def feature(
    shape: tuple[int, int, int, int], classification: Any = None, **properties: Any
) -> dict[str, Any]:
    """A rectangle (x0, y0, x1, y1) as a feature."""
    properties |= {"classification": classification} if classification else {}
    geometry = json.loads(to_geojson(box(*shape)))
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def drawn(uri: str, classes: Classes = ONE, size: int = 1000) -> list[int]:
    """Pixels of each class."""
    areas = marks(uri, classes, size).areas
    labels = rasterise(areas, classes, y=0, x=0, height=size, width=size)
    return np.bincount(labels.ravel(), minlength=len(classes)).tolist()


@pytest.mark.parametrize(
    ("stated", "name"),
    [
        ({"names": ["Gland", "benign", "3"]}, "Gland: benign: 3"),
        ({"names": ["stroma"], "color": [1, 2, 3]}, "stroma"),
        ({"name": "stroma", "colorRGB": -1}, "stroma"),
        ("stroma", "stroma"),
    ],
)
def test_a_class_of_several_parts_has_the_name_that_qupath_shows(
    tmp_path: Path, stated: Any, name: str
) -> None:
    uri = geojson(tmp_path, feature((0, 0, 9, 9), stated, isLocked=True))
    classes = Classes(("nothing", "tumour", name))
    assert [area.class_name for area in marks(uri, classes).areas] == [name]
    with pytest.raises(SlideError, match=rf"a\.geojson: unknown class '{name}'"):
        marks(uri)


@pytest.mark.parametrize("stated", [{"label": "x"}, 7, ["x"], {"names": [1]}])
def test_a_class_of_another_form_is_refused(tmp_path: Path, stated: Any) -> None:
    uri = geojson(tmp_path, feature((0, 0, 9, 9), stated))
    with pytest.raises(SlideError, match=r"a\.geojson: .*classification with a name"):
        marks(uri)


@pytest.mark.parametrize("stated", [None, {}, {"name": None}, {"color": [0, 0, 0]}])
def test_outlines_without_a_class_are_taken_as_the_only_one_with_a_note(
    tmp_path: Path, stated: Any
) -> None:
    uri = geojson(tmp_path, feature((0, 0, 9, 9), stated))
    found = marks(uri)
    assert [area.class_name for area in found.areas] == [None]
    (note,) = found.notes
    assert "1 outlines without a class were taken as 'tumour'" in note


def test_outlines_without_a_class_are_left_out_beside_others(tmp_path: Path) -> None:
    nest = feature((10, 10, 30, 30), {"name": "tumour"}, objectType="detection")
    uri = geojson(tmp_path, feature((0, 0, 700, 700)), nest)
    assert drawn(uri) == [1000**2 - 400, 400]
    assert "1 of 2 outlines have no class, others have; left out" in marks(uri).notes[0]
    with pytest.raises(SlideError, match=r"no class.*tumour.*stroma"):
        marks(uri, TWO)
    # The background's own class says nothing of the others.
    uri = geojson(
        tmp_path,
        feature((0, 0, 100, 100)),
        feature((10, 10, 30, 30), {"name": "background"}),
    )
    assert drawn(uri)[1] == 10000 - 400


def test_children_follow_their_parents(tmp_path: Path) -> None:
    inner = feature((20, 20, 30, 30), {"name": "stroma"})
    outer = feature((0, 0, 50, 50), {"name": "tumour"}, childObjects=[inner])
    beside = feature((100, 0, 110, 10), {"name": "tumour"})
    root = {"type": "Feature", "geometry": None}
    in_properties = root | {"properties": {"childObjects": [outer, beside]}}
    direct = root | {"childObjects": [outer, beside]}
    for whole in (in_properties, direct):
        uri = geojson(tmp_path, whole)
        names = [area.class_name for area in marks(uri, TWO).areas]
        assert names == ["tumour", "stroma", "tumour"]
        assert drawn(uri, TWO)[1:] == [2500 - 100 + 100, 100]
    with pytest.raises(SlideError, match=r"a\.geojson: expected features as childO"):
        marks(geojson(tmp_path, root | {"childObjects": ["x"]}))


def test_geometries_that_geojson_does_not_have_are_refused(tmp_path: Path) -> None:
    circle = {"type": "Circle", "coordinates": [50, 50], "radius": 9}
    uri = geojson(tmp_path, {"type": "Feature", "geometry": circle})
    with pytest.raises(SlideError, match=r"a\.geojson: .*'Circle'"):
        marks(uri)


def test_shapes_without_an_area_are_left_out_with_a_note(tmp_path: Path) -> None:
    point = {"type": "Point", "coordinates": [5, 5]}
    line = {"type": "LineString", "coordinates": [[5, 5], [9, 9]]}
    uri = geojson(
        tmp_path,
        feature((0, 0, 9, 9), "tumour"),
        *({"type": "Feature", "geometry": one} for one in (point, line, point)),
    )
    assert drawn(uri)[1] == 81
    assert "1 LineString, 2 Point" in marks(uri).notes[0]
    dot = '<Coordinate Order="0" X="5" Y="5"/>'
    path = tmp_path / "b.xml"
    path.write_text(
        "<ASAP_Annotations><Annotations>"
        f'<Annotation Type="Dot">{dot}</Annotation>'
        "</Annotations></ASAP_Annotations>"
    )
    with pytest.raises(SlideError, match=r"b\.xml: encloses no area.*\(1 Dot\)"):
        marks(str(path))
    path.write_text(path.read_text().replace("Dot", "Blob"))
    with pytest.raises(SlideError, match=r"b\.xml: .*'Blob'"):
        marks(str(path))


LINE = [[20, 30], [400, 300]]
FLAT = {
    "a line": {"type": "LineString", "coordinates": LINE},
    "counted points": {"type": "MultiPoint", "coordinates": LINE},
    "a polygon along a line": {"type": "Polygon", "coordinates": [[*LINE, LINE[0]]]},
    "a collection": {
        "type": "GeometryCollection",
        "geometries": [{"type": "Point", "coordinates": LINE[0]}],
    },
}


def xml(tmp_path: Path, text: str) -> str:
    path = tmp_path / "a.xml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("kind", FLAT)
@pytest.mark.parametrize("region", [False, True])
def test_geojson_that_marks_and_encloses_nothing_is_no_empty_one(
    kind: str, region: bool, tmp_path: Path
) -> None:
    """Where it says which part was looked at, too."""
    beside = [feature((0, 0, 500, 500), "Region*")] if region else []
    uri = geojson(tmp_path, *beside, {"type": "Feature", "geometry": FLAT[kind]})
    with pytest.raises(SlideError, match=r"a\.geojson: encloses no area.*\(1 \w+\)"):
        marks(uri)
    # Without the shape it is an empty one: nothing is there.
    assert marks(geojson(tmp_path, *beside)).areas == []
    nothing = {"type": "Polygon", "coordinates": []}
    assert marks(geojson(tmp_path, {"type": "Feature", "geometry": nothing})).notes


def test_xml_and_svg_that_mark_and_enclose_nothing_are_refused(tmp_path: Path) -> None:
    corners = '<Coordinate X="10" Y="40"/><Coordinate X="30" Y="10"/>'
    asap = "<ASAP_Annotations><Annotations>{}</Annotations></ASAP_Annotations>"
    scope = "<Annotations><Annotation><Regions>{}</Regions></Annotation></Annotations>"
    ends = '<Vertices><Vertex X="1" Y="2"/><Vertex X="90" Y="95"/></Vertices>'
    for text in (
        asap.format(f'<Annotation Type="PointSet">{corners}</Annotation>'),
        asap.format(f'<Annotation Type="Polygon">{corners}</Annotation>'),
        scope.format(f'<Region Type="4">{ends}</Region>'),
        scope.format(f'<Region Type="0">{ends}</Region>'),
    ):
        with pytest.raises(SlideError, match=r"a\.xml: encloses no area"):
            marks(xml(tmp_path, text))
    for text in (asap.format(""), scope.format(""), scope.format("<Region/>")):
        assert marks(xml(tmp_path, text)).areas == []
    for line in (
        '<line x1="9" y1="9" x2="300" y2="400" stroke="red"/>',
        '<polyline points="9,9 300,400 500,20" fill="none" stroke="red"/>',
    ):
        with pytest.raises(SlideError, match=r"a\.svg: encloses no area"):
            marks(svg(tmp_path, line))
    assert marks(svg(tmp_path, '<path d="" stroke="red"/>')).areas == []
    assert marks(svg(tmp_path, "")).areas == []


def test_asap_rectangles_may_have_two_corners(tmp_path: Path) -> None:
    corners = '<Coordinate X="10" Y="40"/><Coordinate X="30" Y="10"/>'
    path = tmp_path / "a.xml"
    path.write_text(
        "<ASAP_Annotations><Annotations>"
        f'<Annotation Type="Rectangle" PartOfGroup="tumour">{corners}</Annotation>'
        "</Annotations></ASAP_Annotations>"
    )
    assert only(marks(str(path)).areas).bounds == (10, 10, 30, 40)


def test_ellipses_are_read_as_other_programs_write_them(tmp_path: Path) -> None:
    def ellipse(*points: tuple[float, float]) -> str:
        vertices = "".join(f'<Vertex X="{x}" Y="{y}"/>' for x, y in points)
        path = tmp_path / "a.xml"
        path.write_text(
            '<Annotations><Annotation Name="tumour"><Regions><Region Type="2">'
            f"<Vertices>{vertices}</Vertices></Region></Regions></Annotation>"
            "</Annotations>"
        )
        return str(path)

    corners = [(100, 200), (300, 200), (300, 240), (100, 240)]
    middles = [(200, 200), (300, 220), (200, 240), (100, 220)]
    for points in (corners[::2], corners, [*corners, corners[0]], middles):
        found = only(marks(ellipse(*points)).areas)
        assert found.area == pytest.approx(math.pi * 100 * 20, rel=1e-3)
        assert found.bounds == pytest.approx((100, 200, 300, 240))
    turned = rotate(scale(Point(500, 500).buffer(1), 200, 50), 30)
    outline = list(turned.exterior.coords)
    assert only(marks(ellipse(*outline)).areas).area == pytest.approx(turned.area)
    box_around = rotate(box(300, 450, 700, 550), 30).exterior.coords[:4]
    with pytest.raises(SlideError, match=r"a\.xml: expected an ellipse by the corners"):
        marks(ellipse(*box_around))


def test_nothing_is_hidden_by_a_larger_outline_drawn_later(tmp_path: Path) -> None:
    nests = [feature((x, 20, x + 10, 30), "stroma") for x in (20, 40)]
    core = feature((22, 22, 25, 25), "tumour")
    large = feature((0, 0, 100, 100), "tumour")
    expected = [1000**2 - 10000, 10000 - 200 + 9, 200 - 9]
    assert drawn(geojson(tmp_path, large, *nests, core), TWO) == expected
    assert not marks(geojson(tmp_path, large, *nests, core), TWO).notes
    for order in ([*nests, core, large], [core, *nests, large], [core, large, *nests]):
        uri = geojson(tmp_path, *order)
        assert drawn(uri, TWO) == expected
        assert "of 4 outlines come before a larger one" in marks(uri, TWO).notes[0]


def test_outlines_that_only_overlap_keep_their_order(tmp_path: Path) -> None:
    small = feature((0, 0, 10, 10), "stroma")
    large = feature((5, 0, 30, 10), "tumour")
    uri = geojson(tmp_path, small, large)
    assert drawn(uri, TWO)[1:] == [250, 50]
    assert marks(uri, TWO).notes == ()
    assert drawn(geojson(tmp_path, large, small), TWO)[1:] == [200, 100]


def test_outlines_beside_the_slide_or_all_over_it_are_noted(tmp_path: Path) -> None:
    inside = feature((0, 0, 9, 9), "tumour")
    uri = geojson(tmp_path, inside, feature((2000, 0, 2009, 9), "tumour"))
    assert "1 of 2 areas lie outside the slide" in marks(uri).notes[0]
    uri = geojson(tmp_path, feature((0, 0, 1000, 995), "tumour"))
    assert "cover 100% of the slide" in marks(uri).notes[0]
    halves = (
        feature((0, 0, 500, 1000), "stroma"),
        feature((500, 0, 1000, 1000), "tumour"),
    )
    assert "cover 100% of the slide" in marks(geojson(tmp_path, *halves), TWO).notes[0]
    # Without a class it is no more than the slide's own border.
    uri = geojson(tmp_path, feature((0, 0, 1000, 1000)), feature((0, 0, 9, 9)))
    assert drawn(uri)[1] == 81
    assert "cover the whole slide; left out" in marks(uri).notes[0]
    assert marks(geojson(tmp_path, inside)).notes == ()


# --- slides of which the scanner filled a part ----------------------------------------


@pytest.mark.parametrize(
    ("properties", "far", "moved", "said"),
    [
        ({"objectType": "annotation"}, 0, (70, 40), "as in QuPath; moved by that"),
        ({}, 0, (0, 0), "its origin is in doubt"),
        (
            {"objectType": "annotation"},
            300,
            (0, 0),
            "lies mostly beyond the scanned part",
        ),
        ({}, 300, (0, 0), "reaches beyond the scanned part"),
    ],
)
def test_qupath_counts_from_the_corner_of_the_scanned_part(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    properties: dict[str, Any],
    far: int,
    moved: tuple[int, int],
    said: str,
) -> None:
    def bounds(slide: str, *, height: int, width: int) -> Rectangle | None:
        assert (height, width) == (1000, 1000)
        return Rectangle(40, 70, 200, 300) if slide == "part.mrxs" else None

    monkeypatch.setattr("medray.annotations.reading.scanned_bounds", bounds)
    uri = geojson(
        tmp_path, feature((10 + far, 20, 30 + far, 50), "tumour", **properties)
    )
    size = {"height": 1000, "width": 1000, "classes": ONE}
    found = read_marks(uri, **size, slide="part.mrxs")
    x, y = moved
    assert only(found.areas).bounds == (10 + far + x, 20 + y, 30 + far + x, 50 + y)
    assert said in found.notes[0]
    whole = read_marks(uri, **size, slide="whole.mrxs")
    assert only(whole.areas).bounds == (10 + far, 20, 30 + far, 50)
    assert whole.notes == ()


def test_the_scanned_part_is_asked_of_vendors_slides_only(tmp_path: Path) -> None:
    size = {"height": 9, "width": 9}
    assert scanned_bounds("", **size) is None
    assert scanned_bounds(str(tmp_path / "gone.tif"), **size) is None
    pytest.importorskip("openslide")
    with pytest.raises(SlideError, match=r"gone\.mrxs: is not there, and its bounds"):
        scanned_bounds(str(tmp_path / "gone.mrxs"), **size)
    (tmp_path / "damaged.mrxs").write_bytes(b"no slide")
    with pytest.raises(SlideError, match=r"damaged\.mrxs: its bounds cannot be read"):
        scanned_bounds(str(tmp_path / "damaged.mrxs"), **size)
