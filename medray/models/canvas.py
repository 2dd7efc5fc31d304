"""The state of a region while its windows are predicted, on the device.

One file, because a region's way onto the device, there and back is one thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


@dataclass(frozen=True)
class Streams:
    """Streams of a GPU on which pixels come and results go while it computes."""

    up: torch.cuda.Stream
    down: torch.cuda.Stream

    @classmethod
    def of(cls, device: torch.device) -> Streams:
        """Make two streams of a GPU."""
        up, down = (
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        return cls(up, down)


class Canvas:
    """The state of one region so far, on the device.

    Where windows are cropped, what they show is stacked, a batch at once, and laid side
    by side when the region is complete: one window costs the device nothing of its own.
    Where they are blended, scores are summed window by window.
    """

    def __init__(
        self,
        source: RegionPixels,
        config: ModelConfig,
        how: Prediction,
        choose: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
        streams: Streams | None = None,
    ) -> None:
        """Bring the pixels to the device.

        Args:
            source: The region.
            config: Of the model.
            how: How windows become classes.
            choose: Returns (h, w) uint8 classes of (C, h, w) scores.
            device: Where the model is.
            streams: Of a GPU.
        """
        plan, self._how = source.plan, how
        self._region, self._halo = plan.region, plan.halo
        self._windows = config.window
        self._choose = choose
        self._streams = streams
        self._pixels = _upload(source.pixels, device, streams)
        self._rows = _axis(source.height, self._windows, plan.rows, self._how, device)
        self._columns = _axis(
            source.width, self._windows, plan.columns, self._how, device
        )
        wanted = source.wanted
        shape = (len(self._rows), len(self._columns))
        todo = np.argwhere(np.ones(shape, bool) if wanted is None else wanted)
        self._todo: list[tuple[int, int]] = [(int(y), int(x)) for y, x in todo]
        self.missing = self.count = len(self._todo)
        self._area = (plan.region.height, plan.region.width)
        self._classes = len(config.classes)
        self._scores: torch.Tensor | None = None
        if how.stitch == "blend":
            self._scores = torch.zeros((self._classes, *self._area), device=device)
        side, uint8 = (config.window.size,) * 2, torch.uint8
        stacks = {"labels": ()} if how.stitch == "blend" else shown(how, self._classes)
        if how.stitch == "blend" and not how.quality:
            stacks = {}
        self._stacks = {
            name: torch.empty((self.count, *leading, *side), dtype=uint8, device=device)
            for name, leading in stacks.items()
        }
        self._sums = torch.zeros(self.count, device=device)
        self._fetched: dict[str, torch.Tensor] = {}
        self._arrived: torch.cuda.Event | None = None

    def cut(self, index: int) -> torch.Tensor:
        """Return the (S, S, 3) uint8 pixels of a wanted window, a view."""
        row, column = self._todo[index]
        y = self._rows[row].start - self._halo.y
        x = self._columns[column].start - self._halo.x
        size = self._windows.size
        return self._pixels[y : y + size, x : x + size]

    def keep(
        self, first: int, layers: Mapping[str, torch.Tensor], sums: torch.Tensor
    ) -> None:
        """Keep what N wanted windows show.

        Args:
            first: The first of them; they follow each other, row by row.
            layers: As of `RegionClasses`, each (N, ..., S, S).
            sums: (N,) sums of their scores: not finite if a score is not.
        """
        end = first + len(sums)
        self._sums[first:end] = sums
        for name, stack in self._stacks.items():
            stack[first:end] = layers[name]

    def blend(self, index: int, scores: torch.Tensor) -> None:
        """Add a wanted window's (C, S, S) scores by their weights.

        Windows come in the order of the slide's grid, so a pixel's float32 sum has the
        same terms in the same order however the slide is cut.
        """
        if self._scores is None:
            raise RuntimeError("blending keeps scores")
        row, column = self._todo[index]
        down, across = self._rows[row], self._columns[column]
        decided = _common(down.decides, across.decides, self._region)
        source = decided.slices(origin=self._window(down, across))
        target = decided.slices(origin=self._region)
        weight = down.weights[source[0], None] * across.weights[source[1]]
        self._scores[:, *target].addcmul_(scores[:, *source], weight)

    def fetch(self) -> None:
        """Complete the region, and start to copy it back from the device."""
        if self._scores is None:
            layers = {
                name: self._side_by_side(stack) for name, stack in self._stacks.items()
            }
        else:
            layers = as_layers(self._scores, self._choose(self._scores), self._how)
        layers["finite"] = torch.isfinite(self._sums.sum())
        if self._how.quality:
            layers["disagreement"] = self._disagreement(layers["labels"])
        self._stacks.clear()
        self._scores = None
        self._fetched = {
            name: _download(layer, self._streams) for name, layer in layers.items()
        }
        if self._streams is not None:
            self._arrived = self._streams.down.record_event()

    def result(self) -> RegionClasses:
        """Return what was fetched, once it is here."""
        if self._arrived is not None:
            self._arrived.synchronize()
        layers = {name: layer.numpy() for name, layer in self._fetched.items()}
        finite = bool(layers.pop("finite", True))
        return RegionClasses(**layers, finite=finite)

    def _window(self, down: _Window, across: _Window) -> Rectangle:
        size = self._windows.size
        return Rectangle(down.start, across.start, size, size)

    def _side_by_side(self, stack: torch.Tensor) -> torch.Tensor:
        """Return a layer of the region, (..., height, width), 0 where none is wanted.

        What a row of windows decides is one copy on the device.
        """
        indices = {place: index for index, place in enumerate(self._todo)}
        rows = []
        for row, down in enumerate(self._rows):
            parts = []
            for column, across in enumerate(self._columns):
                decided = _common(down.decides, across.decides, self._region)
                index = indices.get((row, column))
                if index is None:
                    area = (decided.height, decided.width)
                    parts.append(stack.new_zeros((*stack.shape[1:-2], *area)))
                else:
                    place = decided.slices(origin=self._window(down, across))
                    parts.append(stack[index, ..., *place])
            rows.append(torch.cat(parts, dim=-1))
        return torch.cat(rows, dim=-2)

    def _disagreement(self, labels: torch.Tensor) -> torch.Tensor:
        differs = torch.zeros_like(labels)
        for (row, column), seen in zip(self._todo, self._stacks["labels"], strict=True):
            window = self._window(self._rows[row], self._columns[column])
            covered = _common(
                (window.y, window.bottom), (window.x, window.right), self._region
            )
            here = covered.slices(origin=self._region)
            differs[here] |= seen[covered.slices(origin=window)] != labels[here]
        return differs


def shown(how: Prediction, classes: int) -> dict[str, tuple[int, ...]]:
    """Return the layers that scores become, each with its leading dimensions."""
    layers: dict[str, tuple[int, ...]] = {"labels": ()}
    if how.probabilities:
        layers["probabilities"] = (classes,)
    if how.quality:
        layers["uncertainty"] = ()
    return layers


def as_layers(
    scores: torch.Tensor, labels: torch.Tensor, how: Prediction
) -> dict[str, torch.Tensor]:
    """Return what scores become, as uint8.

    Args:
        scores: (..., C, h, w); probabilities, where more than labels is asked for.
        labels: (..., h, w) uint8 classes.
        how: What is asked for.
    """
    layers = {"labels": labels}
    if how.probabilities:
        layers["probabilities"] = _as_uint8(scores)
    if how.quality:
        layers["uncertainty"] = _as_uint8(_entropy(scores))
    return layers


def _common(
    rows: tuple[int, int], columns: tuple[int, int], region: Rectangle
) -> Rectangle:
    y0, y1 = max(rows[0], region.y), min(rows[1], region.bottom)
    x0, x1 = max(columns[0], region.x), min(columns[1], region.right)
    return Rectangle(y0, x0, max(0, y1 - y0), max(0, x1 - x0))


def _upload(
    pixels: UInt8, device: torch.device, streams: Streams | None
) -> torch.Tensor:
    """Bring pixels to the device; to a GPU through pinned memory, while it computes."""
    if streams is None:
        # The array may be a read-only view of Ray's store; it is only ever read.
        return torch.from_numpy(np.require(pixels, requirements=["C", "W"])).to(device)
    # torch keeps pinned memory for the next region, once the copy is done.
    pinned = torch.empty(pixels.shape, dtype=torch.uint8, pin_memory=True)
    np.copyto(pinned.numpy(), pixels)
    with torch.cuda.stream(streams.up):
        there = pinned.to(device, non_blocking=True)
    computing = torch.cuda.current_stream(device)
    computing.wait_stream(streams.up)
    there.record_stream(computing)
    return there


def _download(layer: torch.Tensor, streams: Streams | None) -> torch.Tensor:
    """Start a copy to the host; from a GPU into pinned memory, while it computes."""
    if streams is None:
        return layer.cpu()
    pinned = torch.empty(layer.shape, dtype=layer.dtype, pin_memory=True)
    streams.down.wait_stream(torch.cuda.current_stream(layer.device))
    with torch.cuda.stream(streams.down):
        pinned.copy_(layer, non_blocking=True)
    layer.record_stream(streams.down)
    return pinned


def _as_uint8(share: torch.Tensor) -> torch.Tensor:
    return (share * 255).round_().clamp_(0, 255).to(torch.uint8)


def _entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the entropy of (..., C, h, w) as a share of the most: (..., h, w)."""
    total: torch.Tensor = torch.special.entr(probabilities).sum(dim=-3)
    return total / float(np.log(max(2, probabilities.shape[-3])))


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
