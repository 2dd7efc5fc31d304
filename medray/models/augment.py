"""Random changes of training crops, image and mask together, on their device."""

from __future__ import annotations

import math

import torch
from torch import nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import center_crop, pad

from medray.models.stain import StainJitter
from medray.recipe import Augment

_SIGMA = 6.0  # of the elastic deformation's smoothing, pixels
_PADDING = {"border": "edge", "reflect": "reflect"}


def build_geometry(augment: Augment) -> v2.Transform:
    """Build what moves the pixels of an (image, mask) pair."""
    steps: list[v2.Transform] = []
    if augment.flips:
        quarter_turn = v2.RandomChoice(
            [v2.Identity(), v2.RandomRotation((90.0, 90.0))], p=[0.5, 0.5]
        )
        steps += [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), quarter_turn]
    # Beyond a crop that moves lies glass, or black: class 0.
    fill = {tv_tensors.Image: 255 if augment.fill == "white" else 0, tv_tensors.Mask: 0}
    padded = augment.fill in _PADDING
    shift = augment.shift / 2 if padded else augment.shift  # a share of the whole side
    moves: list[v2.Transform] = []
    if augment.rotate or augment.zoom or augment.shift or augment.shear:
        affine = v2.RandomAffine(
            augment.rotate,
            translate=(shift, shift),
            scale=(1 - augment.zoom, 1 + augment.zoom),
            shear=augment.shear or None,
            interpolation=v2.InterpolationMode.BILINEAR,
            fill=fill,
        )
        moves.append(affine)
    if augment.elastic:
        # torchvision's alpha is a share of half the side, of noise that the smoothing
        # has made smaller: std of uniform noise / (2 sqrt(pi) sigma).
        alpha = augment.elastic * 2 * math.sqrt(3) * 2 * math.sqrt(math.pi) * _SIGMA
        moves.append(v2.ElasticTransform(alpha=alpha, sigma=_SIGMA, fill=fill))
    if moves and padded:
        moves = [_Continued(v2.Compose(moves), _PADDING[augment.fill])]
    return v2.Compose([*steps, *moves] or [v2.Identity()])


class _Continued(nn.Module):
    """Move a crop that goes on beyond its edges, by half its side all around.

    `moves` work on four times the pixels.
    """

    def __init__(self, moves: v2.Transform, padding: str) -> None:
        super().__init__()
        self.moves, self.padding = moves, padding

    def forward(self, *pair: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Move image and mask (..., S, S) together."""
        side = pair[0].shape[-1]
        moved = self.moves(
            *(pad(part, [side // 2] * 4, padding_mode=self.padding) for part in pair)
        )
        return tuple(center_crop(part, [side, side]) for part in moved)


def build_colours(augment: Augment) -> v2.Transform:
    """Build what changes the colours of an image."""
    steps: list[v2.Transform] = []
    if augment.stain:
        steps.append(StainJitter(augment.stain))
    jitter = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    if any(jitter):
        steps.append(v2.ColorJitter(*jitter))
    return v2.Compose(steps or [v2.Identity()])


def build_augmentation(augment: Augment) -> v2.Transform:
    """Build all random changes of one (image, mask) pair."""
    return v2.Compose([build_geometry(augment), build_colours(augment)])


def augment_batch(
    transform: v2.Transform, images: torch.Tensor, masks: torch.Tensor, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change each pair of a batch in its own way.

    Args:
        transform: From `build_augmentation`, `build_geometry` or `build_colours`.
        images: (N, 3, H, W) uint8, H = W.
        masks: (N, H, W) uint8.
        seed: Decides the changes; the global random state is left alone.

    Returns:
        Images and masks of the same shapes and dtypes.
    """
    devices = [images.device] if images.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        pairs = [
            transform(tv_tensors.Image(image), tv_tensors.Mask(mask[None]))
            for image, mask in zip(images, masks, strict=True)
        ]
    changed = torch.stack([torch.as_tensor(image) for image, _ in pairs])
    return changed, torch.stack([torch.as_tensor(mask)[0] for _, mask in pairs])
