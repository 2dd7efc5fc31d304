"""Patch classifiers, by timm."""

from __future__ import annotations

import timm
from torch import nn

from medray.errors import ConfigError
from medray.models.config import Architecture


def build_classifier(architecture: Architecture, classes: int) -> nn.Module:
    """Build a network that maps (N, 3, H, W) float to (N, classes) logits.

    Args:
        architecture: Its encoder is a name that timm knows.
        classes: Number of classes.

    Raises:
        ConfigError: timm does not know the name.
    """
    try:
        model: nn.Module = timm.create_model(
            architecture.encoder.removeprefix("tu-"),
            pretrained=False,
            num_classes=classes,
        )
    except (RuntimeError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model: cannot build the classifier {architecture.encoder}: {problem}"
        ) from error
    return model
