"""Random changes: image and mask together, stains by their law."""

import colorsys
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage
from torchvision.transforms.v2 import functional

from medray.models.stain import change_stains, macenko
from medray.training import augment
from medray.training.augment import Augment, colour_matrix, move, recolour

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
    changes = Augment(**(PLAIN | how))
    # Glass is white and background: marked to distinguish it from the disc.
    images[:, 1] = 255 - images[:, 1]
    moved, masks = move(changes, images, labels, seed=3)
    assert not torch.equal(masks, labels)
    disc = moved[:, 1] < 128
    differing = (disc != (masks > 0)).float().mean()
    assert differing < 0.01  # edge pixels: the image is smoothed, the mask is not
    again = move(changes, images, labels, seed=3)
    assert torch.equal(again[0], moved)
    assert torch.equal(again[1], masks)
    other = move(changes, images, labels, seed=4)[1]
    assert not torch.equal(other, masks)
    assert set(masks.unique().tolist()) <= {0, 1}


def test_elastic_moves_pixels_as_far_as_it_says() -> None:
    side, wanted = 256, 5.0
    ramp = torch.arange(side).expand(side, side).to(torch.uint8)
    images = ramp.expand(8, 3, side, side).contiguous()
    changes = Augment(**(PLAIN | {"elastic": wanted}))
    moved, _ = move(changes, images, images[:, 0], seed=0)
    inner = slice(40, -40)
    shift = moved[:, 0, inner, inner].float() - ramp[inner, inner].float()
    assert 0.8 * wanted < float(shift.std()) < 1.2 * wanted


@pytest.mark.parametrize(
    ("fill", "padding"),
    [
        ("white", {"constant_values": 255}),
        ("black", {"constant_values": 0}),
        ("border", {"mode": "edge"}),
        ("reflect", {"mode": "symmetric"}),
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
    shifts = set()
    for seed in range(12):
        moved, masks = move(
            how, torch.from_numpy(image[None]), torch.from_numpy(labels), seed=seed
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
        changes = Augment(**(how | {"fill": fill}))  # type: ignore[arg-type]
        moved, labels = move(changes, images, masks, seed=1)
        assert bool((moved < 89).any()) == holes
        assert bool((labels == 0).any()) == holes


def test_mirrors_and_right_angles_are_exact_and_as_frequent() -> None:
    image = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4).expand(800, 3, 4, 4)
    moved, masks = move(Augment(**PLAIN | {"flips": True}), image, image[:, 0], seed=0)
    assert torch.equal(moved[:, 0], masks)
    turns = [image[0].rot90(k, (1, 2)) for k in range(4)]
    ways = [way for turn in turns for way in (turn, turn.flip(2))]
    counts = [int((moved == way).flatten(1).all(dim=1).sum()) for way in ways]
    assert sum(counts) == 800
    assert min(counts) > 60


def test_moves_stay_within_their_limits_and_reach_them() -> None:
    side = 100
    how = {"rotate": 30.0, "zoom": 0.2, "shift": 0.1, "shear": 15.0}
    rng = torch.Generator().manual_seed(0)
    linear, offset = augment._draw_moves(Augment(**how), 2000, side, rng)  # type: ignore[arg-type]
    forward = np.linalg.inv(linear.double().numpy())
    # A turn of what was scaled and slanted: the first column is turned and scaled only.
    turned, scaled = np.arctan2(forward[:, 1, 0], forward[:, 0, 0]), forward[:, :, 0]
    zoom = np.linalg.norm(scaled, axis=1)
    slant = np.einsum("nk,nk->n", scaled, forward[:, :, 1]) / zoom**2
    shift = -np.einsum("nij,nj->ni", forward, offset.double().numpy()) * side / 2
    for found, least, most in (
        (np.degrees(turned), -30, 30),
        (zoom, 0.8, 1.2),
        (np.degrees(np.arctan(slant)), -15, 15),
        (shift, -10, 10),
    ):
        span = most - least
        assert least - 1e-3 <= found.min() < least + 0.02 * span
        assert most - 0.02 * span < found.max() <= most + 1e-3
    np.testing.assert_allclose(np.linalg.det(forward), zoom**2, rtol=1e-4)
    np.testing.assert_allclose(shift, shift.round(), atol=1e-3)  # whole pixels


def test_pixels_come_from_where_the_matrix_says() -> None:
    """As SciPy samples, which counts pixels from a corner, and y before x."""
    side = 41
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.uniform(0, 255, (side, side)), 2)
    pixels = torch.from_numpy(image.round().astype(np.uint8))
    how = Augment(**PLAIN | {"rotate": 40.0, "zoom": 0.2, "shift": 0.1, "shear": 10.0})
    crops = pixels.expand(3, 3, side, side)
    moved, _ = move(how, crops, crops[:, 0], seed=5)
    drawn = torch.Generator().manual_seed(5)
    linear, offset = augment._draw_moves(how, 3, side, drawn)
    middle, swap = (side - 1) / 2, np.array([[0, 1], [1, 0]])
    for k in range(3):
        matrix = swap @ linear[k].numpy() @ swap
        start = middle + swap @ offset[k].numpy() * side / 2
        at = start - matrix @ [middle, middle]
        expected = ndimage.affine_transform(
            255.0 - pixels.numpy(), matrix, at, order=1, mode="grid-constant"
        )
        assert np.abs(255 - expected - moved[k, 0].numpy()).max() <= 0.51


def test_colours_change_as_those_of_torchvision() -> None:
    """Each by itself; torchvision rounds in between, and takes factors, not ranges."""
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.integers(90, 150, (1, 3, 24, 24), dtype=np.uint8))
    for name in ("brightness", "contrast", "saturation"):
        how = Augment(**(PLAIN | {name: 0.4}))
        adjust: Any = getattr(functional, f"adjust_{name}")
        factors = np.linspace(0.6, 1.4, 801)
        grid = torch.cat([adjust(image, factor) for factor in factors])
        found = set()
        for seed in range(10):
            (changed,) = recolour(how, image, seed=seed).int()
            apart = (grid.int() - changed).abs().amax(dim=(1, 2, 3))
            assert int(apart.min()) <= 1
            found.add(int(apart.argmin()))
        assert len(found) > 7


def test_hue_turns_as_far_as_it_says_and_keeps_luma() -> None:
    rgb = torch.tensor([[200.0, 100, 100], [100, 200, 110], [90, 120, 220]])
    ones = torch.ones(1)
    for turn in (-0.04, 0.03):
        matrix = colour_matrix(ones, ones, torch.tensor([turn]))[0]
        turned = rgb @ matrix.T
        weights = torch.tensor([0.299, 0.587, 0.114])
        torch.testing.assert_close(turned @ weights, rgb @ weights)
        for before, after in zip(rgb.tolist(), turned.tolist(), strict=True):
            hue = colorsys.rgb_to_hsv(*after)[0] - colorsys.rgb_to_hsv(*before)[0]
            assert (hue + 0.5) % 1 - 0.5 == pytest.approx(turn, abs=0.0063)
    whole = colour_matrix(ones, ones, torch.ones(1))[0]
    torch.testing.assert_close(whole, torch.eye(3), atol=1e-5, rtol=0)
    grey = colour_matrix(ones, 0 * ones, 0 * ones)[0] @ rgb[0]
    torch.testing.assert_close(grey, (rgb[0] @ weights).expand(3))


def test_each_crop_is_changed_in_its_own_way() -> None:
    images = (blobs()[0][:1] // 2 + 40).repeat(6, 1, 1, 1)
    images[:, 1] += 20
    for how in ({"brightness": 0.3}, {"hue": 0.1}, {"saturation": 0.5}, {"stain": 0.3}):
        changed = recolour(Augment(**(PLAIN | how)), images, seed=0)
        assert len({crop.numpy().tobytes() for crop in changed}) == 6
    every = Augment(rotate=10, elastic=2.0)
    moved, _ = move(every, images, images[:, 0], seed=1)
    assert len({crop.numpy().tobytes() for crop in moved}) == 6


def test_augmentation_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    images, masks = torch.zeros(2, 3, 32, 32, dtype=torch.uint8), torch.zeros(2, 32, 32)
    every = Augment(rotate=10, zoom=0.1, elastic=2.0, stain=0.2)
    recolour(every, move(every, images, masks.byte(), seed=1)[0], seed=2)
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
        torch.from_numpy(before)[None],
        torch.tensor(factor).float()[None],
        torch.tensor(offset).float()[None],
    )[0]
    # From what was stored, which is rounded, by NumPy's own inverse.
    stored = -np.log(np.maximum(before.reshape(3, -1).T, 1) / 255) @ np.linalg.inv(HED)
    expected = stained(stored * factor + offset, HED, 255).T.reshape(3, 20, 20)
    assert np.abs(after.numpy() - expected.clip(0, 255)).max() <= 0.51


def test_nothing_changes_with_factors_of_one() -> None:
    images = torch.randint(1, 256, (2, 3, 16, 16), dtype=torch.uint8)
    same = change_stains(images, torch.ones(2, 3), torch.zeros(2, 3))
    assert int((same.int() - images.int()).abs().max()) <= 1


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
