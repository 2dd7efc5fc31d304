"""Learning from another model: soft classes, features, and a model's own average."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from medray.errors import ConfigError


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Give how far the student's classes are from the teacher's, softened.

    Kullback-Leibler divergence of softmax(logits / T), times T squared so that its
    gradients keep their size, mean over pixels (Hinton, Vinyals and Dean 2015,
    https://arxiv.org/abs/1503.02531, section 2).

    Args:
        student: (N, C, H, W) logits.
        teacher: (N, C, H, W) logits.
        temperature: T.
    """
    ours = functional.log_softmax(student / temperature, dim=1)
    theirs = functional.log_softmax(teacher / temperature, dim=1)
    each = functional.kl_div(ours, theirs, reduction="none", log_target=True)
    return temperature**2 * each.sum(dim=1).mean()


def consistency(
    student: torch.Tensor, teacher: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Give the mean squared distance of two models' class probabilities.

    Pixels where the teacher's likeliest class is less likely than `threshold` do not
    count (Tarvainen and Valpola 2017, https://arxiv.org/abs/1703.01780; the threshold
    is FixMatch's, Sohn et al. 2020).

    Args:
        student: (N, C, H, W) logits.
        teacher: (N, C, H, W) logits.
        threshold: From 0 (all pixels) to 1.
    """
    theirs = teacher.softmax(dim=1)
    sure = theirs.amax(dim=1) >= threshold
    distance = (student.softmax(dim=1) - theirs).square().mean(dim=1)
    return (distance * sure).sum() / sure.sum().clamp_min(1)


def rise(step: int, steps: int) -> float:
    """Give the weight of the consistency at a step: exp(-5 (1 - t)^2), t up to 1.

    As Laine and Aila 2017 (https://arxiv.org/abs/1610.02242) let it rise.
    """
    t = min(1.0, step / steps) if steps else 1.0
    return float(torch.exp(torch.tensor(-5 * (1 - t) ** 2)))


class LastFeatures:
    """Keeps what a network's encoder gave last, at its coarsest level."""

    def __init__(self, network: nn.Module) -> None:
        """Listen to `network.encoder`."""
        self.value: torch.Tensor | None = None
        encoder: Any = network.encoder
        encoder.register_forward_hook(self._note)

    def now(self) -> torch.Tensor:
        """Give (N, C, h, w) of the last forward.

        Raises:
            ConfigError: The network does not call its encoder as a whole.
        """
        if self.value is None:
            raise ConfigError(
                "teacher.features: needs networks with an encoder of "
                "segmentation-models-pytorch; set it to 0"
            )
        return self.value

    def _note(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.value = outputs if isinstance(outputs, torch.Tensor) else outputs[-1]


class Hints(nn.Module):
    """Distance of the student's features from the teacher's (Romero et al. 2015).

    A 1x1 convolution brings the student's channels to the teacher's number; sizes are
    brought together by pooling. https://arxiv.org/abs/1412.6550
    """

    def __init__(self, student: int, teacher: int) -> None:
        """Take the channels of both."""
        super().__init__()
        self.adapt = nn.Conv2d(student, teacher, 1)

    def forward(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """Give the mean squared distance of (N, C, H, W) and (N, D, h, w) features."""
        size = (
            min(student.shape[2], teacher.shape[2]),
            min(student.shape[3], teacher.shape[3]),
        )
        ours = self.adapt(functional.adaptive_avg_pool2d(student, size))
        theirs = functional.adaptive_avg_pool2d(teacher, size)
        return functional.mse_loss(ours, theirs)
