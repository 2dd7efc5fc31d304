"""Segmentation networks: two of medray's own, and segmentation-models-pytorch's."""

from __future__ import annotations

from pathlib import Path

import segmentation_models_pytorch as smp
import torchvision
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
        weights: Encoder weights: None for random ones, or "imagenet", as torchvision
            or segmentation-models-pytorch bring them.

    Raises:
        ConfigError: The network or its weights are not to be had.
    """
    try:
        return _build(architecture, classes, weights)
    except (KeyError, ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model: cannot build {architecture.name} with encoder "
            f"{architecture.encoder} and weights {weights}: {problem}"
        ) from error
    except OSError as error:
        cache = Path.home() / ".cache"
        raise ConfigError(
            f"model: weights {weights!r} of {architecture.encoder} cannot be loaded "
            f"({error}); on a machine without internet copy them below {cache} "
            f"beforehand, or set `weights: null` to start from random ones"
        ) from error


def _build(architecture: Architecture, classes: int, weights: str | None) -> nn.Module:
    # Imported here: a process that runs one network need not load the others.
    if architecture.name == "fcn8s":
        from medray.models.fcn import Fcn8s

        if architecture.encoder != "vgg16":
            raise ValueError("fcn8s is made of vgg16's stages; set encoder: vgg16")
        fcn = Fcn8s(classes)
        if weights:
            source = torchvision.models.vgg16(weights=_of_vgg16(weights))
            fcn.encoder.load_state_dict(source.features.state_dict())
        return fcn
    if architecture.name == "highres_unet":
        from medray.models.highres import HighresUnet

        return HighresUnet(architecture.encoder, classes, weights)
    model: nn.Module = smp.create_model(
        architecture.name,
        encoder_name=architecture.encoder,
        encoder_weights=weights,
        in_channels=3,
        classes=classes,
    )
    return model


def _of_vgg16(weights: str) -> torchvision.models.VGG16_Weights:
    if weights != "imagenet":
        raise ValueError(f"vgg16 has the weights imagenet, not {weights}")
    return torchvision.models.VGG16_Weights.IMAGENET1K_V1
