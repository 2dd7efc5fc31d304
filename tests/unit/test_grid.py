import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medray.geometry import (
    Rectangle,
    Stitch,
    Windows,
    plan_regions,
    region_side,
    region_windows,
    window_cores,
    window_reach,
    window_starts,
    window_weights,
    windows_over,
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
    assert len(starts) <= max(1, -(-length // windows.stride))


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


@given(lengths, windows())
def test_cores_partition_the_axis_and_keep_their_margin(
    length: int, windows: Windows
) -> None:
    starts, cores = window_starts(length, windows), window_cores(length, windows)
    assert (cores[0], cores[-1]) == (0, length)
    assert (np.diff(cores) > 0).all()
    for i, start in enumerate(starts):
        first = start + (windows.margin if i else 0)
        last = i == len(starts) - 1
        end = start + windows.size - (0 if last else windows.margin)
        assert first <= cores[i]
        assert cores[i + 1] <= end


@given(st.integers(1, 40), st.integers(2, 6), st.integers(1, 3))
def test_regions_of_whole_strides_share_no_window(
    stride: int, factor: int, regions: int
) -> None:
    windows, side = Windows(2 * stride, stride), factor * stride
    length = 8 * stride + regions * side + 1
    counts = np.zeros(len(window_starts(length, windows)), int)
    for region in plan_regions(length, 1, side):
        plan = region_windows(region, length, 1, windows)
        counts[slice(*plan.rows)] += 1
    # Only the last, which may be a little longer, can reach into one more region.
    assert (counts[:-1] == 1).all()


@given(
    st.integers(1, 300),
    st.integers(1, 300),
    sizes,
    windows(),
    st.sampled_from(["crop", "blend"]),
)
def test_a_region_gets_exactly_the_windows_that_decide_it(
    height: int, width: int, size: int, windows: Windows, stitch: Stitch
) -> None:
    ys = list(zip(*window_reach(height, windows, stitch), strict=True))
    xs = list(zip(*window_reach(width, windows, stitch), strict=True))
    tops, lefts = window_starts(height, windows), window_starts(width, windows)
    for region in plan_regions(height, width, size):
        plan = region_windows(region, height, width, windows, stitch)
        needed = [
            i for i, (a, b) in enumerate(ys) if a < region.bottom and b > region.y
        ]
        assert list(range(*plan.rows)) == needed
        needed = [i for i, (a, b) in enumerate(xs) if a < region.right and b > region.x]
        assert list(range(*plan.columns)) == needed
        assert plan.halo.y == tops[plan.rows[0]]
        assert plan.halo.right == lefts[plan.columns[1] - 1] + windows.size


@given(
    st.integers(1, 200),
    st.integers(1, 200),
    windows(),
    st.sampled_from(["crop", "blend"]),
    st.integers(0, 99),
)
def test_windows_over_blocks_are_those_that_decide_a_pixel_of_them(
    height: int, width: int, windows: Windows, stitch: Stitch, seed: int
) -> None:
    side = 32
    rng = np.random.default_rng(seed)
    for region in plan_regions(height, width, 3 * side):
        shape = (-(-region.height // side), -(-region.width // side))
        blocks = rng.random(shape) < 0.4
        plan = region_windows(region, height, width, windows, stitch)
        wanted = windows_over(plan, height, width, windows, stitch, blocks, side)
        pixels = np.zeros((height, width), bool)
        marked = np.kron(blocks, np.ones((side, side), bool))
        pixels[region.slices()] = marked[: region.height, : region.width]
        tops, bottoms = window_reach(height, windows, stitch)
        lefts, rights = window_reach(width, windows, stitch)
        for i, row in enumerate(range(*plan.rows)):
            for j, column in enumerate(range(*plan.columns)):
                part = pixels[tops[row] : bottoms[row], lefts[column] : rights[column]]
                # A window may reach a block that the slide's end cuts off.
                assert wanted[i, j] or not part.any()
        assert not wanted.any() or blocks.any()


@pytest.mark.parametrize("stride", [384, 448, 512, 192, 96, 333])
def test_a_region_suits_its_windows(stride: int) -> None:
    side = region_side(Windows(512, stride), 512)
    assert side % 512 == 0
    assert 1024 <= side <= 6144
    assert side % stride == 0 or stride in (333,)


def test_slices_can_be_relative() -> None:
    assert Rectangle(5, 7, 2, 3).slices(origin=Rectangle(4, 4, 9, 9)) == (
        slice(1, 3),
        slice(3, 6),
    )


@pytest.mark.parametrize("stride", [0, 513])
def test_a_stride_that_leaves_gaps_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match="stride"):
        Windows(512, stride)
