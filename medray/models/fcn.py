"""FCN-8s (Long, Shelhamer and Darrell 2015, https://arxiv.org/abs/1411.4038)."""

from __future__ import annotations

import torch
import torchvision
from torch import nn

_POOL3, _POOL4, _POOL5 = 17, 24, 31
"""Where VGG16's stages end in torchvision's `features`: strides 8, 16 and 32."""


class Fcn8s(nn.Module):
    """VGG16 with 1x1 score layers at strides 8, 16 and 32, added up and upsampled.

    score32 is upsampled by 2 and added to score16, that again by 2 and added to score8,
    and the sum by 8, all by transposed convolutions that are learned.

    Unlike the paper's, whose two layers of 4096 units between stride 32 and its score
    hold 119 of 134 million weights and see 7 x 7 cells at once, the score at stride 32
    is taken from the last pooling itself. Their start is Xavier's (Glorot and Bengio
    2010), not bilinear.
    """

    def __init__(self, classes: int) -> None:
        """Start from random weights."""
        super().__init__()
        self.encoder = torchvision.models.vgg16(weights=None).features
        self.score8 = nn.Conv2d(256, classes, 1)
        self.score16 = nn.Conv2d(512, classes, 1)
        self.score32 = nn.Conv2d(512, classes, 1)
        self.up32 = nn.ConvTranspose2d(classes, classes, 4, stride=2, padding=1)
        self.up16 = nn.ConvTranspose2d(classes, classes, 4, stride=2, padding=1)
        self.up8 = nn.ConvTranspose2d(classes, classes, 16, stride=8, padding=4)
        for name, weights in self.named_parameters():
            if name.startswith(("score", "up")):
                start = nn.init.xavier_uniform_ if weights.ndim > 1 else nn.init.zeros_
                start(weights)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (N, 3, H, W) to (N, classes, H, W) logits; H and W multiples of 32."""
        pool3 = self.encoder[:_POOL3](images)
        pool4 = self.encoder[_POOL3:_POOL4](pool3)
        pool5 = self.encoder[_POOL4:_POOL5](pool4)
        scores = self.up32(self.score32(pool5)) + self.score16(pool4)
        scores = self.up16(scores) + self.score8(pool3)
        logits: torch.Tensor = self.up8(scores)
        return logits
