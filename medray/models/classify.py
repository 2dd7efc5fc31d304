"""A classifier of whole images, some of which come with measures."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from medray.models.config import TURNS, Tta
from medray.models.folder import load_model
from medray.models.network import Network, choose_device
from medray.types import UInt8

Floats = npt.NDArray[np.float64]


def load_classifier(
    folder: str, tta: Tta = "none"
) -> Callable[[UInt8, Floats | None], Floats]:
    """Load a model that maps (N, S, S, 3) uint8 RGB and (N, F) to (N, C) logits.

    It works in float32, whatever the device would be faster in: a report must not
    depend on where it was made.

    Args:
        folder: Of a classifier; if it has `morphology`, F are the measures as a dataset
            has them, else they are passed over.
        tta: Also classify images mirrored (`flips`) or mirrored and turned (`all`); the
            logits are then the logarithm of the mean probability.

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
        images = torch.from_numpy(pixels).to(device)
        each = []
        for turns, mirror in TURNS[tta]:
            turned = torch.rot90(images, turns, (1, 2))
            turned = turned.flip(2) if mirror else turned
            # A classifier's logits hold for each pixel of the window.
            logits = network(turned.contiguous(), beside)[:, :, 0, 0]
            each.append(logits.double())
        if len(each) == 1:
            return _as_array(each[0])
        logs = torch.stack(each).log_softmax(dim=2)
        return _as_array(logs.logsumexp(dim=0) - math.log(len(each)))

    return classify


def _as_array(logits: torch.Tensor) -> Floats:
    found: Floats = logits.cpu().numpy()
    return found
