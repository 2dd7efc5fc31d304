"""Grad-CAM: which parts of an image speak for a class, drawn over the image."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib
import numpy as np
import numpy.typing as npt
import torch

from medray.errors import ConfigError, SlideError
from medray.models import Normalise, is_exported, load_model, read_config
from medray.models import explain as maps
from medray.types import UInt8


@dataclass(frozen=True)
class Explained:
    """What speaks for a class in one window.

    Attributes:
        label: Of the class.
        predicted: Label predicted; of a segmenter the commonest after the background.
        share: Probability of `label`; of a segmenter the share of pixels with it.
        overlay: (S, S, 3) uint8 RGB.
        attention: (S, S, 3) uint8 RGB; None for a model without attention.
    """

    label: int
    predicted: int
    share: float
    overlay: UInt8
    attention: UInt8 | None


class Explainer:
    """A model whose predictions can be explained."""

    def __init__(self, model: str) -> None:
        """Load a model folder.

        Raises:
            ConfigError: It is exported, takes measures besides pixels, or grad-cam is
                missing.
        """
        maps.check_installed()
        if is_exported(model):
            raise ConfigError(
                f"{model}: comes from `medray export`, and has no gradients; give the "
                f"model folder that it was made from"
            )
        if read_config(model).morphology is not None:
            raise ConfigError(
                f"{model}: takes measures of contours beside the pixels, which images "
                f"alone have not; train with model.morphology=false"
            )
        self._model, self._config = load_model(model)
        self._normalise = Normalise(self._config)

    def explain(self, pixels: UInt8, label: int | None = None) -> Explained:
        """Explain a class, by default the predicted one.

        Args:
            pixels: (S, S, 3) uint8 RGB.
            label: Of the class.

        Raises:
            ConfigError: The encoder has no feature map.
            SlideError: A segmenter predicts the class nowhere.
        """
        batch = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2)
        inputs = self._normalise(batch).contiguous()
        with torch.inference_mode():
            logits = self._model(inputs)[0]
        if logits.ndim == 1:
            shares = torch.softmax(logits, dim=0)
            predicted = int(shares.argmax())
        else:
            counts = torch.bincount(logits.argmax(0).ravel(), minlength=len(logits))
            shares = counts / counts.sum()
            predicted = int(counts[1:].argmax()) + 1 if counts[1:].any() else 0
        label = predicted if label is None else label
        if logits.ndim > 1 and not shares[label]:
            raise SlideError(
                f"no pixel is predicted as {self._config.classes.names[label]}, so "
                f"nothing speaks for it; most are "
                f"{self._config.classes.names[int(shares.argmax())]}"
            )
        attention = maps.attention_map(self._model, inputs)
        return Explained(
            label,
            predicted,
            float(shares[label]),
            overlay(pixels, maps.grad_cam(self._model, inputs, label)),
            None if attention is None else overlay(pixels, attention),
        )


def overlay(pixels: UInt8, heat: npt.NDArray[np.float32]) -> UInt8:
    """Lay a map over an image.

    Args:
        pixels: (H, W, 3) uint8 RGB.
        heat: (H, W), 0 to 1: from dark blue to red.
    """
    colours = matplotlib.colormaps["turbo"](heat)[..., :3] * 255
    mixed: UInt8 = np.rint(0.55 * pixels + 0.45 * colours).astype(np.uint8)
    return mixed
