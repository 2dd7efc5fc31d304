"""Random changes of training crops, image and mask together, on their device."""

from __future__ import annotations

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from medray.recipe import Augment


def build_augmentation(augment: Augment) -> v2.Transform:
    """Build the transform of one (image, mask) pair."""
    steps: list[v2.Transform] = []
    if augment.flips:
        quarter_turn = v2.RandomChoice(
            [v2.Identity(), v2.RandomRotation((90.0, 90.0))], p=[0.5, 0.5]
        )
        steps += [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip(), quarter_turn]
    jitter = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
    if any(jitter):
        steps.append(v2.ColorJitter(*jitter))
    return v2.Compose(steps or [v2.Identity()])


def augment_batch(
    transform: v2.Transform, images: torch.Tensor, masks: torch.Tensor, *, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change each pair of a batch in its own way.

    Args:
        transform: From `build_augmentation`.
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
