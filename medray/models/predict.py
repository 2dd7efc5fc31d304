"""A trained model over regions: windows in, classes out, all on the device."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from medray.errors import ConfigError
from medray.grid import RegionWindows, Windows, window_starts, window_weights
from medray.models.config import ModelConfig
from medray.models.folder import load_model

Precision = Literal["auto", "float32", "bfloat16", "float16"]
UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class RegionPixels:
    """What the reader hands to the model.

    Attributes:
        pixels: (halo height, halo width, 3) uint8 RGB.
        plan: The region, its halo and its windows.
        height: Height of the slide at the working level, pixels.
        width: Likewise its width.
    """

    pixels: UInt8
    plan: RegionWindows
    height: int
    width: int


@dataclass(frozen=True)
class RegionClasses:
    """What the model makes of a region.

    Attributes:
        labels: (height, width) uint8 class of each pixel.
        probabilities: (classes, height, width) uint8, 255 is certain; None unless
            asked for.
    """

    labels: UInt8
    probabilities: UInt8 | None


def choose_device() -> torch.device:
    """Take the GPU if there is one (a GPU that Ray only pretends to have is none)."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """Give the dtype of autocast; `auto` takes bfloat16 where the device is good at it.

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


def _cpu_is_fast_in_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class Predictor:
    """A model folder, loaded once, applied to many regions.

    Windows of the regions of one call share batches, and every batch has the same
    shape (the last one is filled up with zeros), so a window's prediction does not
    depend on what else is predicted beside it.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ModelConfig,
        *,
        precision: Precision = "auto",
        batch: int | None = None,
        device: torch.device | None = None,
        probabilities: bool = False,
    ) -> None:
        """Move the model to its device.

        Args:
            model: Maps (N, 3, S, S) to (N, C, S, S) logits.
            config: How the model must be fed.
            precision: Of the model's arithmetic; blending is always float32.
            batch: Windows a batch; by default 5 on a CPU (which divides the 25 windows
                of a 2048 x 2048 slide) and 25 on a GPU.
            device: By default the GPU if there is one.
            probabilities: Return them beside the labels.
        """
        self.device = device or choose_device()
        self.dtype = choose_precision(precision, self.device)
        self.config = config
        self.batch = batch or (5 if self.device.type == "cpu" else 25)
        self.probabilities = probabilities
        self._model = model.to(self.device).to(memory_format=torch.channels_last)
        shape = (1, 3, 1, 1)
        self._mean = torch.tensor(config.mean, device=self.device).reshape(shape)
        self._std = torch.tensor(config.std, device=self.device).reshape(shape)

    @classmethod
    def from_folder(
        cls,
        folder: str,
        *,
        precision: Precision = "auto",
        batch: int | None = None,
        probabilities: bool = False,
    ) -> Predictor:
        """Load a model folder (see medray.models.folder)."""
        model, config = load_model(folder)
        return cls(
            model,
            config,
            precision=precision,
            batch=batch,
            probabilities=probabilities,
        )

    def windows(self, pixels: torch.Tensor) -> torch.Tensor:
        """Give class probabilities of windows.

        Args:
            pixels: (N, 3, S, S) uint8 on the device.

        Returns:
            (N, C, S, S) float32.
        """
        inputs = pixels.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)
        inputs = inputs.contiguous(memory_format=torch.channels_last)
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=enabled):
            logits = self._model(inputs)
        # Class by class in memory: the softmax and all that follows then run over long
        # rows, several times faster than over two or three classes at a time.
        return torch.softmax(logits.float().contiguous(), dim=1)

    @torch.inference_mode()
    def predict(self, regions: Sequence[RegionPixels]) -> Iterator[RegionClasses]:
        """Predict regions, in their order.

        Yields:
            Class of every pixel of `plan.region`, the overlapping windows blended.
        """
        canvases = [_Canvas(region, self.config, self.device) for region in regions]
        pending: list[tuple[_Canvas, int]] = []
        todo = [(canvas, i) for canvas in canvases for i in range(len(canvas))]
        for window in todo:
            pending.append(window)
            if len(pending) == self.batch or window is todo[-1]:
                self._blend(pending)
                pending = []
        for canvas in canvases:
            yield canvas.classes(self.probabilities)

    def _blend(self, windows: Sequence[tuple[_Canvas, int]]) -> None:
        size = self.config.window.size
        batch = torch.zeros(
            (self.batch, 3, size, size), dtype=torch.uint8, device=self.device
        )
        for i, (canvas, window) in enumerate(windows):
            batch[i] = canvas.cut(window)
        for probability, (canvas, window) in zip(
            self.windows(batch), windows, strict=False
        ):
            canvas.add(window, probability)


class _Canvas:
    """The sum of weighted window probabilities over one region, on the device."""

    def __init__(
        self, source: RegionPixels, config: ModelConfig, device: torch.device
    ) -> None:
        plan, self._config = source.plan, config
        self._region, self._halo = plan.region, plan.halo
        pixels = torch.from_numpy(np.ascontiguousarray(source.pixels)).to(device)
        self._pixels = pixels.permute(2, 0, 1)
        self._rows = _axis(source.height, config.window, plan.rows, device)
        self._columns = _axis(source.width, config.window, plan.columns, device)
        shape = (len(config.classes), plan.region.height, plan.region.width)
        self._sum = torch.zeros(shape, device=device)

    def __len__(self) -> int:
        return len(self._rows) * len(self._columns)

    def cut(self, window: int) -> torch.Tensor:
        """Give the (3, S, S) uint8 pixels of a window."""
        (y, _), (x, _) = self._position(window)
        y, x, size = y - self._halo.y, x - self._halo.x, self._config.window.size
        return self._pixels[:, y : y + size, x : x + size]

    def _position(
        self, window: int
    ) -> tuple[tuple[int, torch.Tensor], tuple[int, torch.Tensor]]:
        row, column = divmod(window, len(self._columns))
        return self._rows[row], self._columns[column]

    def add(self, window: int, probability: torch.Tensor) -> None:
        """Blend in a window's (C, S, S) probabilities where it meets the region.

        Windows are added in the order of the slide's grid, so a pixel's float32 sum
        has the same terms in the same order however the slide is cut.
        """
        (y, weight_y), (x, weight_x) = self._position(window)
        size, region = self._config.window.size, self._region
        y0, y1 = max(y, region.y), min(y + size, region.bottom)
        x0, x1 = max(x, region.x), min(x + size, region.right)
        part = probability[:, y0 - y : y1 - y, x0 - x : x1 - x]
        weight = weight_y[y0 - y : y1 - y, None] * weight_x[x0 - x : x1 - x]
        self._sum[
            :, y0 - region.y : y1 - region.y, x0 - region.x : x1 - region.x
        ].addcmul_(part, weight)

    def classes(self, with_probabilities: bool) -> RegionClasses:
        """Take the likeliest class of every pixel."""
        labels = _likeliest(self._sum).cpu().numpy()
        if not with_probabilities:
            return RegionClasses(labels, None)
        scaled = (self._sum * 255).round_().clamp_(0, 255).to(torch.uint8)
        return RegionClasses(labels, scaled.cpu().numpy())


def _likeliest(scores: torch.Tensor) -> torch.Tensor:
    """Give the class of the highest score, of equal ones the first: (C, h, w) to uint8.

    `argmax` says the same, but over so short a first axis it takes 15 times as long.
    """
    best = scores[0].clone()
    labels = torch.zeros_like(best, dtype=torch.uint8)
    for value in range(1, len(scores)):
        labels.masked_fill_(scores[value] > best, value)
        torch.maximum(best, scores[value], out=best)
    return labels


def _axis(
    length: int, windows: Windows, indices: tuple[int, int], device: torch.device
) -> list[tuple[int, torch.Tensor]]:
    """Give first pixel and blending weights (S,) of the windows of one axis."""
    first, end = indices
    starts = window_starts(length, windows)[first:end]
    weights = torch.from_numpy(window_weights(length, windows)[first:end]).to(device)
    return [(int(start), weight) for start, weight in zip(starts, weights, strict=True)]


def use_threads(count: int) -> None:
    """Give torch `count` CPU threads."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)
