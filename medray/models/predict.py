"""Trained models over regions: windows in, classes out, all on the device.

One file, because it is the path of a window through the device, top to bottom.
"""

from __future__ import annotations

import itertools
import operator
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from medray.errors import ConfigError
from medray.models.canvas import (
    Canvas,
    RegionClasses,
    RegionPixels,
    Streams,
    as_layers,
)
from medray.models.config import TURNS, ModelConfig, Prediction
from medray.models.crf import refine
from medray.models.folder import load_model
from medray.models.network import (
    Network,
    choose_device,
    choose_precision,
    chooses_to_compile,
)

# Pixels per batch on a CPU: the working set then fits the caches, and malloc keeps it
# (larger blocks are returned to the system and faulted in again: a sixth of the time).
_CPU_BATCH_PIXELS = 512 * 512

_Windows = Sequence[tuple[Canvas, int]]  # and which of its wanted windows
_Scored = tuple[torch.Tensor, torch.Tensor] | None


class Predictor:
    """One or several models, loaded once and applied to a stream of regions.

    Windows of successive regions share batches, and every batch has the same shape (the
    last one is padded with zeros), so a window's prediction does not depend on the
    other windows of its batch.

    On a GPU the calling thread starts one batch after another. On a CPU each thread
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
                for the whole window; all have the same classes and windows.
            how: How windows become classes.
            batch: Windows per batch; by default 25 on a GPU, on a CPU one of 512 x 512
                pixels or as many pixels in smaller ones.
            threads: Threads that predict on a CPU; by default one per core.
            device: By default the GPU if there is one.

        Raises:
            ConfigError: The models have different classes or windows.
            CompileError: A model cannot be compiled.
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
        self._blank = torch.zeros((size, size, 3), dtype=torch.uint8).to(self.device)
        self._streams: Streams | None = None
        if self.device.type == "cuda":
            self._streams = Streams.of(self.device)
        self.threads = 1
        self._pool: ThreadPoolExecutor | None = None
        if self.device.type == "cpu":
            self.threads = threads or os.cpu_count() or 1
            self._pool = ThreadPoolExecutor(
                self.threads, "predict", torch.set_num_threads, (1,)
            )
        self.compiled = chooses_to_compile(
            self.how.compile, [model for model, _ in models], self.device
        )
        self._networks = [
            Network(
                model,
                config,
                self.device,
                self.dtype,
                batch=self.batch if self.compiled else None,
                threads=self.threads,
            )
            for model, config in models
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
        """Run one batch in each thread, to set up all that is set up at first use."""
        for finish in [self._start([]) for _ in range(self.threads)]:
            finish()

    def time_batches(self) -> int:
        """Run one batch in each thread; return the number of windows."""
        self.warm_up()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return self.threads * self.batch

    @property
    def device_bytes(self) -> int:
        """Return the peak GPU memory so far, in bytes; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        compiled = sum(network.compiled_bytes for network in self._networks)
        return torch.cuda.max_memory_allocated() + compiled

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        """Run the first model's forward alone: (N, S, S, 3) uint8 to (N, C, S, S).

        N is at most `batch` if the model is compiled.
        """
        return self._networks[0](pixels)

    def scores(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the scores of windows; the most likely class has the highest.

        Args:
            pixels: (N, S, S, 3) uint8 RGB on the device.

        Returns:
            (N, C, S, S): logits where these suffice, else class probabilities in
            float32.
        """
        if not self._soft:
            return self.logits(pixels).contiguous()
        votes = [self._probabilities(network, pixels) for network in self._networks]
        if self.how.vote:
            classes = len(self.config.classes)
            # The higher mean probability decides a tie.
            votes = [_one_hot(vote, classes) + vote / 1e3 for vote in votes]
        total = votes[0]
        for vote in votes[1:]:
            total = total + vote
        scores = total / total.sum(dim=1, keepdim=True)
        return refine(scores, pixels, self.how.crf) if self.how.crf else scores

    def _probabilities(self, network: Network, pixels: torch.Tensor) -> torch.Tensor:
        symmetries = TURNS[self.how.tta]
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
        """Return each pixel's class: (..., C, h, w) scores to (..., h, w) uint8."""
        if self.how.thresholds:
            least = torch.tensor(self.how.thresholds, device=scores.device)
            low = scores < least[:, None, None]
            low[..., 0, :, :] = False
            scores = scores.masked_fill(low, -1.0)
            # The background wins only where no class reaches its threshold.
            reached = (~low[..., 1:, :, :]).any(dim=-3)
            scores[..., 0, :, :] = torch.where(reached, -0.5, scores[..., 0, :, :])
        return _likeliest(scores)

    @torch.inference_mode()
    def predict(self, regions: Iterable[RegionPixels]) -> Iterator[RegionClasses]:
        """Predict a stream of regions, in order.

        A region is taken from the stream once the windows before it are submitted, so
        the stream may block while it reads.

        Yields:
            The class of each pixel of `plan.region`.
        """
        canvases: deque[Canvas] = deque()
        pending: list[tuple[Canvas, int]] = []
        under_way: deque[tuple[_Windows, Callable[[], _Scored]]] = deque()
        fetched: deque[tuple[int, Canvas]] = deque()
        batches = 0
        # On a CPU each thread finds its next batch waiting. A GPU works asynchronously:
        # the caller waits for results of two batches ago, so that the device has work
        # while the caller handles a region.
        most, age = (2 * self.threads, 0) if self._pool else (0, 2)

        def start() -> Iterator[RegionClasses]:
            nonlocal batches
            under_way.append((tuple(pending), self._start(pending)))
            pending.clear()
            batches += 1
            while len(under_way) > most:
                finish()
            while fetched and fetched[0][0] <= batches - age:
                yield fetched.popleft()[1].result()

        def finish() -> None:
            windows, finished = under_way.popleft()
            scored = finished()
            if scored:
                _blend(windows, *scored)
            for canvas, _ in windows:
                canvas.missing -= 1
            while canvases and not canvases[0].missing:
                fetched.append((batches, canvases.popleft()))
                fetched[-1][1].fetch()

        for region in regions:
            canvas = Canvas(
                region,
                self.config,
                self.how,
                self.choose,
                self.device,
                self._streams,
            )
            canvases.append(canvas)
            for index in range(canvas.count):
                pending.append((canvas, index))
                if len(pending) == self.batch:
                    yield from start()
        if pending:
            yield from start()
        while under_way:
            finish()
        for canvas in canvases:  # of which no window is wanted
            canvas.fetch()
        for canvas in (*(canvas for _, canvas in fetched), *canvases):
            yield canvas.result()

    def _start(self, windows: _Windows) -> Callable[[], _Scored]:
        """Start a batch; return a function that waits for it."""
        todo = tuple(windows)
        if self._pool:
            return self._pool.submit(self._score, todo).result
        scored = self._score(todo)
        return lambda: scored

    @torch.inference_mode()
    def _score(self, windows: _Windows) -> _Scored:
        """Predict a batch.

        Where windows are cropped, their classes are stored with their regions at once.
        Where they are blended, their scores are returned, to be summed in the windows'
        order whichever thread finishes first.

        Returns:
            None, or (N, C, S, S) scores and (N, S, S) uint8 classes.
        """
        cuts = [canvas.cut(index) for canvas, index in windows]
        cuts.extend([self._blank] * (self.batch - len(cuts)))
        scores = self.scores(torch.stack(cuts))
        labels = self.choose(scores)
        if self.how.stitch == "blend":
            return scores, labels
        _keep(windows, as_layers(scores, labels, self.how), scores)
        return None


def _keep(
    windows: _Windows, layers: Mapping[str, torch.Tensor], scores: torch.Tensor
) -> None:
    # One sum per window shows whether all are finite: NaN and infinity carry over.
    sums = scores.sum((1, 2, 3), dtype=torch.float32)
    end = 0
    for canvas, group in itertools.groupby(windows, operator.itemgetter(0)):
        (_, first), *others = group
        start, end = end, end + 1 + len(others)
        parts = {name: layer[start:end] for name, layer in layers.items()}
        canvas.keep(first, parts, sums[start:end])


def _blend(windows: _Windows, scores: torch.Tensor, labels: torch.Tensor) -> None:
    _keep(windows, {"labels": labels}, scores)
    for (canvas, index), one in zip(windows, scores, strict=False):  # filled up
        canvas.blend(index, one)


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


def _likeliest(scores: torch.Tensor) -> torch.Tensor:
    """Return the class of the highest score; of equal scores the first.

    (..., C, h, w) to (..., h, w) uint8. `argmax` gives the same, but takes 15 times as
    long over so short an axis.
    """
    best = scores[..., 0, :, :].clone()
    labels = torch.zeros_like(best, dtype=torch.uint8)
    for value in range(1, scores.shape[-3]):
        score = scores[..., value, :, :]
        labels.masked_fill_(score > best, value)
        torch.maximum(best, score, out=best)
    return labels
