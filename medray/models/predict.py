"""Trained models over regions: windows in, classes out, all on the device."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.fx.experimental.optimization import fuse

from medray.errors import ConfigError
from medray.grid import (
    Rectangle,
    RegionWindows,
    Windows,
    window_reach,
    window_starts,
    window_weights,
)
from medray.models.config import ModelConfig, Precision, Prediction, Tta
from medray.models.crf import refine
from medray.models.folder import load_model

UInt8 = npt.NDArray[np.uint8]

# (quarter turns, then mirrored): the symmetries of a square, the identity first.
_TURNS: dict[Tta, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "all": tuple((turns, mirror) for mirror in (False, True) for turns in range(4)),
}


@dataclass(frozen=True)
class RegionPixels:
    """What the reader hands to the model.

    Attributes:
        pixels: (halo height, halo width, 3) uint8 RGB.
        plan: The region, its halo and its windows.
        height: Height of the slide at the working level, pixels.
        width: Likewise its width.
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
    """What the model makes of a region.

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


# Pixels of a batch on a CPU: what it needs then fits the caches, and malloc keeps it
# (larger blocks go back to the system and are faulted in again, a sixth of the time).
_CPU_BATCH_PIXELS = 512 * 512

_Windows = Sequence[tuple["_Canvas", int, int]]
_Scored = tuple[torch.Tensor, torch.Tensor] | None


class Predictor:
    """One model or several, loaded once, applied to a stream of regions.

    Windows of successive regions share batches, and every batch has the same shape (the
    last one is filled up with zeros), so a window's prediction does not depend on what
    else is predicted beside it.

    A GPU is given one batch after the other by the calling thread. On a CPU each thread
    predicts batches of its own: threads that share a batch wait for each other at every
    layer, and all of them whenever one is interrupted.
    """

    def __init__(
        self,
        models: Sequence[tuple[nn.Module, ModelConfig]],
        how: Prediction | None = None,
        *,
        batch: int | None = None,
        threads: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        """Move the models to their device.

        Args:
            models: Each maps (N, 3, S, S) to (N, C, S, S) logits, or to (N, C) logits
                that hold for the whole window; classes and windows are the same.
            how: How windows become classes.
            batch: Windows a batch; by default 25 on a GPU, on a CPU one of 512 pixels a
                side or as many smaller ones.
            threads: That predict on a CPU; by default one a core.
            device: By default the GPU if there is one.

        Raises:
            ConfigError: The models do not fit each other.
        """
        self.how = how or Prediction()
        self.device = device or choose_device()
        self.dtype = choose_precision(self.how.precision, self.device)
        self.config = models[0][1]
        for _, other in models[1:]:
            _check_alike(self.config, other)
        size = self.config.window.size
        fitting = max(1, _CPU_BATCH_PIXELS // size**2)
        self.batch = batch or (fitting if self.device.type == "cpu" else 25)
        self.threads = 1
        self._pool: ThreadPoolExecutor | None = None
        if self.device.type == "cpu":
            self.threads = threads or os.cpu_count() or 1
            self._pool = ThreadPoolExecutor(
                self.threads, "predict", torch.set_num_threads, (1,)
            )
        self._networks = [
            _Network(model, config, self.device, self.dtype) for model, config in models
        ]
        self._soft = (
            len(models) > 1
            or self.how.stitch == "blend"
            or self.how.tta != "none"
            or bool(self.how.thresholds)
            or self.how.crf > 0
            or self.how.probabilities
            or self.how.quality
        )

    @classmethod
    def from_folders(
        cls,
        folders: Sequence[str],
        how: Prediction | None = None,
        *,
        batch: int | None = None,
        threads: int | None = None,
    ) -> Predictor:
        """Load model folders (see medray.models.folder)."""
        models = [load_model(folder) for folder in folders]
        return cls(models, how, batch=batch, threads=threads)

    def warm_up(self) -> None:
        """Run a batch in each thread: what is chosen at first use is then ready."""
        for finish in [self._start([]) for _ in range(self.threads)]:
            finish()

    def time_batches(self) -> int:
        """Run a batch in each thread, and give how many windows that were."""
        self.warm_up()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.threads * self.batch

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Run the first model's forward alone: (N, S, S, 3) uint8 to (N, C, S, S)."""
        return self._networks[0](pixels)

    def scores(self, pixels: torch.Tensor) -> torch.Tensor:
        """Give the windows' scores: the likeliest class has the highest.

        Args:
            pixels: (N, S, S, 3) uint8 RGB on the device.

        Returns:
            (N, C, S, S): the logits where they are all that is needed, else class
            probabilities in float32.
        """
        if not self._soft:
            return self.logits(pixels).contiguous()
        votes = [self._probabilities(network, pixels) for network in self._networks]
        if self.how.vote:
            classes = len(self.config.classes)
            # Of equally many votes the higher mean probability decides.
            votes = [_one_hot(vote, classes) + vote / 1e3 for vote in votes]
        total = votes[0]
        for vote in votes[1:]:
            total = total + vote
        scores = total / total.sum(dim=1, keepdim=True)
        return refine(scores, pixels, self.how.crf) if self.how.crf else scores

    def _probabilities(self, network: _Network, pixels: torch.Tensor) -> torch.Tensor:
        symmetries = _TURNS[self.how.tta]
        total: torch.Tensor | None = None
        for turns, mirror in symmetries:
            turned = torch.rot90(pixels, turns, (1, 2))
            turned = turned.flip(2) if mirror else turned
            # Class by class in memory: the softmax and all that follows then run over
            # long rows, several times faster than over two or three classes at a time.
            logits = network(turned.contiguous()).float().contiguous()
            soft = torch.softmax(logits, dim=1)
            soft = soft.flip(3) if mirror else soft
            soft = torch.rot90(soft, -turns, (2, 3))
            total = soft if total is None else total.add_(soft)
        if total is None:
            raise RuntimeError("there is always the identity")
        return total.div_(len(symmetries)).contiguous()

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """Give the class of each pixel: (..., C, h, w) scores to (..., h, w) uint8."""
        if self.how.thresholds:
            least = torch.tensor(self.how.thresholds, device=scores.device)
            low = scores < least[:, None, None]
            low[..., 0, :, :] = False
            scores = scores.masked_fill(low, -1.0)
            # Background is what remains: it wins only where no class reaches its own.
            reached = (~low[..., 1:, :, :]).any(dim=-3)
            scores[..., 0, :, :] = torch.where(reached, -0.5, scores[..., 0, :, :])
        return _likeliest(scores)

    @torch.inference_mode()
    def predict(self, regions: Iterable[RegionPixels]) -> Iterator[RegionClasses]:
        """Predict a stream of regions, in their order.

        A region is taken from the stream when the windows before it are under way, so
        the stream may read ahead and wait for pixels as it likes.

        Yields:
            The class of every pixel of `plan.region`.
        """
        canvases: deque[_Canvas] = deque()
        pending: list[tuple[_Canvas, int, int]] = []
        under_way: deque[tuple[_Windows, Callable[[], _Scored]]] = deque()
        fetched: deque[_Canvas] = deque()
        # On a CPU each thread finds its next batch waiting. A GPU works behind the
        # caller's back anyhow: there a region is taken once the next batch is under
        # way, so that the GPU has work while the caller sees to the region.
        most = 2 * self.threads if self._pool else 0

        def start() -> Iterator[RegionClasses]:
            ready = len(fetched)
            under_way.append((tuple(pending), self._start(pending)))
            pending.clear()
            while len(under_way) > most:
                finish()
            for _ in range(len(fetched) if self._pool else ready):
                yield fetched.popleft().result()

        def finish() -> None:
            windows, finished = under_way.popleft()
            scored = finished()
            if scored:
                _add(windows, *scored)
            for canvas, _, _ in windows:
                canvas.count_down()
            while canvases and not canvases[0].missing:
                fetched.append(canvases.popleft())
                fetched[-1].fetch()

        for region in regions:
            canvas = _Canvas(region, self)
            canvases.append(canvas)
            for row, column in canvas.todo():
                pending.append((canvas, row, column))
                if len(pending) == self.batch:
                    yield from start()
        if pending:
            yield from start()
        while under_way:
            finish()
        for canvas in canvases:  # of which no window is wanted
            canvas.fetch()
        for canvas in (*fetched, *canvases):
            yield canvas.result()

    def _start(self, windows: _Windows) -> Callable[[], _Scored]:
        """Start a batch; what is returned waits for it."""
        todo = tuple(windows)
        if self._pool:
            return self._pool.submit(self._score, todo).result
        scored = self._score(todo)
        return lambda: scored

    @torch.inference_mode()
    def _score(self, windows: _Windows) -> _Scored:
        """Predict a batch.

        Where windows are cropped each decides pixels of its own, so this thread notes
        them at once (to hand them over costs a tenth of the time: memory that another
        thread frees is not used again). Where they are blended, their scores are given
        back, to be summed in the windows' order whichever thread was faster.

        Returns:
            None, or (N, C, S, S) scores and (N, S, S) uint8 classes.
        """
        size = self.config.window.size
        shape = (self.batch, size, size, 3)
        batch = torch.empty(shape, dtype=torch.uint8, device=self.device)
        for i, (canvas, row, column) in enumerate(windows):
            batch[i] = canvas.cut(row, column)
        batch[len(windows) :] = 0
        scores = self.scores(batch)
        labels = self.choose(scores)
        if self.how.stitch == "blend":
            return scores, labels
        _add(windows, scores, labels)
        return None


def _add(windows: _Windows, scores: torch.Tensor, labels: torch.Tensor) -> None:
    # One number a window tells whether all are finite: NaN and infinity carry over.
    sums = scores.sum((1, 2, 3), dtype=torch.float32)
    for i, (canvas, row, column) in enumerate(windows):
        canvas.add(row, column, scores[i], labels[i])
        canvas.sums.append(sums[i])


class _Network:
    """A model with its normalisation, on its device, fed with uint8 windows."""

    def __init__(
        self,
        model: nn.Module,
        config: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        model = _folded(model.eval()).to(device)
        self._model = model.to(memory_format=torch.channels_last)
        self._device, self._dtype = device, dtype
        std = torch.tensor(config.std, device=device).reshape(1, 3, 1, 1)
        mean = torch.tensor(config.mean, device=device).reshape(1, 3, 1, 1)
        self._scale, self._shift = 1 / (255 * std), -mean / std

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        # (N, H, W, 3) seen as (N, 3, H, W) is already channels_last.
        inputs = pixels.permute(0, 3, 1, 2).to(torch.float32)
        inputs = inputs.mul_(self._scale).add_(self._shift)
        with torch.autocast(
            self._device.type, self._dtype, enabled=self._dtype != torch.float32
        ):
            logits: torch.Tensor = self._model(inputs)
        if logits.ndim == 2:
            logits = logits[:, :, None, None].expand(-1, -1, *inputs.shape[2:])
        return logits


def _folded(model: nn.Module) -> nn.Module:
    """Fold batch normalisation into the convolutions before it, where it can be traced.

    In float32 that saves a sixth of a U-Net's time on a CPU.
    """
    try:
        folded: nn.Module = fuse(model)
    except Exception:  # tracing stops at whatever the network's author wrote
        return model
    return folded


def _check_alike(one: ModelConfig, other: ModelConfig) -> None:
    for name in ("classes", "window", "mpp"):
        if getattr(one, name) != getattr(other, name):
            raise ConfigError(
                f"models of one ensemble need the same {name}, found "
                f"{getattr(one, name)} and {getattr(other, name)}"
            )


def _one_hot(scores: torch.Tensor, classes: int) -> torch.Tensor:
    labels = _likeliest(scores)
    return torch.stack([labels == value for value in range(classes)], 1).float()


class _Canvas:
    """What is known of one region so far, on the device."""

    def __init__(self, source: RegionPixels, owner: Predictor) -> None:
        plan, self._how = source.plan, owner.how
        self._region, self._halo = plan.region, plan.halo
        self._windows = owner.config.window
        self._choose = owner.choose
        device = owner.device
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
        classes = len(owner.config.classes)
        self._labels = torch.zeros(area, dtype=torch.uint8, device=device)
        keep_scores = self._how.stitch == "blend" or owner.how.probabilities
        keep_scores = keep_scores or self._how.quality
        self._scores = (
            torch.zeros((classes, *area), device=device) if keep_scores else None
        )
        self.sums: list[torch.Tensor] = []
        self._seen: list[tuple[Rectangle, torch.Tensor]] = []
        self._fetched: dict[str, torch.Tensor] = {}
        self._arrived: torch.cuda.Event | None = None

    def todo(self) -> Iterator[tuple[int, int]]:
        """Give the wanted windows, row by row."""
        for row, column in np.argwhere(self._wanted):
            yield int(row), int(column)

    def cut(self, row: int, column: int) -> torch.Tensor:
        """Give the (S, S, 3) uint8 pixels of a window."""
        y = self._rows[row].start - self._halo.y
        x = self._columns[column].start - self._halo.x
        size = self._windows.size
        return self._pixels[y : y + size, x : x + size]

    def add(
        self, row: int, column: int, scores: torch.Tensor, labels: torch.Tensor
    ) -> None:
        """Take a window's (C, S, S) scores and (S, S) classes where it decides.

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
        """Note that one window more is there."""
        self.missing -= 1
        if self.missing == 0 and self._how.stitch == "blend":
            if self._scores is None:
                raise RuntimeError("blending keeps scores")
            self._labels = self._choose(self._scores)

    def fetch(self) -> None:
        """Start to bring what has become of the region back from the device."""
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
        """Give what was fetched, once it is here."""
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
    """Give the entropy of (C, h, w) as a share of the greatest possible: (h, w)."""
    total: torch.Tensor = torch.special.entr(probabilities).sum(dim=0)
    return total / float(np.log(max(2, len(probabilities))))


def _likeliest(scores: torch.Tensor) -> torch.Tensor:
    """Give the class of the highest score, of equal ones the first.

    (..., C, h, w) to (..., h, w) uint8. `argmax` says the same, but over so short an
    axis it takes 15 times as long.
    """
    best = scores[..., 0, :, :].clone()
    labels = torch.zeros_like(best, dtype=torch.uint8)
    for value in range(1, scores.shape[-3]):
        score = scores[..., value, :, :]
        labels.masked_fill_(score > best, value)
        torch.maximum(best, score, out=best)
    return labels


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
