"""A classifier of cells that takes measures beside their pixels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from medray.models.folder import load_model
from medray.models.network import Network, choose_device, choose_precision

UInt8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


def load_classifier(folder: str) -> Callable[[UInt8, Floats], Floats]:
    """Load a model that maps (N, S, S, 3) uint8 RGB and (N, F) to (N, C) probabilities.

    Args:
        folder: Of a model with `morphology`; F measures as a dataset has them.

    Raises:
        ConfigError: The folder is no model folder.
        FormatError: Its weights are damaged.
    """
    model, config = load_model(folder)
    device = choose_device()
    network = Network(model, config, device, choose_precision("auto", device))

    @torch.inference_mode()
    def classify(pixels: UInt8, measures: Floats) -> Floats:
        logits = network(torch.from_numpy(pixels).to(device), measures)
        shares = logits[:, :, 0, 0].double().softmax(dim=1)
        found: Floats = shares.cpu().numpy()
        return found

    return classify
