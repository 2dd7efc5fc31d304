"""Cleaning a mask, whole and in parts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import noise

from medray.geometry import plan_regions
from medray.inference.postprocess import Cleaning, clean_labels


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 120),
    width=st.integers(1, 120),
    side=st.integers(8, 80),
    smooth=st.integers(0, 3),
    holes=st.integers(0, 30),
    smallest=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_parts_give_the_whole(
    height: int,
    width: int,
    side: int,
    smooth: int,
    holes: int,
    smallest: int,
    seed: int,
) -> None:
    labels = noise(height, width, seed)
    how = Cleaning(smooth=smooth, holes=holes, smallest=smallest)
    whole = clean_labels(labels, how, 3)
    for part in plan_regions(height, width, side):
        y0, x0 = max(0, part.y - how.reach), max(0, part.x - how.reach)
        around = labels[y0 : part.bottom + how.reach, x0 : part.right + how.reach]
        cleaned = clean_labels(around, how, 3)
        inside = part.slices()
        moved = tuple(
            slice(s.start - o, s.stop - o)
            for s, o in zip(inside, (y0, x0), strict=True)
        )
        np.testing.assert_array_equal(cleaned[moved], whole[inside])


def test_small_patches_go_to_what_surrounds_them() -> None:
    labels = np.zeros((40, 40), np.uint8)
    labels[5:25, 5:25] = 1
    labels[10:12, 10:12] = 0  # a hole of 4
    labels[15:17, 15:17] = 2  # another class inside
    labels[30, 30:33] = 1  # a speck of 3 on the glass
    cleaned = clean_labels(labels, Cleaning(holes=5, smallest=5), 3)
    expected = np.zeros((40, 40), np.uint8)
    expected[5:25, 5:25] = 1
    np.testing.assert_array_equal(cleaned, expected)
    kept = clean_labels(labels, Cleaning(holes=4, smallest=3), 3)
    np.testing.assert_array_equal(kept, labels)


def test_smoothing_takes_the_commonest_class() -> None:
    labels = noise(60, 50, 3)
    smooth = clean_labels(labels, Cleaning(smooth=2), 3)
    for y, x in ((0, 0), (30, 20), (59, 49)):
        square = labels[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3]
        counts = np.bincount(square.ravel(), minlength=3)
        assert counts[smooth[y, x]] == counts.max()


def test_ranges_are_checked() -> None:
    with pytest.raises(ValueError, match="smallest lies in"):
        Cleaning(smallest=10**6)


def test_cupy_gives_the_same() -> None:
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    if not cupy.is_available():
        pytest.skip("no GPU")
    labels = noise(300, 200, 5)
    how = Cleaning(smooth=2, holes=20, smallest=40)
    on_gpu = cupy.asnumpy(clean_labels(cupy.asarray(labels), how, 3))
    np.testing.assert_array_equal(on_gpu, clean_labels(labels, how, 3))
