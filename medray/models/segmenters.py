"""Segmentation networks: two of medray's own, and segmentation-models-pytorch's."""

from __future__ import annotations

from typing import Any

import segmentation_models_pytorch as smp
import torchvision
from torch import nn

from medray.errors import ConfigError
from medray.models.config import Architecture
from medray.models.weights import is_file, load_encoder, where_from


def build_segmenter(
    architecture: Architecture, classes: int, weights: str | None = None
) -> nn.Module:
    """Build a network that maps (N, 3, H, W) float to (N, classes, H, W) logits.

    Args:
        architecture: Which one; H and W must be multiples of its `output_stride` (32).
        classes: Number of classes, the background included.
        weights: Encoder weights: None for random ones, "imagenet", as torchvision,
            timm or segmentation-models-pytorch bring them, or a file of them.

    Raises:
        ConfigError: The network or its weights are not available.
    """
    name = weights if not is_file(weights) else None
    try:
        model = _build(architecture, classes, name)
    except (KeyError, ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"model: cannot build {architecture.name} with encoder "
            f"{architecture.encoder} and weights {weights}: {problem}"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"weights: {weights} of {architecture.encoder} cannot be downloaded "
            f"({error}); on a machine without internet bring "
            f"{where_from(architecture, str(weights))} and set `weights: FILE`, or set "
            f"`weights: null` to start from random ones"
        ) from error
    if weights and is_file(weights):
        encoder: Any = model.encoder
        load_encoder(encoder, weights)
    return model


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
    # An encoder under timm's own name names its weights, too; smp takes True for them.
    named = architecture.encoder.startswith("tu-") and weights is not None
    model: nn.Module = smp.create_model(
        architecture.name,
        encoder_name=architecture.encoder,
        encoder_weights=True if named else weights,
        in_channels=3,
        classes=classes,
    )
    return model


def _of_vgg16(weights: str) -> torchvision.models.VGG16_Weights:
    if weights != "imagenet":
        raise ValueError(f"vgg16 has the weights imagenet, not {weights}")
    return torchvision.models.VGG16_Weights.IMAGENET1K_V1
