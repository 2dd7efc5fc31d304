"""Outlines become labels."""

import math
from itertools import pairwise

import numpy as np
import shapely
from annotated import ONE, TWO
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from rasterio import features
from rasterio.transform import Affine
from shapely.geometry import MultiPolygon, Point, Polygon, box

from medray.annotations.polygons import Area, FillRule, fill
from medray.annotations.rasterize import rasterise

halves = st.integers(-20, 6020).map(lambda n: n / 2)
# Of edges that are shorter than a float can be squared GEOS warns.
reals = st.floats(-9, 3000).map(lambda value: round(value, 9))

polygons = st.lists(
    st.lists(st.tuples(halves, halves) | st.tuples(reals, reals),
             min_size=3, max_size=7),
    max_size=5,
).map(lambda rings: [Area(fill([np.array(ring)]), None) for ring in rings])  # fmt: skip


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
@example([(0, 0), (0, 1), (1, 0), (2.225e-308, 4)], 1.0)
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
    with np.errstate(divide="ignore", invalid="ignore"):  # edges of nearly no length
        distance = shapely.distance(polygon.boundary, shapely.points(columns, rows))
    sure = distance > 1e-6
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
