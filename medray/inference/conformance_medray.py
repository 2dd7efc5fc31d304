"""Checks of medray's own promises on stitching: regions, order, weights, workers.

Ray and the engine are imported by the checks that need them.
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
from medray.inference.conformance import (
    CLASSES,
    WINDOWS,
    Check,
    Constant,
    Engine,
    Network,
    check_engine,
    describe_wrong,
    pixels_like,
    run_check,
)
from medray.types import UInt8

if TYPE_CHECKING:
    from medray.models import Predictor, RegionPixels


def medray_engine(stitch: Stitch = "crop", *, region: int = 0) -> Engine:
    """Return medray as an engine for the checks.

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
    from medray.models import Architecture, ModelConfig, Prediction, Predictor

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
    from medray.models import RegionPixels

    height, width = pixels.shape[:2]
    for region in plan_regions(height, width, side or max(height, width)):
        plan = region_windows(region, height, width, windows, stitch)
        part = pixels[plan.halo.slices()]
        missing = [plan.halo.height - part.shape[0], plan.halo.width - part.shape[1]]
        part = np.pad(part, [(0, missing[0]), (0, missing[1]), (0, 0)], "symmetric")
        yield RegionPixels(part, plan, height, width)


@dataclass(frozen=True)
class Conformance:
    """What the checks of stitching found.

    Attributes:
        checks: All of them, each with `name`, `asked`, `passed` and `found`.
        failed: What those that failed found, by their names.
    """

    checks: list[Check]
    failed: dict[str, str]

    def __str__(self) -> str:
        counts = f"{len(self.checks)} checks, {len(self.failed)} failed"
        return "\n".join([*map(str, self.checks), counts])


def check_conformance() -> Conformance:
    """Check that stitching can be trusted here; takes a minute of Ray."""
    checks = check_engine(medray_engine("crop")) + check_medray()
    return Conformance(checks, {c.name: c.found for c in checks if not c.passed})


def check_medray() -> list[Check]:
    """Check what medray promises beyond `check_engine`; takes a minute of Ray."""
    checks = []
    for stitch in ("crop", "blend"):
        named: list[tuple[str, str, Callable[[Any], str]]] = [
            ("regions", "regions of any size give the same bits", _any_regions),
            ("order", "windows of slides in any order give the same bits", _any_order),
            ("left out", "what is left out is class 0, the rest as before", _left_out),
            ("coverage", "each pixel is decided once, or by weights of sum 1", _cover),
        ]
        for name, asked, check in named:
            checks.append(run_check(f"{name} ({stitch})", asked, check)(stitch))
    asked = "workers on Ray, in any number, give the bits of one process"
    checks.append(run_check("workers", asked, _workers)())
    return checks


def _any_regions(stitch: Stitch) -> str:
    pixels = pixels_like(500, 411)
    whole = medray_engine(stitch)(pixels, Network(), WINDOWS, 4)
    for side in (64, 100, 192, 333):
        cut = medray_engine(stitch, region=side)(pixels, Network(), WINDOWS, 4)
        wrong = describe_wrong(cut, whole)
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
        wrong = describe_wrong(result.labels, truth)
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
    return describe_wrong(result.labels, np.where(reached, 3, 0).astype(np.uint8))


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
    from medray.datasets import generate
    from medray.inference.infer_run import infer
    from medray.inference.run import Options, mask_uri
    from medray.models import (
        Architecture,
        ModelConfig,
        Prediction,
        Predictor,
        build_segmenter,
        load_model,
        save_model,
    )
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
            wrong = describe_wrong(mask, result.labels)
            if wrong:
                return f"{path.stem}: {wrong}"
    return ""
