"""Segmentation networks, by segmentation-models-pytorch."""

from __future__ import annotations

from pathlib import Path

import segmentation_models_pytorch as smp
from torch import nn

from medray.errors import ConfigError
from medray.models.config import Architecture


def build_segmenter(
    architecture: Architecture, classes: int, weights: str | None = None
) -> nn.Module:
    """Build a network that maps (N, 3, H, W) float to (N, classes, H, W) logits.

    Args:
        architecture: Which one; H and W must be multiples of its `output_stride` (32).
        classes: Number of classes, the background included.
        weights: Encoder weights: None for random ones, or a name that
            segmentation-models-pytorch knows ("imagenet").

    Raises:
        ConfigError: The network or its weights are not to be had.
    """
    try:
        model: nn.Module = smp.create_model(
            architecture.name,
            encoder_name=architecture.encoder,
            encoder_weights=weights,
            in_channels=3,
            classes=classes,
        )
    except (KeyError, ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model: cannot build {architecture.name} with encoder "
            f"{architecture.encoder} and weights {weights}: {problem}"
        ) from error
    except OSError as error:
        cache = Path.home() / ".cache" / "huggingface"
        raise ConfigError(
            f"model: weights {weights!r} of {architecture.encoder} cannot be loaded "
            f"({error}); on a machine without internet copy them into {cache} "
            f"beforehand, or set `weights: null` to start from random ones"
        ) from error
    return model
