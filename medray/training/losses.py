"""Losses over logits (N, C, H, W) and labels (N, H, W)."""

from __future__ import annotations

from typing import Self

import segmentation_models_pytorch as smp
import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn import functional
from torchvision.ops import sigmoid_focal_loss

from medray.training.settings import STRICT


@dataclass(frozen=True, config=STRICT)
class Loss:
    """A weighted sum of losses; a weight of 0 leaves one out.

    Attributes:
        dice: Weight of the soft Dice loss (Milletari et al. 2016).
        focal: Weight of the focal loss, gamma 2 (Lin et al. 2017).
        cross_entropy: Weight of the cross entropy.
        hardest: Share of the pixels, those of the greatest loss, that focal loss and
            cross entropy count (online hard-example mining); 1: all.
        l2: Weight of the sum of squares of the weights above the encoder.
    """

    dice: float = Field(default=1.0, ge=0)
    focal: float = Field(default=1.0, ge=0)
    cross_entropy: float = Field(default=0.0, ge=0)
    hardest: float = Field(default=1.0, gt=0, le=1)
    l2: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.dice or self.focal or self.cross_entropy):
            raise ValueError(
                "loss: dice, focal and cross_entropy are all 0, which leaves nothing "
                "to learn from; set one of them"
            )
        return self


class SegmentationLoss(nn.Module):
    """Dice, focal and cross-entropy loss as `Loss` weighs them."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.how = loss
        self.dice = smp.losses.DiceLoss("multiclass", from_logits=True)

    def of_pixels(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return what focal loss and cross entropy make of each pixel: (N, H, W)."""
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
        """Return the loss of `logits` (N, C, H, W) for `labels` (N, H, W) int64."""
        loss = logits.new_zeros(())
        if self.how.focal or self.how.cross_entropy:
            loss = hardest(self.of_pixels(logits, labels), self.how.hardest).mean()
        if self.how.dice:
            loss = loss + self.how.dice * self.dice(logits, labels)
        return loss

    def of_crops(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy of each crop: (N,), without gradients."""
        with torch.no_grad():
            each = functional.cross_entropy(logits, labels, reduction="none")
            return each.mean(dim=(1, 2))

    def of_weights(self, model: nn.Module) -> torch.Tensor | float:
        """Return the L2 loss of a network's weights above its encoder, biases apart."""
        if not self.how.l2:
            return 0.0
        above = [
            weights.square().sum()
            for name, weights in model.named_parameters()
            if weights.ndim > 1 and not name.startswith("encoder.")
        ]
        return self.how.l2 * torch.stack(above).sum()


def hardest(losses: torch.Tensor, share: float) -> torch.Tensor:
    """Return the greatest of `losses`, so many of them, at least one; 1: all.

    Online hard-example mining (Shrivastava, Gupta and Girshick 2016), over pixels.
    """
    if share >= 1:
        return losses
    count = max(1, round(share * losses.numel()))
    return losses.flatten().topk(count, sorted=False).values
