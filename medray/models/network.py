"""A network on its device: choice of device and precision, normalisation of input."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from medray.errors import ConfigError
from medray.models.compiled import Compiled
from medray.models.config import Compile, ModelConfig, Precision
from medray.models.exported import Exported
from medray.models.stain import macenko


def choose_device() -> torch.device:
    """Return the GPU if there is one (not one that Ray only declares), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of autocast; `auto`: bfloat16 where the hardware supports it.

    Raises:
        ConfigError: float16 on a CPU.
    """
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if fast else torch.float16
        return torch.bfloat16 if _cpu_is_fast_in_bfloat16() else torch.float32
    if precision == "float16" and device.type == "cpu":
        raise ConfigError("precision float16 needs a GPU; use bfloat16 or float32")
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def chooses_to_compile(
    asked: Compile, models: Sequence[nn.Module], device: torch.device
) -> bool:
    """Return whether models are compiled; `auto`: on a GPU, if all of them can be.

    Raises:
        ConfigError: `on`, but a model is exported for another runtime.
    """
    exported = any(isinstance(model, Exported) for model in models)
    if asked == "on" and exported:
        raise ConfigError(
            "compile: a model that `medray export` made for another runtime is not "
            "compiled; give --compile off, or the model that was trained"
        )
    return asked == "on" or (asked == "auto" and device.type == "cuda" and not exported)


def _cpu_is_fast_in_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


_LEAST_DEVIATION = 10.0  # of 255; added, so that the noise of empty glass stays small


class Normalise(nn.Module):
    """Normalisation of pixels to a model's input, in training and inference.

    Maps (N, 3, H, W) uint8 to (N, 3, H, W) float32, channels last.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Take stain, mean and standard deviation from a model's configuration."""
        super().__init__()
        self._stain, self._zscore = config.stain, config.zscore
        std = torch.tensor(config.std).reshape(1, 3, 1, 1)
        mean = torch.tensor(config.mean).reshape(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise a batch."""
        if self._stain == "macenko":
            images = macenko(images)
        # A copy in every case: what follows is done in place.
        inputs = images.to(torch.float32, copy=True, memory_format=torch.channels_last)
        if self._zscore:
            mean, deviation = _moments(images)
            inputs.sub_(mean).mul_(255 / (deviation + _LEAST_DEVIATION))
        return inputs.mul_(self.scale).add_(self.shift)


def _moments(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (N, 3, 1, 1) of the channels of each image.

    Sums of integers are exact, so they do not depend on batch or device.
    """
    count = images.shape[-2] * images.shape[-1]
    pixels = images.to(torch.int32)
    mean = pixels.sum((2, 3), keepdim=True, dtype=torch.int64).double() / count
    squares = pixels.square_().sum((2, 3), keepdim=True, dtype=torch.int64)
    variance = squares.double() / count - mean.square()
    return mean.float(), variance.clamp_min_(0).sqrt().float()


def standardise(
    measures: npt.NDArray[np.float64], config: ModelConfig, device: torch.device
) -> torch.Tensor:
    """Normalise a model's second input, in training and inference.

    Args:
        measures: (N, F) as stored in a dataset.
        config: Configuration of a model that takes them.
        device: Device of the result.

    Returns:
        (N, F) float32.
    """
    assert config.morphology is not None
    mean, std = np.array(config.morphology.mean), np.array(config.morphology.std)
    return torch.from_numpy(((measures - mean) / std).astype(np.float32)).to(device)


class Network:
    """A model with its normalisation, on its device.

    Maps (N, S, S, 3) uint8 windows to (N, C, S, S) logits; a classifier's logits are
    repeated for each pixel of the window.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        batch: int | None = None,
        threads: int = 1,
    ) -> None:
        """Fold batch normalisation, and move the model to the device.

        Args:
            model: The model as loaded.
            config: Its configuration.
            device: Device that it runs on.
            dtype: Precision: of autocast, or of the weights if compiled.
            batch: Compile it for batches of this many windows, without measures of
                cells; None: it is not compiled.
            threads: Number of threads that call a compiled model.

        Raises:
            CompileError: It cannot be compiled.
        """
        model = model.eval()
        if not isinstance(model, Exported):
            model = folded(model)
        model = model.to(device)
        model = model.to(memory_format=torch.channels_last)
        self._run: Callable[..., torch.Tensor] = model
        self.compiled_bytes = 0
        """Bytes of compiled weights on the device, which torch does not count."""
        if batch is not None:
            size, name = config.window.size, config.architecture
            compiled = Compiled(
                model,
                (batch, 3, size, size),
                device,
                dtype,
                name=f"{name.name} on {name.encoder}",
                threads=threads,
            )
            self._run, self.compiled_bytes = compiled, compiled.bytes
            dtype = (
                torch.float32
            )  # No autocast: weights and input already have the dtype.
        self._device, self._dtype = device, dtype
        self._normalise = Normalise(config).to(device)
        self._config = config

    def __call__(
        self, pixels: torch.Tensor, measures: npt.NDArray[np.float64] | None = None
    ) -> torch.Tensor:
        """Return the logits of windows; cells may come with (N, F) measures."""
        # (N, H, W, 3) seen as (N, 3, H, W) is already channels_last.
        inputs = self._normalise(pixels.permute(0, 3, 1, 2))
        beside: tuple[torch.Tensor, ...] = ()
        if measures is not None:
            beside = (standardise(measures, self._config, self._device),)
        with torch.autocast(
            self._device.type, self._dtype, enabled=self._dtype != torch.float32
        ):
            logits = self._run(inputs, *beside)
        if logits.ndim == 2:
            logits = logits[:, :, None, None].expand(-1, -1, *inputs.shape[2:])
        return logits


def folded(model: nn.Module) -> nn.Module:
    """Fold batch normalisation into the convolutions before it, where it can be traced.

    In float32 on a CPU a U-Net takes a sixth less time.
    """
    try:
        fused: nn.Module = fuse(model)
    except Exception:  # tracing can fail with any exception of the network's code
        return model
    return fused
