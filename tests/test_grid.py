import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medray.grid import (
    Rectangle,
    Windows,
    plan_regions,
    region_windows,
    window_starts,
    window_weights,
)

lengths = st.integers(1, 700)
sizes = st.integers(8, 200)


@st.composite
def windows(draw: st.DrawFn) -> Windows:
    size = draw(st.integers(1, 160))
    return Windows(size, draw(st.integers(1, size)))


@given(lengths, windows())
def test_windows_cover_the_axis_and_stay_inside(length: int, windows: Windows) -> None:
    starts = window_starts(length, windows)
    covered = np.zeros(max(length, windows.size), bool)
    for start in starts:
        assert start >= 0
        covered[start : start + windows.size] = True
    assert covered[:length].all()
    assert starts[-1] + windows.size <= max(length, windows.size)
    assert (np.diff(starts) <= windows.stride).all()


@given(lengths, windows())
def test_weights_sum_to_one_at_every_pixel(length: int, windows: Windows) -> None:
    total = np.zeros(max(length, windows.size))
    weights = window_weights(length, windows)
    assert (weights > 0).all()
    for start, row in zip(window_starts(length, windows), weights, strict=True):
        total[start : start + windows.size] += row
    np.testing.assert_allclose(total, 1, atol=1e-5)


def test_a_2048_slide_needs_25_windows() -> None:
    assert len(window_starts(2048, Windows(512, 384))) == 5


@given(st.integers(1, 300), st.integers(1, 300), sizes)
def test_regions_partition_the_slide(height: int, width: int, size: int) -> None:
    count = np.zeros((height, width), int)
    for region in plan_regions(height, width, size):
        count[region.slices()] += 1
    assert (count == 1).all()


@given(st.integers(1, 300), st.integers(1, 300), sizes, windows())
def test_a_region_gets_exactly_the_windows_that_touch_it(
    height: int, width: int, size: int, windows: Windows
) -> None:
    ys, xs = window_starts(height, windows), window_starts(width, windows)
    for region in plan_regions(height, width, size):
        plan = region_windows(region, height, width, windows)
        touching = [
            i
            for i, y in enumerate(ys)
            if y < region.bottom and y + windows.size > region.y
        ]
        assert list(range(*plan.rows)) == touching
        touching = [
            i
            for i, x in enumerate(xs)
            if x < region.right and x + windows.size > region.x
        ]
        assert list(range(*plan.columns)) == touching
        assert plan.halo.y == ys[plan.rows[0]]
        assert plan.halo.right == xs[plan.columns[1] - 1] + windows.size


def test_slices_can_be_relative() -> None:
    assert Rectangle(5, 7, 2, 3).slices(origin=Rectangle(4, 4, 9, 9)) == (
        slice(1, 3),
        slice(3, 6),
    )


@pytest.mark.parametrize("stride", [0, 513])
def test_a_stride_that_leaves_gaps_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="stride"):
        Windows(512, stride)
