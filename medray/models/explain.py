"""Why a class: Grad-CAM of any network with an encoder, and maps of attention."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from medray.errors import ConfigError

Floats = npt.NDArray[np.float32]


def check_installed() -> None:
    """Raise an error where grad-cam is missing.

    Raises:
        ConfigError: It is.
    """
    try:
        import pytorch_grad_cam  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "explain: needs grad-cam; install medray with the extra `explain`"
        ) from error


def last_stage(model: Any, inputs: torch.Tensor) -> nn.Module:
    """Find the layer that gives the last features of a model's encoder.

    Args:
        model: A classifier or segmenter of medray.
        inputs: (1, 3, S, S) to find it with.

    Raises:
        ConfigError: The encoder gives no feature map (N, C, h, w).
    """
    given: list[tuple[nn.Module, torch.Tensor]] = []

    def note(layer: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            given.append((layer, output))

    encoder: Any = model.encoder
    # Not the encoder itself: FCN-8s runs the layers of its own in parts.
    layers = [layer for layer in encoder.modules() if layer is not encoder]
    handles = [layer.register_forward_hook(note) for layer in layers]
    features: Any = None
    try:
        with torch.inference_mode():
            if hasattr(encoder, "forward_features"):  # timm's
                features = encoder.forward_features(inputs)
            elif isinstance(encoder, nn.Sequential):  # of FCN-8s
                features = encoder(inputs)
            else:
                features = encoder(inputs)[-1]
    finally:
        for handle in handles:
            handle.remove()
    # The outermost: what lies within it may run several times.
    for layer, output in reversed(given):
        if output is features and features.shape[2] * features.shape[3] > 1:
            return layer
    raise ConfigError(
        f"explain: {type(encoder).__name__} gives no feature map (N, C, h, w) last; "
        f"Grad-CAM needs a convolutional encoder, and windows of more than its stride"
    )


class _Mean(nn.Module):
    """The mean logit of a class over the pixels predicted as it.

    Of a classifier that is its logit. Vinogradova et al. 2020 have the sum; the mean
    gives the same map once it is scaled.
    """

    def __init__(self, label: int) -> None:
        super().__init__()
        self._label = label

    def forward(self, logits: torch.Tensor) -> torch.Tensor:
        if logits.ndim == 1:
            return logits[self._label]
        return logits[self._label][logits.argmax(dim=0) == self._label].mean()


def grad_cam(model: nn.Module, inputs: torch.Tensor, label: int) -> Floats:
    """Return which places of an image speak for a class.

    Grad-CAM (Selvaraju et al. 2017) by the library grad-cam, at the last stage of the
    encoder: its channels weighted by the mean gradient of the class's logit (of a
    segmenter: its mean over the pixels predicted as it), negative sums left out.

    Args:
        model: In evaluation mode, with gradients.
        inputs: (1, 3, S, S) float32, normalised.
        label: Of the class; a segmenter must predict it somewhere.

    Returns:
        (S, S) float32, 0 to 1; all 0 where nothing speaks for it.

    Raises:
        ConfigError: grad-cam is missing, or the encoder gives no feature map.
    """
    check_installed()
    from pytorch_grad_cam import GradCAM

    cam: Any = GradCAM(model=model, target_layers=[last_stage(model, inputs)])
    try:
        with torch.enable_grad():
            found: Floats = cam(input_tensor=inputs, targets=[_Mean(label)])[0]
    finally:
        cam.activations_and_grads.release()
        model.zero_grad(set_to_none=True)
    return np.nan_to_num(found.astype(np.float32))


def attention_map(model: Any, inputs: torch.Tensor) -> Floats | None:
    """Return how much attention each place of an image receives from all.

    Args:
        model: A classifier.
        inputs: (1, 3, S, S) float32, normalised.

    Returns:
        (S, S) float32, 0 to 1: the mean over the queries of softmax(Q K^T / sqrt(d)),
        interpolated and scaled; None of a model without attention.
    """
    if getattr(model, "attention", None) is None:
        return None
    with torch.inference_mode():
        maps = model.encoder.forward_features(inputs)
        received = model.attention.weights(maps).mean(dim=1)
        square = received.reshape(1, 1, *maps.shape[2:])
        whole = functional.interpolate(square, inputs.shape[2:], mode="bilinear")[0, 0]
        scaled: Floats = (
            (whole - whole.min()) / (whole.max() - whole.min() + 1e-12)
        ).numpy()
    return scaled
