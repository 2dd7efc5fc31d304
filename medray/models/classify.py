"""A classifier of whole images, some of which come with measures."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from medray.models.folder import load_model
from medray.models.network import Network, choose_device

UInt8 = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


def load_classifier(folder: str) -> Callable[[UInt8, Floats | None], Floats]:
    """Load a model that maps (N, S, S, 3) uint8 RGB and (N, F) to (N, C) logits.

    It works in float32, whatever the device would be faster in: a report must not
    depend on where it was made.

    Args:
        folder: Of a classifier; if it has `morphology`, F are the measures as a dataset
            has them, else they are passed over.

    Raises:
        ConfigError: The folder is no model folder.
        FormatError: Its weights are damaged.
    """
    model, config = load_model(folder)
    device = choose_device()
    network = Network(model, config, device, torch.float32)

    @torch.inference_mode()
    def classify(pixels: UInt8, measures: Floats | None) -> Floats:
        beside = measures if config.morphology else None
        logits = network(torch.from_numpy(pixels).to(device), beside)
        # A classifier's logits hold for each pixel of the window.
        found: Floats = logits[:, :, 0, 0].double().cpu().numpy()
        return found

    return classify
