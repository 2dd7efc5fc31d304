"""Depthwise convolutions have the gradients that torch's own have."""

import copy

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn

from medray.training.depthwise import QuickDepthwise, is_depthwise, quicken


def gradients(conv: nn.Module, inputs: torch.Tensor, low: bool) -> list[torch.Tensor]:
    pixels = inputs.clone().requires_grad_()
    conv.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        outputs = conv(pixels)
    (outputs.float() * torch.linspace(-1, 1, outputs.shape[-1])).sum().backward()
    return [outputs.detach().float(), pixels.grad, conv.weight.grad.clone()]


@pytest.mark.parametrize("kind", [nn.Conv2d, Conv2dSame])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("side", [13, 16])
def test_gradients_are_those_of_torch(kind, stride, kernel, side):
    torch.manual_seed(0)
    padding = 0 if kind is Conv2dSame else kernel // 2
    conv = kind(8, 8, kernel, stride, padding, groups=8, bias=False)
    quick = QuickDepthwise(copy.deepcopy(conv))
    inputs = torch.randn(3, 8, side, side).to(memory_format=torch.channels_last)
    expected = gradients(conv, inputs, low=False)
    for found, true in zip(gradients(quick, inputs, low=False), expected, strict=True):
        torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-4)
    for found, true in zip(gradients(quick, inputs, low=True), expected, strict=True):
        assert (found - true).abs().max() < 0.02 * true.abs().max()


def test_a_network_keeps_the_names_of_its_weights_and_what_it_predicts():
    network = timm.create_model("tf_efficientnet_lite0", num_classes=3).eval()
    inputs = torch.randn(1, 3, 64, 64)
    names, before = list(network.state_dict()), network(inputs)
    assert sum(is_depthwise(part) for part in network.modules()) == 16
    quicken(network)
    assert list(network.state_dict()) == names
    assert not any(is_depthwise(part) for part in network.modules())
    torch.testing.assert_close(network(inputs), before)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 16, 3, groups=8, bias=False),
        nn.Conv2d(8, 8, 3, groups=4, bias=False),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 8, 3, groups=8, bias=False, dilation=2),
        nn.Conv2d(8, 8, (3, 5), groups=8, bias=False),
        nn.Conv2d(8, 8, 3, groups=8, bias=False, padding="same"),
        nn.Conv2d(8, 8, 3, groups=8, bias=False, padding=1, padding_mode="reflect"),
    ],
)
def test_other_convolutions_are_left_alone(conv):
    assert not is_depthwise(conv)
