"""A model of random weights: noise, but always the same noise."""

from pathlib import Path

import torch

from medray.classes import Classes
from medray.geometry import Windows
from medray.models.classifiers import build_classifier
from medray.models.config import Architecture, ModelConfig
from medray.models.folder import save_model
from medray.models.segmenters import build_segmenter


def random_model(
    folder: Path,
    name: str = "unet",
    encoder: str = "resnet18",
    *,
    window: tuple[int, int] = (512, 384),
    mpp: float | None = 0.5,
    seed: int = 0,
) -> str:
    """Write a model's folder and return it.

    Args:
        folder: Where to.
        name: The network; "classifier" is one by timm.
        encoder: By its name in segmentation-models-pytorch or timm.
        window: Size and stride, pixels.
        mpp: Microns per pixel; None: any.
        seed: Decides the weights.
    """
    torch.manual_seed(seed)
    architecture = Architecture(name, encoder)
    build = build_classifier if name == "classifier" else build_segmenter
    config = ModelConfig(
        architecture=architecture, classes=Classes(), window=Windows(*window), mpp=mpp
    )
    save_model(str(folder), config, build(architecture, 2), {"f1": None})
    return str(folder)
