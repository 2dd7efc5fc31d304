"""Whether stitching can be trusted: checks for any engine for whole slides.

An engine is a function from pixels, model and windows to a mask. The models below make
the right mask known beforehand: one sees its own input, one sees a constant, one is
wrong near the border of its window as convolutions are. `check_engine` needs nothing
but the engine; what only medray promises (regions, weights, workers) is in
`check_medray`. docs/conformance.md shows the results, other engines' among them.

Neither Ray nor medray's own engine is imported before it is checked, so that this file
runs in another engine's environment.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from medray.geometry import (
    Stitch,
    Windows,
    plan_regions,
    region_windows,
    window_reach,
    window_weights,
    windows_over,
)
from medray.types import UInt8

if TYPE_CHECKING:
    from medray.models.canvas import RegionPixels
    from medray.models.predict import Predictor


Engine = Callable[[UInt8, nn.Module, Windows, int], UInt8]
"""(H, W, 3) uint8 pixels, a model, windows and a batch size to a (H, W) uint8 mask. The
model takes (N, 3, S, S) float32 of 0 to 255 and gives (N, CLASSES, S, S) probabilities.
"""

CLASSES = 4
WINDOWS = Windows(128, 96)
# Smaller than a window, thinner than one, no multiple of the stride, and one.
SIZES = ((100, 90), (129, 64), (300, 411), (320, 320))


@dataclass(frozen=True)
class Check:
    """What came of one check.

    Attributes:
        name: Of the check.
        asked: What must hold.
        passed: Whether it does.
        found: What was seen.
    """

    name: str
    asked: str
    passed: bool
    found: str


class Identity(nn.Module):
    """Sees the class that the red channel names."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Give certainty of class `red` at each pixel."""
        # What an engine pads with may be no class.
        red = pixels[:, 0].round().long().clamp(0, CLASSES - 1)
        hot = nn.functional.one_hot(red, CLASSES)
        return hot.permute(0, 3, 1, 2).float()


class Constant(nn.Module):
    """Sees class 3 everywhere."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Give certainty of class 3 at each pixel."""
        n, _, height, width = pixels.shape
        scores = torch.zeros(n, CLASSES, height, width)
        scores[:, 3] = 1
        return scores


class WrongAtBorders(nn.Module):
    """Sees class 0 within `border` pixels of its window's border, else class 1."""

    def __init__(self, border: int) -> None:
        super().__init__()
        self.border = border

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Give certainty at each pixel, of the right class or of the wrong one."""
        n, _, height, width = pixels.shape
        scores = torch.zeros(n, CLASSES, height, width)
        scores[:, 0] = 1
        inside = slice(self.border, -self.border)
        scores[:, 1, inside, inside], scores[:, 0, inside, inside] = 1, 0
        return scores


class Network(nn.Module):
    """A small convolutional network of random weights."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 7, padding=3), nn.ReLU(), nn.Conv2d(16, CLASSES, 7, 1, 3)
        )
        for weights in self.parameters():
            weights.data = torch.randn(weights.shape, generator=generator) / 7
        self.requires_grad_(False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Give softmax probabilities."""
        return torch.softmax(self.layers(pixels / 255), dim=1)


class Counting(nn.Module):
    """Counts the windows that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.windows = Constant(), 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Count, and see class 3."""
        self.windows += len(pixels)
        scores: torch.Tensor = self.model(pixels)
        return scores


def labels_like(height: int, width: int, seed: int = 0) -> UInt8:
    """Draw (height, width) labels, blocky enough to show a shift by one pixel."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, CLASSES, (height // 5 + 1, width // 5 + 1), np.uint8)
    return blocks.repeat(5, 0).repeat(5, 1)[:height, :width]


def pixels_like(height: int, width: int, seed: int = 0) -> UInt8:
    """Draw (height, width, 3) pixels with a bit of structure."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width]


def check_engine(engine: Engine) -> list[Check]:
    """Put an engine to the checks; an exception fails the check that raised it."""
    return [
        _run("identity", "what the model sees is the mask, at any size", _identity)(
            engine
        ),
        _run("constant", "no pixel is left out, borders and corners too", _constant)(
            engine
        ),
        _run("borders", "no seam where windows are wrong near their borders", _borders)(
            engine
        ),
        _run("batches", "the batch size changes at most 1e-4 of the pixels", _batches)(
            engine
        ),
        _run("repeat", "the same slide gives the same bits", _repeat)(engine),
        _run("input", "the caller's pixels are not changed", _input)(engine),
        _run("windows", "2048 x 2048 at 512 and 384 takes 25 windows", _windows)(
            engine
        ),
    ]


def _run(name: str, asked: str, check: Callable[..., str]) -> Callable[..., Check]:
    """Make a check of a function that says what is wrong ("" if nothing)."""

    def run(*args: Any) -> Check:
        try:
            wrong = check(*args)
        except Exception as error:  # an engine may raise whatever it likes
            wrong = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check(name, asked, not wrong, wrong or "as asked")

    return run


def _as_pixels(labels: UInt8) -> UInt8:
    return np.repeat(labels[..., None], 3, axis=2)


def _wrong(mask: UInt8, truth: UInt8) -> str:
    if mask.shape != truth.shape:
        return f"mask of {mask.shape} for a slide of {truth.shape}"
    share = float((mask != truth).mean())
    return f"{share:.2%} of the pixels are wrong" if share else ""


def _identity(engine: Engine) -> str:
    def check(size: tuple[int, int]) -> str:
        labels = labels_like(*size)
        return _wrong(engine(_as_pixels(labels), Identity(), WINDOWS, 4), labels)

    return _at_all_sizes(check)


def _constant(engine: Engine) -> str:
    def check(size: tuple[int, int]) -> str:
        mask = engine(pixels_like(*size), Constant(), WINDOWS, 4)
        return _wrong(mask, np.full(size, 3, np.uint8))

    return _at_all_sizes(check)


def _at_all_sizes(check: Callable[[tuple[int, int]], str]) -> str:
    found = []
    for height, width in SIZES:
        run = _run("", "", check)((height, width))
        if not run.passed:
            found.append(f"{height} x {width}: {run.found}")
    return "; ".join(found)


def _borders(engine: Engine) -> str:
    border = 8  # half of it lies in the overlap of 32 px on either side of its middle
    mask = engine(pixels_like(416, 416), WrongAtBorders(border), WINDOWS, 4)
    inside = mask[border:-border, border:-border]
    return _wrong(inside, np.ones(inside.shape, np.uint8))


def _batches(engine: Engine) -> str:
    pixels = pixels_like(300, 411)
    masks = [engine(pixels, Network(), WINDOWS, batch) for batch in (1, 5)]
    share = float((masks[0] != masks[1]).mean())
    return f"{share:.2%} of pixels differ" if share > 1e-4 else ""


def _repeat(engine: Engine) -> str:
    pixels = pixels_like(300, 411)
    return _wrong(*(engine(pixels, Network(), WINDOWS, 4) for _ in range(2)))


def _input(engine: Engine) -> str:
    pixels = pixels_like(320, 320)
    before = pixels.copy()
    engine(pixels, Network(), WINDOWS, 1)
    changed = float((pixels != before).mean())
    return f"{changed:.2%} of the pixels were changed" if changed else ""


def _windows(engine: Engine) -> str:
    model = Counting()
    engine(pixels_like(2048, 2048), model, Windows(512, 384), 1)
    return f"{model.windows} windows" if model.windows != 25 else ""


# --- medray ---------------------------------------------------------------------------


def medray_engine(stitch: Stitch = "crop", *, region: int = 0) -> Engine:
    """Give medray's own way as an engine.

    Args:
        stitch: How windows become one mask.
        region: Side of the regions that the slide is cut into; 0: one region.
    """

    def engine(pixels: UInt8, model: nn.Module, windows: Windows, batch: int) -> UInt8:
        predictor = _predictor(model, windows, stitch, batch)
        mask = np.full(pixels.shape[:2], 99, np.uint8)
        sources = list(_regions(pixels, windows, stitch, region))
        for source, result in zip(sources, predictor.predict(sources), strict=True):
            mask[source.plan.region.slices()] = result.labels
        return mask

    return engine


def _predictor(
    model: nn.Module, windows: Windows, stitch: Stitch, batch: int
) -> Predictor:
    from medray.classes import Classes
    from medray.models.config import Architecture, ModelConfig, Prediction
    from medray.models.predict import Predictor

    config = ModelConfig(
        architecture=Architecture(),
        classes=Classes(tuple(f"class {value}" for value in range(CLASSES))),
        window=windows,
        mpp=None,
        mean=(0.0, 0.0, 0.0),
        std=(1 / 255,) * 3,
    )
    how = Prediction(precision="float32", stitch=stitch)
    cpu = torch.device("cpu")
    return Predictor([(model, config)], how, batch=batch, device=cpu)


def _regions(
    pixels: UInt8, windows: Windows, stitch: Stitch, side: int
) -> Iterator[RegionPixels]:
    from medray.models.canvas import RegionPixels

    height, width = pixels.shape[:2]
    for region in plan_regions(height, width, side or max(height, width)):
        plan = region_windows(region, height, width, windows, stitch)
        part = pixels[plan.halo.slices()]
        missing = [plan.halo.height - part.shape[0], plan.halo.width - part.shape[1]]
        part = np.pad(part, [(0, missing[0]), (0, missing[1]), (0, 0)], "symmetric")
        yield RegionPixels(part, plan, height, width)


def check_medray() -> list[Check]:
    """Put medray to what it promises beyond `check_engine`; takes a minute of Ray."""
    checks = []
    for stitch in ("crop", "blend"):
        named: list[tuple[str, str, Callable[[Any], str]]] = [
            ("regions", "regions of any size give the same bits", _any_regions),
            ("order", "windows of slides in any order give the same bits", _any_order),
            ("left out", "what is left out is class 0, the rest as before", _left_out),
            ("coverage", "each pixel is decided once, or by weights of sum 1", _cover),
        ]
        for name, asked, check in named:
            checks.append(_run(f"{name} ({stitch})", asked, check)(stitch))
    asked = "workers on Ray, in any number, give the bits of one process"
    checks.append(_run("workers", asked, _workers)())
    return checks


def _any_regions(stitch: Stitch) -> str:
    pixels = pixels_like(500, 411)
    whole = medray_engine(stitch)(pixels, Network(), WINDOWS, 4)
    for side in (64, 100, 192, 333):
        cut = medray_engine(stitch, region=side)(pixels, Network(), WINDOWS, 4)
        wrong = _wrong(cut, whole)
        if wrong:
            return f"regions of {side}: {wrong}"
    return ""


def _any_order(stitch: Stitch) -> str:
    slides = [pixels_like(300, 411, seed) for seed in range(3)]
    engine = medray_engine(stitch)
    alone = [engine(slide, Network(), WINDOWS, 4) for slide in slides]
    predictor = _predictor(Network(), WINDOWS, stitch, 4)
    sources = [
        (number, source)
        for number, slide in enumerate(slides)
        for source in _regions(slide, WINDOWS, stitch, 100)
    ]
    order = np.random.default_rng(0).permutation(len(sources))
    results = predictor.predict(sources[i][1] for i in order)
    for i, result in zip(order, results, strict=True):
        number, source = sources[i]
        truth = alone[number][source.plan.region.slices()]
        wrong = _wrong(result.labels, truth)
        if wrong:
            return wrong
    return ""


def _left_out(stitch: Stitch) -> str:
    pixels, block = pixels_like(512, 384), 64
    wanted = np.random.default_rng(1).random((8, 6)) < 0.3
    (source,) = _regions(pixels, WINDOWS, stitch, 0)
    size = (source.height, source.width)
    needed = windows_over(source.plan, *size, WINDOWS, stitch, wanted, block)
    predictor = _predictor(Constant(), WINDOWS, stitch, 4)
    part = type(source)(source.pixels, source.plan, *size, needed)
    (result,) = predictor.predict([part])
    inside = wanted.repeat(block, 0).repeat(block, 1)
    if not (result.labels[inside] == 3).all():
        return "wanted pixels were left out"
    reached = np.zeros(size, bool)
    rows, columns = (window_reach(length, WINDOWS, stitch) for length in size)
    for row, column in np.argwhere(needed):
        part_of = (slice(*(edge[row] for edge in rows)),)
        reached[(*part_of, slice(*(edge[column] for edge in columns)))] = True
    return _wrong(result.labels, np.where(reached, 3, 0).astype(np.uint8))


def _cover(stitch: Stitch) -> str:
    rng = np.random.default_rng(2)
    for length in (1, 100, 128, 129, *rng.integers(130, 3000, 40)):
        total = np.zeros(int(length))
        weights = window_weights(int(length), WINDOWS)
        begins, ends = window_reach(int(length), WINDOWS, stitch)
        for index, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            if stitch == "crop":
                total[begin:end] += 1
            else:
                part = weights[index][: max(0, min(end, length) - begin)]
                total[begin : begin + len(part)] += part
        off = float(np.abs(total - 1).max())
        if off > 1e-6:
            return f"off by {off:.2g} on {length} pixels"
    return ""


def _workers() -> str:
    from medray.classes import Classes
    from medray.datasets.synthetic import generate
    from medray.inference.infer import infer
    from medray.inference.run import Options, mask_uri
    from medray.models.config import Architecture, ModelConfig, Prediction
    from medray.models.folder import load_model, save_model
    from medray.models.predict import Predictor
    from medray.models.segmenters import build_segmenter
    from medray.slides import open_slide
    from medray.storage import ome_zarr

    how = Prediction(precision="float32")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slides = generate(folder / "slides", slides=2, seed=3, height=1100, width=900)
        torch.manual_seed(0)
        architecture = Architecture("unet", "mobilenet_v2")
        config = ModelConfig(
            architecture=architecture, classes=Classes(), window=WINDOWS, mpp=0.5
        )
        model = str(folder / "model")
        save_model(model, config, build_segmenter(architecture, 2), {})
        options = Options(prediction=how, everywhere=True, region=512)
        infer(
            [str(path) for path in slides],
            model=model,
            out=str(folder / "run"),
            options=options,
        )
        predictor = Predictor([load_model(model)], how)
        for path in slides:
            with open_slide(path) as slide:
                level = slide.levels[0]
                pixels = slide.read(0, 0, level.height, level.width)
            (source,) = _regions(pixels, WINDOWS, "crop", 0)
            (result,) = predictor.predict([source])
            mask = np.asarray(
                ome_zarr.open_level(mask_uri(str(folder / "run"), path.stem))[:]
            )
            wrong = _wrong(mask, result.labels)
            if wrong:
                return f"{path.stem}: {wrong}"
    return ""
