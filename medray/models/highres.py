"""A U-Net for large fields with small lesions: light, and with a wide view.

MobileNetV3 encoder (Howard et al. 2019), ASPP where it is narrowest (Chen et al. 2017),
attention gates on the skips (Oktay et al. 2018), and a decoder of depthwise separable
convolutions (Chollet 2017).
"""

from __future__ import annotations

import torch
from segmentation_models_pytorch.encoders import get_encoder
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP

_WIDTHS = (96, 64, 48, 32)
"""Channels of the decoder at strides 16, 8, 4 and 2."""
_RATES = (6, 12, 18)


class AttentionGate(nn.Module):
    """Weigh the pixels of a skip by what the coarser level sees there.

    Oktay et al. 2018, equation 1: skip * sigmoid(psi(relu(w_x skip + w_g gate))),
    with both at the skip's resolution.
    """

    def __init__(self, skip: int, gate: int) -> None:
        """Take the channels of the skip and of the level that gates it."""
        super().__init__()
        between = max(8, skip // 2)
        self.of_skip = nn.Conv2d(skip, between, 1, bias=False)
        self.of_gate = nn.Conv2d(gate, between, 1)
        self.psi = nn.Conv2d(between, 1, 1)

    def weights(self, skip: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Return (N, 1, H, W) weights between 0 and 1."""
        seen = torch.relu(self.of_skip(skip) + self.of_gate(gate))
        return torch.sigmoid(self.psi(seen))

    def forward(self, skip: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Weigh `skip` (N, C, H, W) by `gate` (N, D, H, W)."""
        return skip * self.weights(skip, gate)


def separable(inputs: int, outputs: int) -> nn.Sequential:
    """Build a 3x3 convolution per channel, one 1x1 over them, a norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class _Up(nn.Module):
    """One level of the decoder."""

    def __init__(self, inputs: int, skip: int, outputs: int, *, scale: int) -> None:
        super().__init__()
        self.enlarge = (
            nn.Upsample(scale_factor=scale, mode="bilinear", align_corners=False)
            if scale > 1
            else nn.Identity()
        )
        self.gate = AttentionGate(skip, inputs)
        self.convs = nn.Sequential(
            separable(inputs + skip, outputs), separable(outputs, outputs)
        )

    def forward(self, below: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        below = self.enlarge(below)
        joined = torch.cat([below, self.gate(skip, below)], dim=1)
        outputs: torch.Tensor = self.convs(joined)
        return outputs


class HighresUnet(nn.Module):
    """See the module; takes any encoder of smp that can be dilated."""

    def __init__(self, encoder: str, classes: int, weights: str | None = None) -> None:
        """Build it.

        Args:
            encoder: Such as `tu-mobilenetv3_large_100`.
            classes: Number of classes, the background included.
            weights: Of the encoder; None for random ones, "imagenet".
        """
        super().__init__()
        # At stride 16 rather than 32: ASPP's rates are meant for that, and a lesion of
        # 16 pixels is still a cell of its own.
        self.encoder = get_encoder(
            encoder, in_channels=3, depth=5, weights=weights, output_stride=16
        )
        channels = self.encoder.out_channels
        self.aspp = ASPP(channels[5], _RATES, 128)
        inputs = 128
        levels = []
        for index, (skip, width) in enumerate(
            zip(channels[4:0:-1], _WIDTHS, strict=True)
        ):
            levels.append(_Up(inputs, skip, width, scale=2 if index else 1))
            inputs = width
        self.levels = nn.ModuleList(levels)
        self.head = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            nn.Conv2d(inputs, classes, 3, padding=1),
        )
        for part in (self.aspp, self.levels, self.head):
            for layer in part.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map (N, 3, H, W) to (N, classes, H, W) logits; H and W multiples of 32."""
        features = self.encoder(images)
        outputs: torch.Tensor = self.aspp(features[5])
        for level, skip in zip(self.levels, features[4:0:-1], strict=True):
            outputs = level(outputs, skip)
        logits: torch.Tensor = self.head(outputs)
        return logits
