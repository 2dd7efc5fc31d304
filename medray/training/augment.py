"""Random changes of training crops: a batch at once, on its device.

Each crop is changed in its own way, and sampled once: mirrors and right angles are
exact, everything else that moves pixels is one place to sample for each of them. What
changes colours is one matrix per crop, in stain densities and in RGB. So a batch takes
as many operations as a crop, whether the device is a GPU or a CPU.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch.nn import functional

from medray.models import change_stains
from medray.training.settings import STRICT

_SIGMA = 6.0  # of the elastic deformation's smoothing, pixels
_PADDING = {"border": "border", "reflect": "reflection"}

# RGB to luma (Rec. 601), and to two axes of chroma whose angle is the hue: by at most
# 1.12 degrees other than that of HSV (Hanbury 2008, Constructing cylindrical coordinate
# colour spaces).
_LUMA = torch.tensor([0.299, 0.587, 0.114])
_CHROMA = torch.tensor([[1, -0.5, -0.5], [0, math.sqrt(0.75), -math.sqrt(0.75)]])
_AXES = torch.cat([_LUMA[None], _CHROMA])


@dataclass(frozen=True, config=STRICT)
class Augment:
    """Random changes of a crop; what moves pixels moves those of the mask with them.

    Attributes:
        flips: Mirror, and turn by right angles.
        rotate: Largest turn in degrees.
        zoom: Largest relative change of size.
        shift: Largest shift, as a share of the side.
        shear: Largest shear in degrees.
        elastic: Displacement of an elastic deformation in pixels (Simard et al. 2003).
        brightness: Largest relative change.
        contrast: Largest relative change.
        saturation: Largest relative change.
        hue: Largest shift, in turns of the colour circle (0 to 0.5).
        stain: Largest relative change of haematoxylin, eosin and residual (Tellez et
            al. 2018).
        fill: What a crop that moves uncovers: white, as glass is, black, its border's
            pixels, or its reflection. White and black are class 0; of the others mask
            and image go on alike.
    """

    flips: bool = True
    rotate: float = Field(default=0.0, ge=0)
    zoom: float = Field(default=0.0, ge=0, lt=1)
    shift: float = Field(default=0.0, ge=0, lt=1)
    shear: float = Field(default=0.0, ge=0)
    elastic: float = Field(default=0.0, ge=0)
    brightness: float = Field(default=0.15, ge=0, lt=1)
    contrast: float = Field(default=0.15, ge=0, lt=1)
    saturation: float = Field(default=0.15, ge=0, lt=1)
    hue: float = Field(default=0.03, ge=0, le=0.5)
    stain: float = Field(default=0.0, ge=0, lt=1)
    fill: Literal["white", "black", "border", "reflect"] = "white"


def move(
    augment: Augment, images: torch.Tensor, masks: torch.Tensor, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move the pixels of each crop of a batch, and those of its mask with them.

    Args:
        augment: By how much at most.
        images: (N, 3, S, S) uint8.
        masks: (N, S, S) uint8.
        seed: Decides the changes; the global random state is left alone.

    Returns:
        Images and masks of the same shapes and dtypes.
    """
    rng = torch.Generator().manual_seed(seed)
    if augment.flips:
        images, masks = _flip(images, masks, rng)
    moves = (augment.rotate, augment.zoom, augment.shift, augment.shear)
    if not any(moves) and not augment.elastic:
        return images, masks
    linear, offset = _draw_moves(augment, len(images), images.shape[-1], rng)
    places = _centres(images.shape[-1], images.device)
    if augment.elastic:
        places = places + _waves(augment.elastic, images, seed)
    places = places @ linear.mT.to(images.device)[:, None]
    places = places + offset.to(images.device)[:, None, None]
    return _sample(images, masks, places, augment.fill)


def _flip(
    images: torch.Tensor, masks: torch.Tensor, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror and turn by right angles: each of the eight ways as often."""
    both = torch.cat([images, masks[:, None]], dim=1)
    drawn = torch.rand(3, len(both), 1, 1, 1, generator=rng) < 0.5
    across, down, over = drawn.to(both.device)
    both = torch.where(across, both.flip(-1), both)
    both = torch.where(down, both.flip(-2), both)
    both = torch.where(over, both.mT, both)
    return both[:, :3], both[:, 3]


def _draw_moves(
    augment: Augment, count: int, side: int, rng: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the affine transforms from new pixels of a crop to the old ones.

    Returns:
        Matrices (N, 2, 2) and offsets (N, 2) from new to old places (x, y), in halves
        of the side from the centre.
    """
    drawn = 2 * torch.rand(5, count, generator=rng, dtype=torch.float64) - 1
    angle = torch.deg2rad(augment.rotate * drawn[0])
    shear = torch.tan(torch.deg2rad(augment.shear * drawn[1]))
    scale = 1 + augment.zoom * drawn[2]
    shift = (augment.shift * side * drawn[3:]).round() * 2 / side  # by whole pixels
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1)
    slant = torch.stack([scale, scale * shear, 0 * scale, scale], dim=1)
    linear = torch.linalg.inv(turn.view(-1, 2, 2) @ slant.view(-1, 2, 2))
    offset = -(linear @ shift.T[:, :, None])[:, :, 0]
    return linear.float(), offset.float()


def _centres(side: int, device: torch.device) -> torch.Tensor:
    """Return the places (1, S, S, 2) of pixels (x, y), in halves from the centre."""
    line = (2 * torch.arange(side, device=device) + 1) / side - 1
    return torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1)[None]


def _waves(pixels: float, images: torch.Tensor, seed: int) -> torch.Tensor:
    """Draw smooth displacements (N, S, S, 2) of so many pixels (root mean square).

    Simard et al. 2003 (doi:10.1109/ICDAR.2003.1227801): noise, smoothed.
    """
    side, device = images.shape[-1], images.device
    rng = torch.Generator(device).manual_seed(seed)  # a field: drawn where it is used
    noise = torch.randn(2 * len(images), 1, side, side, generator=rng, device=device)
    reach = min(math.ceil(3 * _SIGMA), side - 1)
    steps = torch.arange(-reach, reach + 1, device=device)
    weights = torch.exp(-(steps**2) / (2 * _SIGMA**2))
    weights = weights / weights.square().sum().sqrt()  # keeps the noise's deviation
    padded = functional.pad(noise, [reach] * 4, mode="reflect")
    smooth = functional.conv2d(padded, weights[None, None, :, None])
    smooth = functional.conv2d(smooth, weights[None, None, None, :])
    return smooth.view(-1, 2, side, side).movedim(1, -1) * (pixels * 2 / side)


def _sample(
    images: torch.Tensor, masks: torch.Tensor, places: torch.Tensor, fill: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample pixels at places (N, S, S, 2): bilinear for images, nearest for masks."""
    padding = _PADDING.get(fill, "zeros")
    pixels = 255 - images if fill == "white" else images
    found = functional.grid_sample(
        pixels.float(), places, "bilinear", padding, align_corners=False
    )
    found = found.round().to(torch.uint8)
    labels = functional.grid_sample(
        masks[:, None].float(), places, "nearest", padding, align_corners=False
    )
    return 255 - found if fill == "white" else found, labels[:, 0].to(torch.uint8)


def recolour(augment: Augment, images: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Change the colours of each crop of a batch: its stains, then what a camera does.

    Brightness, contrast (about the crop's mean luma), saturation and hue are linear and
    commute: brightness and contrast scale luma and chroma, saturation scales and hue
    turns the chroma (Haeberli 1993, Matrix Operations for Image Processing). So they
    are one matrix per crop, and values are clipped to 0..255 once, at the end.

    Args:
        augment: By how much at most.
        images: (N, 3, S, S) uint8.
        seed: Decides the changes; the global random state is left alone.

    Returns:
        (N, 3, S, S) uint8.
    """
    rng = torch.Generator().manual_seed(seed)
    count, device = len(images), images.device
    if augment.stain:
        factor, offset = 2 * torch.rand(2, count, 3, generator=rng) - 1
        strength = augment.stain
        images = change_stains(images, 1 + strength * factor, 0.1 * strength * offset)
    most = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    if not any(most):
        return images
    drawn = torch.tensor(most) * (2 * torch.rand(count, 4, generator=rng) - 1)
    brightness, contrast, saturation = (1 + drawn[:, :3]).T
    matrix = colour_matrix(brightness * contrast, saturation, drawn[:, 3]).to(device)
    pixels = images.float().flatten(2)
    luma = pixels.mean(dim=2) @ _LUMA.to(device)
    grey = (brightness * (1 - contrast)).to(device) * luma
    changed = torch.baddbmm(grey[:, None, None], matrix, pixels)
    return changed.round_().clamp_(0, 255).to(torch.uint8).view(images.shape)


def colour_matrix(
    scale: torch.Tensor, saturation: torch.Tensor, hue: torch.Tensor
) -> torch.Tensor:
    """Return the matrices that scale RGB, then its chroma, and turn its hue.

    Args:
        scale: (N,) of luma and chroma.
        saturation: (N,) of the chroma alone.
        hue: (N,) in turns.

    Returns:
        (N, 3, 3), of columns of RGB.
    """
    angle = 2 * torch.pi * hue
    turn = torch.zeros(len(scale), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = saturation * angle.cos()
    turn[:, 2, 1] = saturation * angle.sin()
    turn[:, 1, 2] = -turn[:, 2, 1]
    matrices: torch.Tensor = torch.linalg.inv(_AXES) @ turn @ _AXES
    return scale[:, None, None] * matrices
