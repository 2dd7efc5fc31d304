"""The stages of an encoder, and how much each of them matters.

An encoder's stages are what timm takes for them (its coarse `group_matcher`): layer1 to
layer4 of a ResNet, the blocks of a vision transformer. The stem belongs to the first,
and what normalises a stage's output to that stage.

How much a stage matters is measured by ablation on validation images: its features are
taken away by setting channels to their mean over all images and places, which leaves
the layers after them the values they are used to, but nothing of the image (Morcos et
al. 2018, https://arxiv.org/abs/1803.06959, clamp random channels; here it is the even,
then the odd ones, so that each is clamped once and nothing is left to chance). The
importance is the mean rise of the loss. Without any channel nothing of an image would
pass any stage of a plain encoder, and all stages would seem to matter alike: hence
halves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import group_parameters
from torch import nn

from medray.errors import ConfigError
from medray.training.crops import Batch


@dataclass(frozen=True)
class Stage:
    """A stage of an encoder.

    Attributes:
        name: Of the module whose output is the stage's.
        parameters: Names of its parameters.
    """

    name: str
    parameters: tuple[str, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules that hold the parameters."""
        return _holders(self.parameters)


def find_stages(encoder: Any) -> tuple[Stage, ...]:
    """Return the stages of an encoder, the one next to the input first.

    Together they hold each parameter once. Encoders that are not timm's have none.
    """
    if not hasattr(encoder, "group_matcher"):
        return ()
    groups = group_parameters(encoder, encoder.group_matcher(coarse=True))
    sizes = {name: p.ndim for name, p in encoder.named_parameters()}
    stages: list[Stage] = []
    stem, *rest = (tuple(groups[at]) for at in sorted(groups))
    for names in rest:
        if stages and all(sizes[name] < 2 for name in names):  # it normalises
            before = stages[-1]
            stages[-1] = Stage(before.name, before.parameters + names)
        else:
            stages.append(Stage(_output_of(names, sizes), stem + names))
            stem = ()
    return tuple(stages)


def _holders(parameters: Sequence[str]) -> tuple[str, ...]:
    names = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    return tuple(name for name in names if name)


def _output_of(names: Sequence[str], every: Iterable[str]) -> str:
    """Name the module that holds these parameters and no others, or the last one's."""
    first = names[0].split(".")
    for depth in range(1, len(first)):
        path = ".".join(first[:depth])
        if {name for name in every if name.startswith(f"{path}.")} == set(names):
            return path
    return _holders(names)[-1]


def weigh_stages(
    encoder: nn.Module,
    stages: Sequence[Stage],
    predict: Callable[[Batch], tuple[Any, float]],
    batches: Sequence[Batch],
) -> dict[str, float]:
    """Return how much each stage of an encoder matters on validation images.

    Args:
        encoder: In evaluation mode.
        stages: Its stages.
        predict: Gives classes and mean loss of a batch, by way of the encoder.
        batches: Of validation images.

    Raises:
        ConfigError: They hold no image.
    """
    count = sum(len(batch.images) for batch in batches)
    if not count:
        raise ConfigError(
            "schedule.phases: train: adaptive weighs the stages on validation "
            "images, and none could be read; ingest some, or train: last"
        )

    def loss() -> float:
        return sum(predict(batch)[1] * len(batch.images) for batch in batches) / count

    return importance(encoder, stages, loss)


@torch.inference_mode()
def importance(
    encoder: nn.Module, stages: Sequence[Stage], loss: Callable[[], float]
) -> dict[str, float]:
    """Return the mean rise of the loss when a half of a stage's channels is ablated.

    Args:
        encoder: In evaluation mode; its stages give (N, C, H, W).
        stages: Its stages.
        loss: Gives the mean loss over validation images, by way of the encoder.

    Returns:
        By the stages' names; below 0 where the loss falls.
    """
    sums: dict[str, torch.Tensor] = {}
    counts: dict[str, int] = {}

    def noting(stage: Stage) -> Callable[..., None]:
        def note(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            total = output.double().sum(dim=(0, 2, 3))
            sums[stage.name] = sums.get(stage.name, 0) + total
            seen = output.shape[0] * output.shape[2] * output.shape[3]
            counts[stage.name] = counts.get(stage.name, 0) + seen

        return note

    with hooked(encoder, stages, noting):
        whole = loss()
    found = {}
    for stage in stages:
        mean = sums[stage.name] / counts[stage.name]
        losses = []
        for half in (0, 1):
            with hooked(encoder, [stage], _clamping(mean, half)):
                losses.append(loss())
        found[stage.name] = sum(losses) / 2 - whole
    return found


def _clamping(
    mean: torch.Tensor, half: int
) -> Callable[[Stage], Callable[..., torch.Tensor]]:
    def clamp(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        clamped = output.clone()
        values = mean[half::2].to(output.dtype)
        clamped[:, half::2] = values[None, :, None, None]
        return clamped

    return lambda stage: clamp


@contextmanager
def hooked(
    encoder: nn.Module,
    stages: Sequence[Stage],
    hook_of: Callable[[Stage], Callable[..., Any]],
) -> Iterator[None]:
    """Register hooks on the outputs of stages, as long as the context lasts."""
    handles = [
        encoder.get_submodule(stage.name).register_forward_hook(hook_of(stage))
        for stage in stages
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def most_important(found: dict[str, float], share: float) -> tuple[str, ...]:
    """Name the stages that matter most, a `share` of them and at least one.

    Of two that matter alike it is the later one; they come in the encoder's order.
    """
    names = list(found)
    count = max(1, round(share * len(names)))
    ranked = sorted(names, key=lambda name: (found[name], names.index(name)))
    return tuple(name for name in names if name in ranked[-count:])
