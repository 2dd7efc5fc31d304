"""Boundary refinement by a conditional random field over a small neighbourhood.

Mean-field inference of the fully connected CRF of Krähenbühl and Koltun (NeurIPS 2011),
its pairwise term truncated to a small window as in ConvCRF (Teichmann and Cipolla,
BMVC 2019): neighbours of like colour pull each other to one class. Memory and time are
bounded by the window and the iterations, and it runs on the device that holds the
scores.
"""

from __future__ import annotations

import torch
from torch.nn import functional

# Reach in pixels, and widths in pixels and in grey values of the appearance kernel.
_REACH = 4
_SPACE = 3.0
_COLOUR = 15.0
_STRENGTH = 3.0


def refine(scores: torch.Tensor, pixels: torch.Tensor, iterations: int) -> torch.Tensor:
    """Refine class probabilities along the edges of the picture.

    Args:
        scores: (N, C, H, W) float32 probabilities.
        pixels: (N, H, W, 3) uint8 RGB.
        iterations: Of mean-field inference; 5 are usual.

    Returns:
        (N, C, H, W) float32 probabilities.
    """
    colours = pixels.permute(0, 3, 1, 2).to(torch.float32).contiguous()
    padded = functional.pad(colours, [_REACH] * 4, mode="reflect")
    unary = torch.log(scores.clamp_min(1e-6))
    current = scores
    for _ in range(iterations):
        message = torch.zeros_like(scores)
        total = torch.zeros_like(scores[:, :1])
        around = functional.pad(current, [_REACH] * 4, mode="reflect")
        for dy in range(-_REACH, _REACH + 1):
            for dx in range(-_REACH, _REACH + 1):
                if dy == dx == 0:
                    continue
                place = (
                    slice(_REACH + dy, _REACH + dy + scores.shape[2]),
                    slice(_REACH + dx, _REACH + dx + scores.shape[3]),
                )
                distance = (padded[..., *place] - colours).square_().sum(1, True)
                distance = distance / (2 * _COLOUR**2)
                distance = distance + (dy * dy + dx * dx) / (2 * _SPACE**2)
                weight = torch.exp(-distance)
                message.addcmul_(around[..., *place], weight)
                total.add_(weight)
        pull = _STRENGTH * message / total.clamp_min(1e-6)
        current = torch.softmax(unary + pull, dim=1)
    return current
