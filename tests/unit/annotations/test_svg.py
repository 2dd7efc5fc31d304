"""Outlines in SVG."""

import math
from pathlib import Path
from random import Random

import numpy as np
import pytest
import shapely
from annotated import ONE, TWO, only, read, svg
from hypothesis import given, settings
from hypothesis import strategies as st
from shapely import affinity
from shapely.geometry import box

from medray.annotations.rasterize import rasterise
from medray.annotations.reading import read_marks
from medray.errors import SlideError


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


def marked(
    tmp_path: Path, body: str, head: str = 'viewBox="0 0 1000 1000"'
) -> tuple[float, str]:
    """The area that a drawing marks as the foreground, and the notes."""
    found = read_marks(svg(tmp_path, body, head), height=1000, width=1000, classes=ONE)
    areas = [a.polygon.area for a in found.areas if ONE.value(a.class_name)]
    return sum(areas), "; ".join(found.notes)


_SQUARE = '<rect x="50" y="50" width="100" height="100" fill="none" stroke="red"/>'


@pytest.mark.parametrize(
    "page",
    [
        '<rect width="100%" height="100%" fill="#eee"/>',
        '<rect x="-5" y="-5" width="1010" height="1010"/>',
        '<path style="fill:none;stroke:black" d="M0 0H1000V1000H0z"/>',
        '<polygon points="4,4 996,4 996,996 4,996"/>',
    ],
)
def test_a_rectangle_of_the_size_of_the_page_is_its_background(
    tmp_path: Path, page: str
) -> None:
    for body in (page + _SQUARE, _SQUARE + page):
        area, notes = marked(tmp_path, body)
        assert area == 10000
        assert "taken for its background; left out" in notes
    # The class of a layer is meant for what was drawn in it.
    area, notes = marked(tmp_path, f'<g id="tumour">{page}{_SQUARE}</g>')
    assert area == 10000
    # Alone it may be meant.
    area, notes = marked(tmp_path, page)
    assert area > 980_000
    assert "of the slide; is that meant?" in notes


def test_a_page_of_the_class_of_the_background_does_not_count(tmp_path: Path) -> None:
    page = '<rect id="Background" width="1000" height="1000"/>'
    for body in (page + _SQUARE, _SQUARE + page):
        found = read(svg(tmp_path, body))
        labels = rasterise(found, ONE, y=0, x=0, height=1000, width=1000)
        assert labels.sum() == 10000


@pytest.mark.parametrize(
    "hidden",
    [
        '<g visibility="hidden">{}</g>',
        '<g style="visibility:collapse">{}</g>',
        '<g opacity="0">{}</g>',
        '<g style="opacity:0.0"><g>{}</g></g>',
        '<style>.off{{visibility:hidden}}</style><g class="off">{}</g>',
        '<g fill="none" stroke="none">{}</g>',
        '<g fill="transparent">{}</g>',
        '<g fill-opacity="0">{}</g>',
        '<g fill="none" stroke="red" stroke-opacity="0">{}</g>',
        '<g fill="none" stroke="red" stroke-width="0">{}</g>',
        '<g fill="#ff000000">{}</g>',
    ],
)
def test_what_cannot_be_seen_is_left_out(tmp_path: Path, hidden: str) -> None:
    large = '<rect x="200" y="200" width="500" height="500"/>'
    area, notes = marked(tmp_path, _SQUARE + hidden.format(large))
    assert area == 10000
    assert "1 outlines of the drawing cannot be seen; left out" in notes
    with pytest.raises(SlideError, match=r"a\.svg: nothing in the drawing can be seen"):
        marked(tmp_path, hidden.format(large))


@pytest.mark.parametrize(
    "shown",
    [
        '<g visibility="hidden"><g visibility="visible">{}</g></g>',
        '<g opacity="0.2" fill-opacity=".01">{}</g>',
        '<g fill="url(#gradient)" stroke="none">{}</g>',
        '<g fill="none" stroke="currentColor">{}</g>',
        '<g fill="rgba(1,2,3,0.5)">{}</g>',
    ],
)
def test_what_can_be_seen_counts(tmp_path: Path, shown: str) -> None:
    large = '<rect x="200" y="200" width="500" height="500"/>'
    area, notes = marked(tmp_path, _SQUARE + shown.format(large))
    assert area == 260_000
    assert "cannot be seen" not in notes


@pytest.mark.parametrize("name", ["clip-path", "mask"])
@pytest.mark.parametrize("where", ['{}="url(#c)"', 'style="{}:url(#c)"', 'class="cut"'])
def test_what_is_cut_off_is_refused(tmp_path: Path, name: str, where: str) -> None:
    tag = {"clip-path": "clipPath"}.get(name, name)
    body = (
        f"<style>.cut{{{name}:url(#c)}}</style>"
        f'<defs><{tag} id="c"><rect width="90" height="90"/></{tag}></defs>'
        f"<g {where.format(name)}>{_SQUARE}</g>"
    )
    with pytest.raises(SlideError, match=rf"a\.svg: .*cut off by {name}.*release"):
        marked(tmp_path, body)


def test_a_clip_path_around_the_whole_page_cuts_nothing(tmp_path: Path) -> None:
    clip = (
        '<clipPath id="c"><rect x="10" y="20" width="500" height="500"/></clipPath>'
        f'<g clip-path="url(#c)">{_SQUARE}</g>'
    )
    assert marked(tmp_path, clip, 'viewBox="10 20 500 500"')[0] == 40000
    for head in ('viewBox="10 20 501 500"', 'viewBox="9 20 500 500"'):
        with pytest.raises(SlideError, match="clip-path"):
            marked(tmp_path, clip, head)
    moved = f'<g transform="translate(9 9)">{clip}</g>'
    with pytest.raises(SlideError, match="clip-path"):
        marked(tmp_path, moved, 'viewBox="10 20 500 500"')


def test_open_strokes_are_lines_unless_nearly_closed(tmp_path: Path) -> None:
    stroked = '<path d="{}" style="fill:none;stroke:black"/>'
    for line in ("M300 300 L600 300 L600 600", "M300 300 C 300 600 600 600 600 300"):
        area, notes = marked(tmp_path, _SQUARE + stroked.format(line))
        assert area == 10000
        assert "has shapes without an area (1 open line); left out" in notes
    nearly = "M300 300 H600 V600 H300 V310"
    assert marked(tmp_path, _SQUARE + stroked.format(nearly))[0] == 100_000
    filled = '<path d="M300 300 L600 300 L600 600" stroke="black" fill="red"/>'
    assert marked(tmp_path, _SQUARE + filled)[0] == 55_000


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_an_outline_drawn_twice_is_one(tmp_path: Path, order: tuple[int, ...]) -> None:
    rings = [
        f'<circle cx="500" cy="500" r="{radius}"/>' for radius in (200, 199, 198.5)
    ]
    area, notes = marked(tmp_path, "".join(rings[i] for i in order))
    assert area == pytest.approx(math.pi * 200**2, rel=1e-3)
    assert "2 of 3 outlines closely follow another" in notes
    hole = '<circle cx="500" cy="500" r="{}"/>'
    body = rings[0] + hole.format(100) + hole.format(99.5) + hole.format(50)
    area, notes = marked(tmp_path, body)
    assert area == pytest.approx(math.pi * (200**2 - 100**2 + 50**2), rel=1e-3)
    assert "1 of 4 outlines closely follow another" in notes


def test_a_stroke_turned_into_a_path_is_noted(tmp_path: Path) -> None:
    frame = '<path d="M0 0H200V200H0z M1 1V199H199V1z"/>'
    area, notes = marked(tmp_path, frame)
    assert area == 200**2 - 198**2
    assert "1 areas are but a thin frame around a hole" in notes
    ring = '<path d="M0 0H200V200H0z M9 9V191H191V9z"/>'
    assert "frame" not in marked(tmp_path, ring)[1]


def test_an_unknown_class_is_an_error_even_of_an_empty_outline(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="unknown class 'x'.*the first is the backgr"):
        marked(tmp_path, '<rect data-class="x" width="9"/>')
