"""Random changes: image and mask together, stains by their law."""

import numpy as np
import pytest
import torch

from medray.models.augment import (
    augment_batch,
    build_augmentation,
    build_colours,
    build_geometry,
)
from medray.models.stain import change_stains, macenko
from medray.recipe import Augment

PLAIN = {"flips": False, "brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


def blobs(side: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Images that are their masks: red 255 in discs, else 0."""
    y, x = np.mgrid[:side, :side]
    masks = [
        ((y - cy) ** 2 + (x - cx) ** 2 < 15**2).astype(np.uint8)
        for cy, cx in ((30, 60), (48, 48), (60, 25), (40, 30))
    ]
    labels = torch.from_numpy(np.stack(masks))
    return (labels * 255)[:, None].repeat(1, 3, 1, 1), labels


@pytest.mark.parametrize(
    "how",
    [
        {"flips": True},
        {"rotate": 45.0},
        {"zoom": 0.3},
        {"shift": 0.2},
        {"shear": 20.0},
        {"elastic": 4.0},
        {"rotate": 30.0, "zoom": 0.2, "elastic": 3.0, "flips": True},
    ],
)
def test_image_and_mask_move_together(how: dict) -> None:
    images, labels = blobs()
    geometry = build_geometry(Augment(**(PLAIN | how)))
    # Glass is white and background: marked so that it is told from the disc.
    images[:, 1] = 255 - images[:, 1]
    moved, masks = augment_batch(geometry, images, labels, seed=3)
    assert not torch.equal(masks, labels)
    disc = moved[:, 1] < 128
    differing = (disc != (masks > 0)).float().mean()
    assert differing < 0.01  # edge pixels: the image is smoothed, the mask is not
    again = augment_batch(geometry, images, labels, seed=3)
    assert torch.equal(again[0], moved)
    assert torch.equal(again[1], masks)
    other = augment_batch(geometry, images, labels, seed=4)[1]
    assert not torch.equal(other, masks)
    assert set(masks.unique().tolist()) <= {0, 1}


def test_elastic_moves_pixels_as_far_as_it_says() -> None:
    side, wanted = 256, 5.0
    ramp = torch.arange(side).expand(side, side).to(torch.uint8)
    images = ramp.expand(8, 3, side, side).contiguous()
    geometry = build_geometry(Augment(**(PLAIN | {"elastic": wanted})))
    moved, _ = augment_batch(geometry, images, images[:, 0], seed=0)
    inner = slice(40, -40)
    shift = moved[:, 0, inner, inner].float() - ramp[inner, inner].float()
    assert 0.8 * wanted < float(shift.std()) < 1.2 * wanted


@pytest.mark.parametrize(
    ("fill", "padding"),
    [
        ("white", {"constant_values": 255}),
        ("black", {"constant_values": 0}),
        ("border", {"mode": "edge"}),
        ("reflect", {"mode": "reflect"}),
    ],
)
def test_what_lies_beyond_a_crop_is_as_asked(fill: str, padding: dict) -> None:
    """A shifted crop is a cut of NumPy's continuation of it."""
    side, most = 32, 8
    rng = np.random.default_rng(2)
    image = rng.integers(1, 255, (3, side, side), dtype=np.uint8)
    labels = rng.integers(1, 5, (1, side, side), dtype=np.uint8)
    padding = {"mode": "constant"} | padding
    of_mask = padding | ({"constant_values": 0} if fill in ("white", "black") else {})
    around = ((0, 0), (most, most), (most, most))
    wide = np.pad(image, around, **padding)
    wide_labels = np.pad(labels, around, **of_mask)
    how = Augment(**(PLAIN | {"shift": most / side, "fill": fill}))
    geometry = build_geometry(how)
    shifts = set()
    for seed in range(12):
        moved, masks = augment_batch(
            geometry, torch.from_numpy(image[None]), torch.from_numpy(labels), seed=seed
        )
        assert moved.dtype == masks.dtype == torch.uint8
        found = [
            (y, x)
            for y in range(2 * most + 1)
            for x in range(2 * most + 1)
            if np.array_equal(moved[0], wide[:, y : y + side, x : x + side])
            and np.array_equal(masks, wide_labels[:, y : y + side, x : x + side])
        ]
        assert len(found) == 1
        shifts |= set(found)
    assert len(shifts) > 6
    assert max(abs(y - most) for y, _ in shifts) > most / 2


def test_nothing_black_is_turned_into_a_crop_that_goes_on() -> None:
    images = torch.full((4, 3, 32, 32), 90, dtype=torch.uint8)
    masks = torch.ones(4, 32, 32, dtype=torch.uint8)
    how = PLAIN | {"rotate": 45.0, "zoom": 0.3, "shear": 10.0, "elastic": 2.0}
    for fill, holes in (("border", False), ("reflect", False), ("black", True)):
        moved, labels = augment_batch(
            build_geometry(Augment(**(how | {"fill": fill}))), images, masks, seed=1
        )
        assert bool((moved < 89).any()) == holes
        assert bool((labels == 0).any()) == holes


def test_colours_leave_masks_alone() -> None:
    images, labels = blobs()
    colours = build_colours(Augment(stain=0.3))
    changed, masks = augment_batch(colours, images + 40, labels, seed=0)
    assert torch.equal(masks, labels)
    assert not torch.equal(changed, images + 40)


def test_augmentation_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    images, masks = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 32, 32)
    every = Augment(rotate=10, zoom=0.1, elastic=2.0, stain=0.2)
    augment_batch(build_augmentation(every), images, masks.byte(), seed=1)
    torch.testing.assert_close(torch.rand(3), expected)


def stained(amounts: np.ndarray, colours: np.ndarray, white: float) -> np.ndarray:
    """Beer and Lambert: (M, stains) amounts of (stains, 3) densities as RGB."""
    return white * np.exp(-amounts @ colours)


HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
HED /= np.linalg.norm(HED, axis=1, keepdims=True)


def test_stains_change_by_beer_and_lambert() -> None:
    rng = np.random.default_rng(0)
    amounts = rng.uniform(0.1, 0.8, (400, 3))
    before = stained(amounts, HED, 255).T.reshape(3, 20, 20).round().astype(np.uint8)
    factor, offset = np.array([1.3, 0.8, 1.0]), np.array([0.05, 0.0, -0.02])
    after = change_stains(
        torch.from_numpy(before),
        torch.tensor(factor).float(),
        torch.tensor(offset).float(),
    )
    # From what was stored, which is rounded, by NumPy's own inverse.
    stored = -np.log(np.maximum(before.reshape(3, -1).T, 1) / 255) @ np.linalg.inv(HED)
    expected = stained(stored * factor + offset, HED, 255).T.reshape(3, 20, 20)
    assert np.abs(after.numpy() - expected.clip(0, 255)).max() <= 0.51


def test_nothing_changes_with_factors_of_one() -> None:
    image = torch.randint(1, 256, (3, 16, 16), dtype=torch.uint8)
    same = change_stains(image, torch.ones(3), torch.zeros(3))
    assert int((same.int() - image.int()).abs().max()) <= 1


def slide_of(colours: np.ndarray, scale: float, seed: int) -> np.ndarray:
    """Tissue of nuclei (first stain) and cytoplasm (second), with some glass."""
    rng = np.random.default_rng(seed)
    kind = rng.random(64 * 64)
    amounts = np.zeros((64 * 64, 2))
    amounts[:, 0] = np.where(kind < 0.4, rng.uniform(0.8, 1.6, 64 * 64), 0.0)
    amounts[:, 1] = np.where(kind >= 0.4, rng.uniform(0.5, 0.9, 64 * 64), 0.0)
    amounts[kind > 0.95] = 0
    pixels = stained(scale * amounts, colours, 240.0)
    return pixels.T.reshape(3, 64, 64).round().clip(0, 255).astype(np.uint8)


def test_macenko_brings_two_stainings_to_one() -> None:
    purple = np.array([[0.65, 0.70, 0.29], [0.21, 0.80, 0.56]])
    bluish = np.array([[0.75, 0.60, 0.28], [0.30, 0.85, 0.43]])
    two = np.stack([slide_of(purple, 1.0, 1), slide_of(bluish, 0.7, 1)])
    before = np.abs(two[0].astype(int) - two[1]).mean()
    one, other = macenko(torch.from_numpy(two)).numpy().astype(int)
    after = np.abs(one - other).mean()
    assert after < 0.25 * before
    # To the reference of the method's authors: the strongest stain is their percentile.
    most = one.reshape(3, -1)[:, two[0].reshape(3, -1).sum(axis=0).argsort()[:40]].mean(
        1
    )
    reference = 240 * np.exp(-1.97 * np.array([0.5626, 0.7201, 0.4062]))
    np.testing.assert_allclose(most, reference, atol=12)


def test_macenko_leaves_glass_alone() -> None:
    glass = torch.full((2, 3, 32, 32), 243, dtype=torch.uint8)
    assert torch.equal(macenko(glass), glass)
    grey = torch.full((1, 3, 32, 32), 100, dtype=torch.uint8)
    assert torch.equal(macenko(grey), grey)
