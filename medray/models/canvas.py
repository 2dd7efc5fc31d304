"""The state of a region while its windows are predicted, on the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from medray.geometry import (
    Rectangle,
    RegionWindows,
    Windows,
    window_reach,
    window_starts,
    window_weights,
)
from medray.models.config import ModelConfig, Prediction
from medray.types import UInt8


@dataclass(frozen=True)
class RegionPixels:
    """What the reader passes to the model.

    Attributes:
        pixels: (halo height, halo width, 3) uint8 RGB.
        plan: The region, its halo and its windows.
        height: Height of the slide at the working level, pixels.
        width: Width of the slide at the working level, pixels.
        wanted: (rows, columns) bool, which of the region's windows to predict; what no
            wanted window decides becomes class 0. None: all.
    """

    pixels: UInt8
    plan: RegionWindows
    height: int
    width: int
    wanted: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class RegionClasses:
    """What the model predicts for a region.

    Attributes:
        labels: (height, width) uint8 class of each pixel.
        probabilities: (classes, height, width) uint8, 255 is certain; None unless
            asked for.
        uncertainty: (height, width) uint8 entropy of the class probabilities, 255 is
            all classes alike; None unless asked for.
        disagreement: (height, width) uint8, 1 where a window of this region that covers
            the pixel sees another class than the mask's; None unless asked for.
        finite: Whether all scores were finite numbers; if not the rest means nothing.
    """

    labels: UInt8
    probabilities: UInt8 | None = None
    uncertainty: UInt8 | None = None
    disagreement: UInt8 | None = None
    finite: bool = True


class Canvas:
    """The state of one region so far, on the device."""

    def __init__(
        self,
        source: RegionPixels,
        config: ModelConfig,
        how: Prediction,
        choose: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> None:
        """Bring the pixels to the device.

        Args:
            source: The region.
            config: Of the model.
            how: How windows become classes.
            choose: Returns (h, w) uint8 classes of (C, h, w) scores.
            device: Where the model is.
        """
        plan, self._how = source.plan, how
        self._region, self._halo = plan.region, plan.halo
        self._windows = config.window
        self._choose = choose
        self._pixels = _upload(source.pixels, device)
        self._rows = _axis(source.height, self._windows, plan.rows, self._how, device)
        self._columns = _axis(
            source.width, self._windows, plan.columns, self._how, device
        )
        wanted = source.wanted
        shape = (len(self._rows), len(self._columns))
        self._wanted = np.ones(shape, bool) if wanted is None else wanted
        self.missing = int(self._wanted.sum())
        area = (plan.region.height, plan.region.width)
        classes = len(config.classes)
        self._labels = torch.zeros(area, dtype=torch.uint8, device=device)
        keep_scores = self._how.stitch == "blend" or how.probabilities
        keep_scores = keep_scores or self._how.quality
        self._scores = (
            torch.zeros((classes, *area), device=device) if keep_scores else None
        )
        self.sums: list[torch.Tensor] = []
        self._seen: list[tuple[Rectangle, torch.Tensor]] = []
        self._fetched: dict[str, torch.Tensor] = {}
        self._arrived: torch.cuda.Event | None = None

    def todo(self) -> Iterator[tuple[int, int]]:
        """Yield the wanted windows, row by row."""
        for row, column in np.argwhere(self._wanted):
            yield int(row), int(column)

    def cut(self, row: int, column: int) -> torch.Tensor:
        """Return the (S, S, 3) uint8 pixels of a window."""
        y = self._rows[row].start - self._halo.y
        x = self._columns[column].start - self._halo.x
        size = self._windows.size
        return self._pixels[y : y + size, x : x + size]

    def add(
        self, row: int, column: int, scores: torch.Tensor, labels: torch.Tensor
    ) -> None:
        """Add a window's (C, S, S) scores and (S, S) classes where it decides.

        Windows come in the order of the slide's grid, so with blending a pixel's
        float32 sum has the same terms in the same order however the slide is cut.
        """
        down, across = self._rows[row], self._columns[column]
        size, region = self._windows.size, self._region
        decided = _common(down.decides, across.decides, region)
        source = decided.slices(origin=Rectangle(down.start, across.start, size, size))
        target = decided.slices(origin=region)
        if self._how.stitch == "crop":
            self._labels[target] = labels[source]
        if self._scores is not None and self._how.stitch == "crop":
            self._scores[:, *target] = scores[:, *source]
        elif self._scores is not None:
            weight = down.weights[source[0], None] * across.weights[source[1]]
            self._scores[:, *target].addcmul_(scores[:, *source], weight)
        if self._how.quality:
            covered = _common(
                (down.start, down.start + size),
                (across.start, across.start + size),
                region,
            )
            part = covered.slices(
                origin=Rectangle(down.start, across.start, size, size)
            )
            self._seen.append((covered, labels[part].clone()))

    def count_down(self) -> None:
        """Count one more window as predicted."""
        self.missing -= 1
        if self.missing == 0 and self._how.stitch == "blend":
            if self._scores is None:
                raise RuntimeError("blending keeps scores")
            self._labels = self._choose(self._scores)

    def fetch(self) -> None:
        """Start to copy the region's result back from the device."""
        layers = {"labels": self._labels}
        if self.sums:
            layers["finite"] = torch.isfinite(torch.stack(self.sums).sum())
            self.sums.clear()
        if self._scores is not None and self._how.probabilities:
            layers["probabilities"] = _as_uint8(self._scores)
        if self._scores is not None and self._how.quality:
            layers["uncertainty"] = _as_uint8(_entropy(self._scores))
            differs = torch.zeros_like(self._labels)
            for covered, seen in self._seen:
                place = covered.slices(origin=self._region)
                differs[place] |= seen != self._labels[place]
            layers["disagreement"] = differs
        self._seen.clear()
        self._scores = None
        self._fetched = {name: _download(layer) for name, layer in layers.items()}
        if self._labels.is_cuda:
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record()

    def result(self) -> RegionClasses:
        """Return what was fetched, once it is here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        layers = {name: layer.numpy() for name, layer in self._fetched.items()}
        finite = bool(layers.pop("finite", True))
        return RegionClasses(**layers, finite=finite)


def _common(
    rows: tuple[int, int], columns: tuple[int, int], region: Rectangle
) -> Rectangle:
    y0, y1 = max(rows[0], region.y), min(rows[1], region.bottom)
    x0, x1 = max(columns[0], region.x), min(columns[1], region.right)
    return Rectangle(y0, x0, y1 - y0, x1 - x0)


def _upload(pixels: UInt8, device: torch.device) -> torch.Tensor:
    """Bring pixels to the device; to a GPU through pinned memory, without waiting."""
    if device.type == "cpu":
        # The array may be a read-only view of Ray's store; it is only ever read.
        return torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
    pinned = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
    np.copyto(pinned.numpy(), pixels)
    return pinned.to(device, non_blocking=True)


def _download(layer: torch.Tensor) -> torch.Tensor:
    """Start a copy to the host; from a GPU into pinned memory, without waiting."""
    if not layer.is_cuda:
        return layer
    pinned = torch.empty(layer.shape, dtype=layer.dtype, pin_memory=True)
    return pinned.copy_(layer, non_blocking=True)


def _as_uint8(share: torch.Tensor) -> torch.Tensor:
    return (share * 255).round_().clamp_(0, 255).to(torch.uint8)


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the entropy of (C, h, w) as a share of the greatest possible: (h, w)."""
    total: torch.Tensor = torch.special.entr(probabilities).sum(dim=0)
    return total / float(np.log(max(2, len(probabilities))))


@dataclass(frozen=True)
class _Window:
    """A window along one axis: where it begins, what it decides, with what weights."""

    start: int
    decides: tuple[int, int]
    weights: torch.Tensor


def _axis(
    length: int,
    windows: Windows,
    indices: tuple[int, int],
    how: Prediction,
    device: torch.device,
) -> list[_Window]:
    first, end = indices
    starts = window_starts(length, windows)
    begins, ends = window_reach(length, windows, how.stitch)
    weights = torch.empty((len(starts), 0), device=device)
    if how.stitch == "blend":
        weights = torch.from_numpy(window_weights(length, windows)).to(device)
    return [
        _Window(int(starts[i]), (int(begins[i]), int(ends[i])), weights[i])
        for i in range(first, end)
    ]
