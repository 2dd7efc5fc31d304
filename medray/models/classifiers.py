"""Classifiers of whole images, cells or windows: timm's encoders, and what is above."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional

from medray.annotations import FEATURES
from medray.errors import ConfigError
from medray.models.config import Architecture
from medray.models.weights import is_file, load_encoder, where_from


class SelfAttention(nn.Module):
    """Attention of each place of a feature map to all of them (Vaswani et al. 2017).

    One head: softmax(Q K^T / sqrt(units)) V, with Q, K and V of 1x1 convolutions.
    """

    def __init__(self, channels: int, units: int) -> None:
        """Take the channels of the map and those of Q, K and V."""
        super().__init__()
        self.query = nn.Conv2d(channels, units, 1)
        self.key = nn.Conv2d(channels, units, 1)
        self.value = nn.Conv2d(channels, units, 1)

    def weights(self, maps: torch.Tensor) -> torch.Tensor:
        """Return how much each place (row) attends to each: (N, H * W, H * W)."""
        query, key = (part(maps).flatten(2) for part in (self.query, self.key))
        scores = query.transpose(1, 2) @ key / query.shape[1] ** 0.5
        return torch.softmax(scores, dim=2)

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Map (N, channels, H, W) to (N, units, H, W)."""
        parts = (self.query(maps), self.key(maps), self.value(maps))
        query, key, value = (part.flatten(2).transpose(1, 2) for part in parts)
        # With one head as a dimension: ONNX knows it in no other form.
        heads = (query[:, None], key[:, None], value[:, None])
        found = functional.scaled_dot_product_attention(*heads)[:, 0]
        attended: torch.Tensor = found.transpose(1, 2)
        return attended.reshape(*attended.shape[:2], *maps.shape[2:])


class Classifier(nn.Module):
    """An encoder, attention appended to its last features, pooling, a head.

    With `morphology`, standardised measures of the cell join what is pooled.
    """

    def __init__(self, encoder: Any, how: Architecture, classes: int) -> None:
        """Put a head on timm's encoder, which must have none."""
        super().__init__()
        # Some (MobileNetV3, VGG) have layers between their features and their classes.
        features = int(encoder.head_hidden_size)
        self.encoder = encoder
        self.attention = None
        if how.attention:
            features = int(encoder.num_features)
            self.attention = SelfAttention(features, how.attention)
            features += how.attention
        self.morphology = how.morphology
        if how.morphology:
            features += FEATURES
        hidden: list[nn.Module] = []
        if how.hidden:
            norm = [nn.BatchNorm1d(how.hidden)] if how.norm else []
            hidden = [nn.Linear(features, how.hidden), *norm, nn.ReLU()]
        last = nn.Linear(how.hidden or features, classes)
        self.head = nn.Sequential(*hidden, nn.Dropout(how.dropout), last)

    def forward(
        self, inputs: torch.Tensor, measures: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map (N, 3, H, W), and (N, FEATURES) if it takes them, to (N, classes)."""
        if self.attention is None:
            pooled = self.encoder(inputs)
        else:
            maps = self.encoder.forward_features(inputs)
            maps = torch.cat([maps, self.attention(maps)], dim=1)
            pooled = maps.mean(dim=(2, 3))
        if self.morphology:
            pooled = torch.cat([pooled, measures], dim=1)  # type: ignore[list-item]
        logits: torch.Tensor = self.head(pooled)
        return logits


def build_classifier(
    architecture: Architecture, classes: int, weights: str | None = None
) -> nn.Module:
    """Build a network that maps (N, 3, H, W) float to (N, classes) logits.

    Args:
        architecture: Its encoder is a name that timm knows.
        classes: Number of classes.
        weights: Of the encoder: None for random ones, "imagenet", as timm brings them,
            or a file of them.

    Raises:
        ConfigError: The network or its weights are not available.
    """
    name = architecture.encoder.removeprefix("tu-")
    pretrained = weights is not None and not is_file(weights)
    try:
        encoder: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
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
    if architecture.attention and not _gives_maps(encoder):
        raise ConfigError(
            f"model.attention: {name} gives no feature map (N, C, H, W) to attend to; "
            f"take a convolutional encoder, or attention 0"
        )
    if weights is not None and is_file(weights):
        load_encoder(encoder, weights)
    return Classifier(encoder, architecture, classes)


def _gives_maps(encoder: Any) -> bool:
    """Return whether the last features are (N, C, H, W), those of a convolution."""
    with torch.inference_mode():
        features = encoder.eval().forward_features(torch.zeros(1, 3, 224, 224))
    encoder.train()
    return bool(features.ndim == 4 and features.shape[1] == encoder.num_features)
