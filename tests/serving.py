"""What the tests of `medray serve` share."""

import io
import socket
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from medray.apps.serve.requests import Bounds
from medray.classes import Classes
from medray.geometry import Windows
from medray.models.classifiers import build_classifier
from medray.models.config import Architecture, ModelConfig
from medray.models.folder import save_model

SIDE = 64
TOKEN = "a token that is long enough"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
SMALL = Bounds(max_mpixel=1.0, max_mbyte=1.0, timeout_s=20.0)


def save_classifier(folder: Path, mpp: float | None) -> str:
    torch.manual_seed(3)
    architecture = Architecture("classifier", "test_resnet")
    config = ModelConfig(
        architecture=architecture,
        classes=Classes(("sane", "sick")),
        window=Windows(SIDE, SIDE),
        mpp=mpp,
    )
    save_model(str(folder), config, build_classifier(architecture, 2), {"f1": None})
    return str(folder)


def as_bytes(pixels: np.ndarray, form: str) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, form)
    return target.getvalue()


def picture(height: int = 150, width: int = 200, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(90, 220, (height // 10 + 1, width // 10 + 1, 3), np.uint8)
    coarse[..., 1] //= 2
    return np.kron(coarse, np.ones((10, 10, 1), np.uint8))[:height, :width]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


PNG = as_bytes(picture(), "PNG")
