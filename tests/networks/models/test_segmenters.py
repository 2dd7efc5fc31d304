"""The segmenters' own parts against computations that share no code with them."""

import numpy as np
import pytest
import torch
from torch import nn

from medray.errors import ConfigError
from medray.models.config import Architecture
from medray.models.fcn import Fcn8s
from medray.models.highres import AttentionGate, HighresUnet
from medray.models.segmenters import build_segmenter


def transposed(
    x: np.ndarray, layer: nn.ConvTranspose2d, stride: int, padding: int
) -> np.ndarray:
    """A transposed convolution by its definition: each pixel stamps the kernel."""
    weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))  # type: ignore[union-attr]
    _, h, w = x.shape
    side = weight.shape[2]
    size = (weight.shape[1], stride * (h - 1) + side, stride * (w - 1) + side)
    out = np.zeros(size)
    for i in range(h):
        for j in range(w):
            stamp = np.einsum("c,cdyx->dyx", x[:, i, j], weight)
            y, left = stride * i, stride * j
            out[:, y : y + side, left : left + side] += stamp
    cut = slice(padding, -padding)
    return out[:, cut, cut] + bias[:, None, None]


def test_fcn8s_adds_its_scores_and_upsamples_them() -> None:
    torch.manual_seed(0)
    model = Fcn8s(3).eval()
    for name, parameter in model.named_parameters():
        if name.startswith(("score", "up")) and parameter.ndim == 1:
            nn.init.normal_(parameter)  # else they would be zero
    pools: list[torch.Tensor] = []
    for layer in model.encoder:
        if isinstance(layer, nn.MaxPool2d):
            layer.register_forward_hook(lambda _, __, out: pools.append(out))
    image = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        found = model(image)[0].numpy()
    assert [64 // pool.shape[2] for pool in pools] == [2, 4, 8, 16, 32]

    def score(pool: torch.Tensor, layer: nn.Conv2d) -> np.ndarray:
        weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))  # type: ignore[union-attr]
        scored = np.einsum("chw,dc->dhw", pool[0].numpy(), weight[:, :, 0, 0])
        return scored + bias[:, None, None]

    eighth, sixteenth, last = pools[2:]
    total = transposed(score(last, model.score32), model.up32, 2, 1)
    total = transposed(total + score(sixteenth, model.score16), model.up16, 2, 1)
    expected = transposed(total + score(eighth, model.score8), model.up8, 8, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_fcn8s_starts_as_xavier_says() -> None:
    torch.manual_seed(0)
    layer = Fcn8s(16).up8
    bound = np.sqrt(6 / (2 * 16 * 16 * 16))  # fans: 16 channels of a 16 x 16 kernel
    largest = float(layer.weight.detach().abs().max())
    assert 0.95 * bound < largest <= bound
    assert float(layer.weight.detach().mean().abs()) < bound / 50


def test_a_gate_weighs_as_its_equation_says() -> None:
    torch.manual_seed(1)
    gate = AttentionGate(skip=6, gate=10)
    skip, coarse = torch.randn(1, 6, 4, 5), torch.randn(1, 10, 4, 5)
    with torch.inference_mode():
        found = gate(skip, coarse).numpy()[0]
    w = {name: p.detach().numpy() for name, p in gate.named_parameters()}
    for y in range(4):
        for x in range(5):
            s, g = skip[0, :, y, x].numpy(), coarse[0, :, y, x].numpy()
            seen = w["of_skip.weight"][:, :, 0, 0] @ s
            seen += w["of_gate.weight"][:, :, 0, 0] @ g + w["of_gate.bias"]
            seen = np.maximum(seen, 0)
            alpha = w["psi.weight"][0, :, 0, 0] @ seen + w["psi.bias"][0]
            alpha = 1 / (1 + np.exp(-alpha))
            np.testing.assert_allclose(found[:, y, x], s * alpha, rtol=1e-4, atol=1e-6)


def test_aspp_sees_its_rates_and_the_whole_field() -> None:
    aspp = HighresUnet("tu-mobilenetv3_small_050", 2).eval().aspp
    inputs = aspp.convs[0][0].in_channels  # type: ignore[index]
    field = torch.zeros(1, inputs, 41, 41, requires_grad=True)

    def seen(whole: bool) -> np.ndarray:
        with torch.no_grad():
            for layer in aspp.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.fill_(1e-3)
            if not whole:
                aspp.convs[4][1].weight.zero_()  # type: ignore[index,union-attr]
        (grad,) = torch.autograd.grad(aspp(field + 1)[0, :, 20, 20].sum(), field)
        return (grad[0].abs().sum(0) > 0).numpy()

    expected = np.zeros((41, 41), bool)
    for rate in (0, 6, 12, 18):
        for dy in (-rate, 0, rate):
            for dx in (-rate, 0, rate):
                expected[20 + dy, 20 + dx] = True
    np.testing.assert_array_equal(seen(whole=False), expected)
    assert seen(whole=True).all()


@pytest.mark.parametrize(
    ("name", "encoder"),
    [
        ("fcn8s", "vgg16"),
        ("highres_unet", "tu-mobilenetv3_small_050"),
        ("unet", "resnet18"),
        ("deeplabv3plus", "resnet18"),
        ("segformer", "resnet18"),
        ("upernet", "resnet18"),
    ],
)
def test_every_segmenter_learns_a_field_by_heart(name: str, encoder: str) -> None:
    torch.manual_seed(0)
    model = build_segmenter(Architecture(name, encoder), 2)
    truth = torch.zeros(2, 64, 64, dtype=torch.long)
    truth[0, :32], truth[1, :, 32:] = 1, 1
    images = torch.randn(2, 3, 64, 64) + 2 * truth[:, None]
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        logits = model(images)
        assert logits.shape == (2, 2, 64, 64)
        loss = nn.functional.cross_entropy(logits, truth)
        optimizer.zero_grad()
        loss.backward()
        assert all(
            p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters()
        )
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("name", "encoder", "message"),
    [
        ("fcn8s", "resnet18", "fcn8s.*resnet18.*set encoder: vgg16"),
        ("highres_unet", "nonsense", "highres_unet.*nonsense"),
        ("nonsense", "resnet18", "nonsense"),
    ],
)
def test_unknown_networks_are_refused(name: str, encoder: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_segmenter(Architecture(name, encoder), 2)
