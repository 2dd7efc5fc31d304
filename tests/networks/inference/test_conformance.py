"""`medray conformance`, and that its checks find what they are there to find."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from medray.geometry import Stitch, Windows, window_starts
from medray.inference.conformance import Engine, check_engine
from medray.inference.conformance_medray import medray_engine

UInt8 = np.ndarray


@pytest.mark.parametrize("stitch", ["crop", "blend"])
def test_medray_passes_what_any_engine_is_asked(stitch: Stitch) -> None:
    assert [
        check for check in check_engine(medray_engine(stitch)) if not check.passed
    ] == []


def last_wins(pixels: UInt8, model: nn.Module, windows: Windows, batch: int) -> UInt8:
    """A notebook's engine: later windows overwrite earlier ones, the rest is lost."""
    height, width = pixels.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    for y in range(0, height - windows.size + 1, windows.stride):
        for x in range(0, width - windows.size + 1, windows.stride):
            cut = pixels[y : y + windows.size, x : x + windows.size]
            scores = model(torch.from_numpy(cut).permute(2, 0, 1)[None].float())
            mask[y : y + windows.size, x : x + windows.size] = scores[0].argmax(0)
    return mask


def shifted(pixels: UInt8, model: nn.Module, windows: Windows, batch: int) -> UInt8:
    return np.roll(medray_engine()(pixels, model, windows, batch), 1, axis=0)


def forgetful(pixels: UInt8, model: nn.Module, windows: Windows, batch: int) -> UInt8:
    mask = medray_engine()(pixels, model, windows, batch)
    mask[0, 0] = 0 if batch == 1 else 3
    pixels[0, 0] = 0
    return mask


def restless() -> Engine:
    rng = np.random.default_rng(0)

    def engine(pixels: UInt8, model: nn.Module, windows: Windows, batch: int) -> UInt8:
        mask = medray_engine()(pixels, model, windows, 1)
        mask[: 1 + batch] = rng.integers(0, 4, (1 + batch, mask.shape[1]))
        return mask

    return engine


def wasteful(pixels: UInt8, model: nn.Module, windows: Windows, batch: int) -> UInt8:
    assert len(window_starts(2048, Windows(512, 384))) == 5
    narrow = Windows(windows.size, windows.stride // 2)
    return medray_engine()(pixels, model, narrow, batch)


@pytest.mark.parametrize(
    ("engine", "failing"),
    [
        (last_wins, {"identity", "constant", "borders"}),
        (shifted, {"identity"}),
        (forgetful, {"identity", "input"}),
        (restless(), {"identity", "constant", "batches", "repeat"}),
        (wasteful, {"windows"}),
    ],
)
def test_wrong_engines_are_found_out(
    engine: Callable[..., UInt8], failing: set[str]
) -> None:
    assert {c.name for c in check_engine(engine) if not c.passed} >= failing
