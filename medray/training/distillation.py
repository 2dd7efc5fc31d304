"""Learning from another model: soft classes, features, and a model's own average."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.nn import functional

from medray.errors import ConfigError
from medray.models import Normalise, load_model
from medray.training.arithmetic import Arithmetic
from medray.training.crops import Batch
from medray.training.settings import STRICT
from medray.types import UInt8


@dataclass(frozen=True, config=STRICT)
class Teacher:
    """A trained model that a smaller one learns from (Hinton et al. 2015).

    Attributes:
        model: Its folder.
        soft: Weight of the divergence from its softened classes.
        temperature: That softens both.
        features: Weight of the distance from its encoder's last features (Romero et
            al. 2015).
    """

    model: str
    soft: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=2.0, gt=0)
    features: float = Field(default=0.0, ge=0)


@dataclass(frozen=True, config=STRICT)
class Unlabelled:
    """Learning from slides without annotations (Tarvainen and Valpola 2017).

    The moving average of the model (`optimizer.average`) says what crops of the
    dataset's unannotated slides hold; the model is to say the same of the crops in
    other colours.

    Attributes:
        weight: Of that loss, once it has risen.
        threshold: Pixels of which the teacher is less sure do not count; 0: all.
        ramp: Share of the steps over which the weight rises.
    """

    weight: float = Field(default=1.0, ge=0)
    threshold: float = Field(default=0.0, ge=0, le=1)
    ramp: float = Field(default=0.2, ge=0, le=1)


def divergence(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return how far the student's classes are from the teacher's, softened.

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
    """Return the mean squared distance of two models' class probabilities.

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
    """Return the weight of the consistency at a step: exp(-5 (1 - t)^2), t up to 1.

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
        """Return (N, C, h, w) of the last forward.

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
        """Return the mean squared distance of (N, C, H, W) from (N, D, h, w)."""
        size = (
            min(student.shape[2], teacher.shape[2]),
            min(student.shape[3], teacher.shape[3]),
        )
        ours = self.adapt(functional.adaptive_avg_pool2d(student, size))
        theirs = functional.adaptive_avg_pool2d(teacher, size)
        return functional.mse_loss(ours, theirs)


class Distillation:
    """A teacher, and what its student loses by differing from it."""

    def __init__(
        self, how: Teacher, student: nn.Module, arithmetic: Arithmetic
    ) -> None:
        """Load the teacher, and listen to both where features count.

        Raises:
            ConfigError: There is no such model.
        """
        network, config = load_model(how.model)
        self.how, self.arithmetic = how, arithmetic
        self.network = arithmetic.place(network).requires_grad_(False)
        self.normalise = Normalise(config).to(arithmetic.device)
        self.hints: Hints | None = None
        if how.features:
            self.ours, self.theirs = LastFeatures(student), LastFeatures(network)
            with torch.inference_mode():
                probe = torch.zeros(1, 3, 64, 64, device=arithmetic.device)
                student.eval()(probe)
                self.network(probe)
            channels = (f.now().shape[1] for f in (self.ours, self.theirs))
            self.hints = Hints(*channels).to(arithmetic.device)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the teacher's logits (N, C, H, W) of images (N, 3, H, W) uint8."""
        return self.arithmetic.forward(self.network, self.normalise(images))

    @torch.inference_mode()
    def predict(self, batch: Batch) -> UInt8:
        """Return the teacher's classes (N, H, W) of a batch."""
        self.network.eval()
        images = torch.from_numpy(batch.images.copy()).to(self.arithmetic.device)
        classes = self.forward(images).argmax(dim=1)
        predicted: UInt8 = classes.to(torch.uint8).cpu().numpy()
        return predicted

    def add_to(
        self, loss: torch.Tensor, logits: torch.Tensor, images: torch.Tensor
    ) -> torch.Tensor:
        """Return a student's loss plus what it loses here by its logits of images."""
        with torch.no_grad():
            softer = self.forward(images)
        loss = loss + self.how.soft * divergence(logits, softer, self.how.temperature)
        if self.hints is not None:
            features = self.ours.now().float(), self.theirs.now().float()
            loss = loss + self.how.features * self.hints(*features)
        return loss
