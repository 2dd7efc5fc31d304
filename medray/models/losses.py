"""Losses over logits (N, C, H, W) and labels (N, H, W)."""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch
from torch import nn

from medray.recipe import Loss


class SegmentationLoss(nn.Module):
    """Dice, focal and cross-entropy loss as `Loss` weighs them."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        parts = (
            (loss.dice, smp.losses.DiceLoss("multiclass", from_logits=True)),
            (loss.focal, smp.losses.FocalLoss("multiclass", gamma=2.0)),
            (loss.cross_entropy, nn.CrossEntropyLoss()),
        )
        self.parts = [(weight, part) for weight, part in parts if weight > 0]

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Give the loss of `logits` (N, C, H, W) for `labels` (N, H, W) int64."""
        return torch.stack([w * part(logits, labels) for w, part in self.parts]).sum()
