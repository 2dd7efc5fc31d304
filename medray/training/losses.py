"""Losses over logits (N, C, H, W) and labels (N, H, W)."""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from medray.training.recipe import Loss


class SegmentationLoss(nn.Module):
    """Dice, focal and cross-entropy loss as `Loss` weighs them."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.how = loss
        self.dice = smp.losses.DiceLoss("multiclass", from_logits=True)

    def of_pixels(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Give what focal loss and cross entropy make of each pixel: (N, H, W)."""
        total = torch.zeros_like(logits[:, 0])
        if self.how.focal:
            truth = functional.one_hot(labels, logits.shape[1]).movedim(-1, 1)
            focal = sigmoid_focal_loss(logits, truth.to(logits.dtype), alpha=-1)
            total = total + self.how.focal * focal.mean(dim=1)
        if self.how.cross_entropy:
            entropy = functional.cross_entropy(logits, labels, reduction="none")
            total = total + self.how.cross_entropy * entropy
        return total

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Give the loss of `logits` (N, C, H, W) for `labels` (N, H, W) int64."""
        loss = logits.new_zeros(())
        if self.how.focal or self.how.cross_entropy:
            loss = hardest(self.of_pixels(logits, labels), self.how.hardest).mean()
        if self.how.dice:
            loss = loss + self.how.dice * self.dice(logits, labels)
        return loss

    def of_crops(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Give the mean cross entropy of each crop: (N,), without gradients."""
        with torch.no_grad():
            each = functional.cross_entropy(logits, labels, reduction="none")
            return each.mean(dim=(1, 2))

    def of_weights(self, model: nn.Module) -> torch.Tensor | float:
        """Give the L2 loss of a network's weights above its encoder, biases apart."""
        if not self.how.l2:
            return 0.0
        above = [
            weights.square().sum()
            for name, weights in model.named_parameters()
            if weights.ndim > 1 and not name.startswith("encoder.")
        ]
        return self.how.l2 * torch.stack(above).sum()


def hardest(losses: torch.Tensor, share: float) -> torch.Tensor:
    """Give the greatest of `losses`, so many of them, at least one; 1: all.

    Online hard-example mining (Shrivastava, Gupta and Girshick 2016), over pixels.
    """
    if share >= 1:
        return losses
    count = max(1, round(share * losses.numel()))
    return losses.flatten().topk(count, sorted=False).values
