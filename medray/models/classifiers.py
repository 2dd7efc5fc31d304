"""Classifiers of whole images, cells or windows, by timm."""

from __future__ import annotations

import timm
from torch import nn

from medray.errors import ConfigError
from medray.models.config import Architecture
from medray.models.weights import is_file, load_encoder, where_from


def build_classifier(
    architecture: Architecture, classes: int, weights: str | None = None
) -> nn.Module:
    """Build a network that maps (N, 3, H, W) float to (N, classes) logits.

    Args:
        architecture: Its encoder is a name that timm knows.
        classes: Number of classes.
        weights: Of all but the head: None for random ones, "imagenet", as timm brings
            them, or a file of them.

    Raises:
        ConfigError: The network or its weights are not to be had.
    """
    name = architecture.encoder.removeprefix("tu-")
    pretrained = weights is not None and not is_file(weights)
    try:
        model: nn.Module = timm.create_model(
            name,
            pretrained=pretrained,
            num_classes=0 if architecture.hidden else classes,
            drop_rate=0.0 if architecture.hidden else architecture.dropout,
        )
    except OSError as error:
        tagged = Architecture("classifier", f"tu-{name}")
        raise ConfigError(
            f"weights: {weights} of {name} cannot be downloaded ({error}); on a "
            f"machine without internet bring {where_from(tagged, str(weights))} and "
            f"set `weights: FILE`, or set `weights: null` to start from random ones"
        ) from error
    except (RuntimeError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model: cannot build the classifier {architecture.encoder}: {problem}"
        ) from error
    if weights is not None and is_file(weights):
        _load(model, weights)
    if architecture.hidden:
        features = int(model.num_features)  # type: ignore[arg-type]
        model = nn.Sequential(
            model,
            nn.Linear(features, architecture.hidden),
            nn.ReLU(),
            nn.Dropout(architecture.dropout),
            nn.Linear(architecture.hidden, classes),
        )
    return model


def _load(model: nn.Module, weights: str) -> None:
    """Load all but the last layer, which knows other classes."""
    last = model.get_classifier()  # type: ignore[operator]
    model.reset_classifier(0)  # type: ignore[operator]
    load_encoder(model, weights)
    if isinstance(last, nn.Linear):
        model.reset_classifier(last.out_features)  # type: ignore[operator]
