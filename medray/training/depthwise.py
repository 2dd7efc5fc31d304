"""Depthwise convolutions whose gradients are quick in bfloat16 on a CPU.

oneDNN has no vector code there for the gradient of the inputs of a stride of 2, nor for
that of 5x5 kernels: of EfficientNet-Lite0 these few layers took most of a step. The
first is a convolution as well, of the gradient spread out with zeros; the second is
quick in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import nn
from torch.nn import functional

_SLOW_KERNEL = 5  # of this side or more: gradient of the kernel in float32


class _Depthwise(torch.autograd.Function):
    """A convolution of each channel by itself, of square kernel, stride and padding."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, weight: torch.Tensor, stride: int, padding: int
    ) -> torch.Tensor:
        """Return the convolution (N, C, H', W') of (N, C, H, W) and (C, 1, K, K)."""
        ctx.save_for_backward(inputs, weight)
        ctx.stride, ctx.padding = stride, padding
        channels = len(weight)
        return functional.conv2d(inputs, weight, None, stride, padding, 1, channels)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of inputs and weight."""
        inputs, weight = ctx.saved_tensors
        (grad,) = grads
        grad = grad.contiguous(memory_format=torch.channels_last)
        of_inputs = of_weight = None
        if ctx.needs_input_grad[0]:
            of_inputs = _of_inputs(grad, inputs, weight, ctx.stride, ctx.padding)
        if ctx.needs_input_grad[1]:
            parts = (grad, inputs, weight)
            if weight.shape[-1] >= _SLOW_KERNEL:
                parts = (grad.float(), inputs.float(), weight.float())
            stride, padding = [ctx.stride] * 2, [ctx.padding] * 2
            found = torch.ops.aten.convolution_backward(
                *(*parts, None, stride, padding, [1, 1], False, [0, 0], len(weight)),
                [False, True, False],
            )
            of_weight = found[1].to(weight.dtype)
        return of_inputs, of_weight, None, None


def _of_inputs(
    grad: torch.Tensor,
    inputs: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    padding: int,
) -> torch.Tensor:
    """Return the gradient of the inputs: a convolution with the mirrored kernel."""
    channels, side = len(weight), weight.shape[-1]
    if stride > 1:
        size = [length + 2 * padding - side + 1 for length in inputs.shape[2:]]
        spread = grad.new_zeros(len(grad), channels, *size)
        spread = spread.contiguous(memory_format=torch.channels_last)
        spread[:, :, ::stride, ::stride] = grad
        grad = spread
    mirrored = weight.flip(2, 3)
    reach = side - 1 - padding
    return functional.conv2d(grad, mirrored, None, 1, reach, 1, channels)


class QuickDepthwise(nn.Module):
    """Does what a depthwise convolution does, with its very weight."""

    def __init__(self, conv: nn.Conv2d) -> None:
        """Take the place of a convolution that `is_depthwise`."""
        super().__init__()
        self.weight = conv.weight
        self.stride, self.padding = conv.stride[0], int(conv.padding[0])
        self.same = isinstance(conv, Conv2dSame)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to (N, C, H', W')."""
        weight, padding = self.weight, self.padding
        if torch.is_autocast_enabled("cpu"):  # which does not look into functions
            dtype = torch.get_autocast_dtype("cpu")
            inputs, weight = inputs.to(dtype), weight.to(dtype)
        if self.same:  # TensorFlow's padding, which depends on the inputs' size
            side, padding = weight.shape[2:], 0
            inputs = pad_same(inputs, list(side), [self.stride] * 2)
        found: torch.Tensor = _Depthwise.apply(inputs, weight, self.stride, padding)
        return found


def is_depthwise(module: nn.Module) -> bool:
    """Return whether `QuickDepthwise` can stand for a module."""
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
        and module.bias is None
        and module.padding_mode == "zeros"
        and module.dilation == (1, 1)
        and not isinstance(module.padding, str)
        and all(
            len(set(pair)) == 1
            for pair in (module.kernel_size, module.stride, module.padding)
        )
        and module.padding[0] < module.kernel_size[0]
    )


def quicken(network: nn.Module) -> nn.Module:
    """Replace the depthwise convolutions of a network, which keeps its weights' names.

    For training in bfloat16 on a CPU only: in float32 oneDNN's own gradients are good.
    """
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if is_depthwise(child):
                assert isinstance(child, nn.Conv2d)
                setattr(parent, name, QuickDepthwise(child))
    return network
