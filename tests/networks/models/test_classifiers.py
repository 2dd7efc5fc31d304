"""Classifiers of timm: self-attention next to the features, and heads."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from medray.errors import ConfigError
from medray.models.classifiers import SelfAttention, build_classifier
from medray.models.config import Architecture


def test_attention_is_what_its_formula_says() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(6, 4).double()
    maps = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    found = attention(maps).detach().numpy()
    weights = {
        name: (
            getattr(attention, name).weight.detach().numpy()[:, :, 0, 0],
            getattr(attention, name).bias.detach().numpy(),
        )
        for name in ("query", "key", "value")
    }
    for image, wanted in zip(maps.numpy(), found, strict=True):
        places = [image[:, y, x] for y in range(3) for x in range(5)]
        query, key, value = (
            [w @ place + b for place in places]
            for w, b in (weights[n] for n in ("query", "key", "value"))
        )
        for at, q in enumerate(query):
            share = np.exp([q @ k / np.sqrt(4) for k in key])
            share /= share.sum()
            expected = sum(s * v for s, v in zip(share, value, strict=True))
            np.testing.assert_allclose(wanted[:, at // 5, at % 5], expected)


def test_attention_stands_beside_the_features() -> None:
    torch.manual_seed(1)
    how = Architecture("classifier", "resnet10t", attention=8)
    model = build_classifier(how, 5).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        maps = model.encoder.forward_features(image)
        pooled = torch.cat([maps.mean((2, 3)), model.attention(maps).mean((2, 3))], 1)
        wanted = pooled @ model.head[-1].weight.T + model.head[-1].bias
        torch.testing.assert_close(model(image), wanted)
    with pytest.raises(ConfigError, match="no feature map"):
        build_classifier(replace(how, encoder="vit_tiny_patch16_224"), 5)


@pytest.mark.parametrize("attention", [0, 8])
@pytest.mark.parametrize("encoder", ["test_resnet", "mobilenetv3_small_050"])
def test_encoders_with_and_without_layers_before_their_classes(
    encoder: str, attention: int
) -> None:
    architecture = Architecture("classifier", encoder, attention=attention)
    model = build_classifier(architecture, 3).eval()
    with torch.inference_mode():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 3)
