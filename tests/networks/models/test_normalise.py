"""What makes a model's input of pixels."""

import hypothesis.extra.numpy as arrays
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from medray.classes import Classes
from medray.geometry import Windows
from medray.models.config import Architecture, ModelConfig
from medray.models.network import Normalise

CONFIG = ModelConfig(
    architecture=Architecture(),
    classes=Classes(("background", "nucleus")),
    window=Windows(64, 48),
    mpp=None,
    zscore=True,
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)
BATCHES = arrays.arrays(
    np.uint8, st.tuples(st.integers(1, 3), st.just(3), *[st.integers(1, 24)] * 2)
)


@given(BATCHES)
def test_zscore_is_by_mean_and_deviation_of_each_channel(batch: np.ndarray) -> None:
    found = Normalise(CONFIG)(torch.from_numpy(batch.copy())).numpy()
    pixels = batch.astype(np.float64)
    mean = pixels.mean(axis=(2, 3), keepdims=True)
    deviation = pixels.std(axis=(2, 3), keepdims=True)
    wanted = (pixels - mean) / (deviation + 10)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@given(BATCHES)
def test_zscore_of_a_window_does_not_depend_on_its_batch(batch: np.ndarray) -> None:
    normalise = Normalise(CONFIG)
    together = normalise(torch.from_numpy(batch.copy()))
    for k in range(len(batch)):
        alone = normalise(torch.from_numpy(batch[k : k + 1].copy()))
        assert torch.equal(together[k : k + 1], alone)


def test_zscore_brings_two_stainings_together_and_leaves_glass_pale() -> None:
    rng = np.random.default_rng(3)
    tissue = rng.integers(40, 200, (1, 3, 64, 64), np.uint8)
    paler = (255 - 0.6 * (255 - tissue.astype(float))).round().astype(np.uint8)
    normalise = Normalise(CONFIG)
    one, other = (normalise(torch.from_numpy(image)) for image in (tissue, paler))
    assert float((one - other).abs().mean()) < 0.1
    unscaled = np.abs(tissue.astype(float) - paler).mean() / tissue.std()
    assert unscaled > 1
    glass = rng.integers(242, 245, (1, 3, 64, 64), np.uint8)
    assert float(normalise(torch.from_numpy(glass)).abs().max()) < 0.2
