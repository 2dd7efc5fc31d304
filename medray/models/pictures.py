"""Pictures of what a network has learned: its first kernels and FCN-8s' score maps."""

from __future__ import annotations

import torch
import torchvision
from torch import nn

from medray.models.fcn import Fcn8s
from medray.types import UInt8


def first_kernels(network: nn.Module) -> UInt8 | None:
    """Draw the kernels of the first convolution of RGB, each stretched to 0..255.

    Returns:
        (H, W, 3), 8 kernels per row; None if there is no such convolution.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.in_channels == 3:
            kernels = layer.weight.detach().float().cpu()
            grid = torchvision.utils.make_grid(
                kernels, nrow=8, normalize=True, scale_each=True, pad_value=1.0
            )
            large = torch.nn.functional.interpolate(grid[None], scale_factor=8.0)[0]
            return _as_pixels(large)
    return None


@torch.inference_mode()
def score_maps(network: nn.Module, inputs: torch.Tensor) -> dict[str, UInt8]:
    """Draw the output of FCN-8s' score layers for one image, one map per class.

    Args:
        network: Others than FCN-8s have none.
        inputs: (1, 3, H, W), normalised.

    Returns:
        (H, W, 3) by name: score8, score16, score32, side by side for the classes and
        each enlarged to the size of `inputs`.
    """
    if not isinstance(network, Fcn8s):
        return {}
    maps: dict[str, UInt8] = {}
    seen: dict[str, torch.Tensor] = {}
    layers = {name: getattr(network, name) for name in ("score8", "score16", "score32")}
    hooks = [
        layer.register_forward_hook(
            lambda _, __, output, name=name: seen.__setitem__(name, output)
        )
        for name, layer in layers.items()
    ]
    network(inputs)
    for hook in hooks:
        hook.remove()
    for name, scores in seen.items():
        each = torch.nn.functional.interpolate(
            scores.float().movedim(1, 0), size=inputs.shape[2:]
        )
        grid = torchvision.utils.make_grid(
            each, normalize=True, scale_each=True, pad_value=1.0
        )
        maps[name] = _as_pixels(grid)
    return maps


def _as_pixels(image: torch.Tensor) -> UInt8:
    pixels: UInt8 = image.mul(255).round().to(torch.uint8).movedim(0, 2).cpu().numpy()
    return pixels
