"""What a model folder says about its model; without torch, so quick to import."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from medray.classes import Classes
from medray.errors import ConfigError
from medray.grid import Windows
from medray.settings import from_dict, read_yaml, to_dict
from medray.store import files


@dataclass(frozen=True)
class Architecture:
    """A network of segmentation-models-pytorch.

    Attributes:
        name: Decoder: unet, unetplusplus, fpn, deeplabv3plus, segformer, upernet, ...
        encoder: Any encoder of segmentation-models-pytorch or `tu-` + any of timm.
    """

    name: str = "unet"
    encoder: str = "resnet18"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a model is and how it must be fed; the one contract of train and infer.

    Attributes:
        architecture: Network and encoder.
        classes: Names by label value.
        window: Size and stride of the model's input, pixels at `mpp`.
        mpp: Microns per pixel that the model was trained at; None: whatever level 0 is.
        mean: RGB mean subtracted from pixels scaled to 0..1.
        std: RGB standard deviation they are then divided by.
        made_from: Digests, versions and settings of the training.
    """

    architecture: Architecture
    classes: Classes
    window: Windows
    mpp: float | None
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    made_from: dict[str, Any] = field(default_factory=dict)


def read_config(folder: str) -> ModelConfig:
    """Read `model.yaml`.

    Raises:
        ConfigError: The folder is no model folder.
    """
    uri = files.join(folder, "model.yaml")
    if not files.exists(uri):
        raise ConfigError(
            f"{folder}: expected a model folder with a model.yaml; "
            f"`medray train` writes one"
        )
    return from_dict(ModelConfig, read_yaml(uri), uri)


def model_digest(folder: str) -> str:
    """Digest what decides a model's predictions: weights and configuration."""
    config = to_dict(read_config(folder)) | {"made_from": None}
    digest = hashlib.blake2b(repr(sorted(config.items())).encode(), digest_size=16)
    digest.update(files.read_bytes(files.join(folder, "weights.safetensors")))
    return f"blake2b:{digest.hexdigest()}"
