"""Learning from other models, against NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from medray.errors import ConfigError
from medray.training.distillation import (
    Hints,
    LastFeatures,
    consistency,
    divergence,
    rise,
)


def softmax(logits: np.ndarray) -> np.ndarray:
    each = np.exp(logits - logits.max(axis=1, keepdims=True))
    return each / each.sum(axis=1, keepdims=True)


def logits(seed: int) -> tuple[torch.Tensor, np.ndarray]:
    values = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    return values, values.numpy().astype(np.float64)


def test_divergence_is_kullback_leiblers_of_softened_classes() -> None:
    (ours, p), (theirs, q) = logits(1), logits(2)
    p, q = softmax(p / 3), softmax(q / 3)
    expected = 9 * (q * np.log(q / p)).sum(axis=1).mean()
    assert float(divergence(ours, theirs, 3.0)) == pytest.approx(expected, rel=1e-5)
    assert float(divergence(ours, ours, 3.0)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.6, 1.1])
def test_consistency_counts_sure_pixels_only(threshold: float) -> None:
    (ours, p), (theirs, q) = logits(3), logits(4)
    p, q = softmax(p), softmax(q)
    sure = q.max(axis=1) >= threshold
    distance = ((p - q) ** 2).mean(axis=1)
    expected = distance[sure].mean() if sure.any() else 0.0
    assert float(consistency(ours, theirs, threshold)) == pytest.approx(
        expected, rel=1e-5
    )


def test_the_weight_rises_to_one() -> None:
    assert rise(0, 10) == pytest.approx(np.exp(-5))
    assert rise(5, 10) == pytest.approx(np.exp(-5 / 4))
    assert rise(10, 10) == rise(99, 10) == rise(0, 0) == 1


def test_hints_compare_adapted_features_at_one_size() -> None:
    torch.manual_seed(0)
    hints = Hints(2, 3)
    ours, theirs = torch.randn(1, 2, 8, 8), torch.randn(1, 3, 4, 4)
    pooled = ours.numpy().reshape(1, 2, 4, 2, 4, 2).mean(axis=(3, 5))
    weight, bias = (p.detach().numpy() for p in hints.adapt.parameters())
    adapted = np.einsum("nchw,dc->ndhw", pooled, weight[:, :, 0, 0])
    adapted += bias[None, :, None, None]
    expected = ((adapted - theirs.numpy()) ** 2).mean()
    assert float(hints(ours, theirs).detach()) == pytest.approx(
        float(expected), rel=1e-5
    )


def test_a_network_that_takes_its_encoder_apart_has_no_features() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.encoder[0](x)

    network = Apart()
    features = LastFeatures(network)
    network(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ConfigError, match="teacher.features"):
        features.now()
