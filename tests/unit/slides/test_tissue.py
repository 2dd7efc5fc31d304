"""Tissue is distinguished from glass by saturation, however much of it there is."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from skimage.filters import threshold_otsu

from medray.slides.tissue import find_tissue


def field(side: int, saturation: int, share: float) -> np.ndarray:
    """Glass, and to its left tissue of so much saturation, with some noise."""
    rng = np.random.default_rng(0)
    rgb = np.full((side, side, 3), 240, np.int16)
    rgb[:, : round(side * share), 1] -= saturation
    rgb += rng.integers(-3, 4, rgb.shape)
    return rgb.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("side", [64, 200, 1024])
@pytest.mark.parametrize("saturation", [30, 45, 90])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_pale_tissue_is_found_on_thumbnails_of_any_size(
    side: int, saturation: int, share: float
) -> None:
    """Sums of a million pixels' saturations, squared, are beyond 64 bits."""
    border = round(side * share)
    found = find_tissue(field(side, saturation, share))
    assert found[4:-4, 4 : border - 3].all()
    assert not found[:, border + 3 :].any()


@pytest.mark.parametrize(("value", "found"), [(0, False), (244, False)])
def test_a_blank_field_has_none(value: int, found: bool) -> None:
    rgb = np.full((300, 200, 3), value, np.uint8)
    assert find_tissue(rgb).any() == found


@given(
    arrays.arrays(np.int64, 40, elements=st.integers(0, 10**7)).filter(
        lambda counts: (counts > 0).sum() > 1
    )
)
def test_the_threshold_is_otsus(counts: np.ndarray) -> None:
    """By his definition, in whole numbers of any size: the classes' means far apart."""
    whole = [int(n) for n in counts]
    total, weighed = sum(whole), sum(i * n for i, n in enumerate(whole))

    def between(threshold: int) -> float:
        below = sum(whole[: threshold + 1])
        mean = sum(i * n for i, n in enumerate(whole[: threshold + 1]))
        if not 0 < below < total:
            return 0.0
        return (weighed * below - mean * total) ** 2 / (below * (total - below))

    best = max(map(between, range(len(whole))))
    # In floating point two thresholds may be as good as each other.
    assert between(int(threshold_otsu(hist=counts))) == pytest.approx(best, rel=1e-6)
