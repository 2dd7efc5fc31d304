"""GeoJSON, XML, and what all annotations have in common."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
from annotated import ONE, TWO, only, png, read, svg
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely.geometry import Point, box

from medray.annotations import Area, geojson_features, rasterise
from medray.errors import SlideError


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
