"""A network on its device: where it runs, in which precision, fed with uint8."""

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
    """Take the GPU if there is one (a GPU that Ray only pretends to have is none)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of autocast; `auto`: bfloat16 where the device is good at it.

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
    """Tell whether models are compiled; `auto`: on a GPU, where all of them can be.

    Raises:
        ConfigError: A model that is another runtime's is to be compiled.
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


_LEAST_DEVIATION = 10.0  # of 255; added, so that the noise of glass stays small


class Normalise(nn.Module):
    """What makes a model's input of pixels; training and inference share it.

    Called with (N, 3, H, W) uint8 it gives (N, 3, H, W) float32, channels last.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        """Take staining, mean and deviation of a model's configuration."""
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

    Sums of integers are exact: a window's are the same in any batch, on any device.
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
    """Make a model's second input; training and inference share it.

    Args:
        measures: (N, F) as a dataset has them.
        config: Of a model that takes them.
        device: Where the input is to be.

    Returns:
        (N, F) float32.
    """
    assert config.morphology is not None
    mean, std = np.array(config.morphology.mean), np.array(config.morphology.std)
    return torch.from_numpy(((measures - mean) / std).astype(np.float32)).to(device)


class Network:
    """A model with its normalisation, on its device.

    Called with (N, S, S, 3) uint8 windows it gives (N, C, S, S) logits; those of a
    model that has one for a whole window hold for each of its pixels.
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
        """Fold what can be folded, and move the model.

        Args:
            model: As it was loaded.
            config: Its configuration.
            device: Where it is to run.
            dtype: Of its arithmetic: of autocast, or of the weights when compiled.
            batch: Compile it for batches of so many windows, without measures of
                cells; None: it is run as it is.
            threads: That call a compiled one.

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
        """Of compiled weights on the device, which torch does not count."""
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
            dtype = torch.float32  # of no autocast: it has cast all there is
        self._device, self._dtype = device, dtype
        self._normalise = Normalise(config).to(device)
        self._config = config

    def __call__(
        self, pixels: torch.Tensor, measures: npt.NDArray[np.float64] | None = None
    ) -> torch.Tensor:
        """Return the logits of windows; of cells (N, F) measures may go with them."""
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

    In float32 that saves a sixth of a U-Net's time on a CPU.
    """
    try:
        fused: nn.Module = fuse(model)
    except Exception:  # tracing stops at whatever the network's author wrote
        return model
    return fused
