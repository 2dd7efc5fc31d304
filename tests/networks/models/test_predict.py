"""Promise 1: a mask does not depend on how its slide was cut into regions."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medray.classes import Classes
from medray.geometry import (
    Windows,
    plan_regions,
    region_windows,
    window_cores,
    window_starts,
)
from medray.inference.regions import _read_halo
from medray.inference.run import Options, RunSettings
from medray.models.canvas import RegionPixels
from medray.models.config import Architecture, ModelConfig, Prediction
from medray.models.crf import refine
from medray.models.network import choose_precision
from medray.models.predict import Predictor
from medray.models.segmenters import build_segmenter
from medray.slides.image import ArraySlide
from medray.slides.resolution import Working

torch.manual_seed(3)
NETWORK = build_segmenter(Architecture("unet", "mobilenet_v2"), 3).eval()
CLASSES = Classes(("background", "a", "b"))


def predictor(windows: Windows, batch: int = 4, **how: Any) -> Predictor:
    config = ModelConfig(
        architecture=Architecture(), classes=CLASSES, window=windows, mpp=None
    )
    prediction = Prediction(precision="float32", **how)
    cpu = torch.device("cpu")
    return Predictor([(NETWORK, config)], prediction, batch=batch, device=cpu)


def regions_of(
    pixels: np.ndarray, windows: Windows, region: int, stitch: Any = "crop"
) -> Iterator[RegionPixels]:
    """Read a slide in regions as the pipeline does."""
    height, width = pixels.shape[:2]
    settings = RunSettings(
        models=("",),
        model_digest="",
        classes=CLASSES,
        windows=windows,
        model_mpp=None,
        options=Options(prediction=Prediction(stitch=stitch)),
    )
    working = Working(0, 1.0, height, width, 1.0, None)
    for rectangle in plan_regions(height, width, region):
        plan = region_windows(rectangle, height, width, windows, stitch)
        halo, _, _ = _read_halo(ArraySlide(pixels), working, rectangle, settings)
        yield RegionPixels(halo, plan, height, width)


def mask_from_regions(
    pixels: np.ndarray,
    windows: Windows,
    region: int,
    batch: int = 4,
    stitch: Any = "crop",
) -> np.ndarray:
    """Read, predict and stitch as the pipeline does."""
    model = predictor(windows, batch, stitch=stitch)
    inputs = list(regions_of(pixels, windows, region, stitch))
    mask = np.full(pixels.shape[:2], 99, np.uint8)
    for one, result in zip(inputs, model.predict(inputs), strict=True):
        mask[one.plan.region.slices()] = result.labels
    return mask


def plain_loop(
    pixels: np.ndarray, windows: Windows, stitch: str
) -> tuple[np.ndarray, np.ndarray]:
    """The whole slide in one process, one window at a time.

    Returns:
        The mask, and how much likelier its class is than the next.
    """
    height, width = pixels.shape[:2]
    size = windows.size
    pad = ((0, max(0, size - height)), (0, max(0, size - width)), (0, 0))
    padded = np.pad(pixels, pad, mode="symmetric")
    total = np.zeros((len(CLASSES), *padded.shape[:2]))
    ramp = np.minimum(np.arange(size), np.arange(size)[::-1]) + 1.0
    weight = ramp[:, None] * ramp
    model = predictor(windows, batch=1)
    ys, xs = window_starts(height, windows), window_starts(width, windows)
    tops, lefts = window_cores(height, windows), window_cores(width, windows)
    for i, y in enumerate(ys):
        for j, x in enumerate(xs):
            cut = padded[None, y : y + size, x : x + size].copy()
            with torch.inference_mode():
                logits = model.logits(torch.from_numpy(cut))
                probability = torch.softmax(logits, 1)[0].numpy()
            if stitch == "blend":
                total[:, y : y + size, x : x + size] += probability * weight
            else:
                core = (slice(tops[i], tops[i + 1]), slice(lefts[j], lefts[j + 1]))
                inside = (
                    slice(tops[i] - y, tops[i + 1] - y),
                    slice(lefts[j] - x, lefts[j + 1] - x),
                )
                total[:, *core] = probability[:, *inside]
    total = total[:, :height, :width]
    total /= total.sum(axis=0)
    *_, second, first = np.sort(total, axis=0)
    return total.argmax(axis=0).astype(np.uint8), first - second


def noise(height: int, width: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(8, 0).repeat(8, 1)[:height, :width])


@settings(max_examples=12, deadline=None)
@given(
    height=st.integers(1, 160),
    width=st.integers(1, 160),
    size=st.sampled_from([32, 64]),
    overlap=st.integers(0, 16),
    regions=st.tuples(st.integers(40, 200), st.integers(40, 200)),
    seed=st.integers(0, 9),
    stitch=st.sampled_from(["crop", "blend"]),
)
def test_the_mask_is_the_same_for_any_regions(
    height: int,
    width: int,
    size: int,
    overlap: int,
    regions: tuple[int, int],
    seed: int,
    stitch: str,
) -> None:
    pixels, windows = noise(height, width, seed), Windows(size, size - overlap)
    first, second = (
        mask_from_regions(pixels, windows, region, stitch=stitch) for region in regions
    )
    np.testing.assert_array_equal(first, second)


@settings(max_examples=6, deadline=None)
@given(
    height=st.integers(1, 160),
    width=st.integers(1, 160),
    overlap=st.integers(0, 31),
    seed=st.integers(0, 9),
    stitch=st.sampled_from(["crop", "blend"]),
)
def test_the_mask_is_that_of_a_plain_loop(
    height: int, width: int, overlap: int, seed: int, stitch: str
) -> None:
    pixels, windows = noise(height, width, seed), Windows(64, 64 - overlap)
    mask = mask_from_regions(pixels, windows, 70, stitch=stitch)
    expected, lead = plain_loop(pixels, windows, stitch)
    # The loop adds in float64 and predicts in batches of one, whose float32 sums have
    # another order: where two classes are as likely to five digits it may decide
    # otherwise, whatever the size of the slide. Everywhere else it may not.
    sure = lead > 1e-5
    np.testing.assert_array_equal(mask[sure], expected[sure])


def test_real_sizes_give_the_same_mask() -> None:
    pixels, windows = noise(1500, 1300, 1), Windows(512, 384)
    one, several = (mask_from_regions(pixels, windows, side) for side in (2048, 1024))
    np.testing.assert_array_equal(one, several)


@pytest.mark.parametrize("stitch", ["crop", "blend"])
def test_probabilities_agree_with_labels(stitch: str) -> None:
    pixels, windows = noise(96, 130, 2), Windows(64, 40)
    model = predictor(windows, stitch=stitch, probabilities=True)
    (result,) = model.predict(regions_of(pixels, windows, 200, stitch))
    assert result.probabilities is not None
    assert result.probabilities.shape == (3, 96, 130)
    total = result.probabilities.sum(axis=0, dtype=int)
    assert np.abs(total - 255).max() <= 2
    best = np.take_along_axis(result.probabilities, result.labels[None].astype(int), 0)
    assert (best[0] >= result.probabilities.max(axis=0) - 1).all()


def test_half_precision_on_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16 or float32"):
        choose_precision("float16", torch.device("cpu"))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    thresholds=st.tuples(*[st.floats(0, 1)] * 3),
)
def test_a_class_below_its_threshold_is_not_chosen(seed: int, thresholds: Any) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet([1, 1, 1], size=(2, 5, 7)).transpose(0, 3, 1, 2)
    scores = scores.astype(np.float32)
    model = predictor(Windows(64, 40), thresholds=thresholds)
    found = model.choose(torch.from_numpy(scores.copy())).numpy()
    least = np.asarray(thresholds, np.float32)
    for n, y, x in np.ndindex(found.shape):
        here = scores[n, :, y, x]
        reached = [c for c in (1, 2) if here[c] >= least[c]]
        assert found[n, y, x] == max(reached, key=lambda c: here[c], default=0)


def ensemble(count: int, **how: Any) -> Predictor:
    config = ModelConfig(
        architecture=Architecture(), classes=CLASSES, window=Windows(64, 40), mpp=None
    )
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        network = build_segmenter(Architecture("unet", "mobilenet_v2"), 3).eval()
        models.append((network, config))
    prediction = Prediction(precision="float32", **how)
    return Predictor(models, prediction, batch=2, device=torch.device("cpu"))


@torch.inference_mode()
def test_an_ensemble_takes_the_mean_or_the_vote() -> None:
    pixels = torch.from_numpy(np.stack([noise(64, 64, seed) for seed in (1, 2)]))
    mean, vote = ensemble(3), ensemble(3, vote=True)
    single = torch.stack(
        [torch.softmax(n(pixels).float(), dim=1) for n in mean._networks]
    ).numpy()
    averaged = mean.choose(mean.scores(pixels)).numpy()
    clear = np.sort(single.mean(0), axis=1)  # not where rounding decides
    clear = clear[:, -1] - clear[:, -2] > 1e-3
    assert (averaged == single.mean(0).argmax(1))[clear].all()
    voted = vote.choose(vote.scores(pixels)).numpy()
    votes = np.stack([(single.argmax(2) == c).sum(0) for c in range(3)])
    # Of equally many votes the higher mean probability decides.
    expected = (votes + single.mean(0).transpose(1, 0, 2, 3) / 1e3).argmax(0)
    assert (voted == expected)[clear].all()
    assert (averaged != voted).any()
    assert (single[0].argmax(1) != voted).any()


def test_refinement_follows_the_edges_of_the_picture() -> None:
    rng = np.random.default_rng(0)
    yy, xx = np.mgrid[:64, :64]
    truth = ((yy - 30) ** 2 + (xx - 34) ** 2 < 20**2).astype(int)
    colours = np.array([[230, 200, 220], [120, 60, 150]])[truth]
    pixels = (colours + rng.integers(-6, 7, colours.shape)).astype(np.uint8)
    # Right on the whole, wrong in one place of six and blurred at the edge.
    likely = np.where(rng.random(truth.shape) < 1 / 6, 1 - truth, truth)
    likely[:, 2:] = likely[:, :-2]
    scores = np.stack([1 - likely, likely])[None] * 0.4 + 0.3
    refined = refine(
        torch.from_numpy(scores.astype(np.float32)), torch.from_numpy(pixels[None]), 5
    )
    assert torch.allclose(refined.sum(1), torch.ones(1, 64, 64), atol=1e-5)
    before = (likely != truth).mean()
    after = (refined[0].argmax(0).numpy() != truth).mean()
    assert before > 0.15
    assert after < before / 10
