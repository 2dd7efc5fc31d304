"""Stains of tissue: their random variation, and bringing them to one appearance.

By Beer and Lambert's law the optical density of a pixel, -ln(I / I0), is a sum of its
stains' colours times their amounts.
"""

from __future__ import annotations

import torch

from medray.slides import HED

_HED = torch.tensor(HED, dtype=torch.float32)
_HED /= _HED.norm(dim=1, keepdim=True)

# What Macenko et al. 2009 (doi:10.1109/ISBI.2009.5193250) bring slides to, as their
# code has it: densities of haematoxylin and eosin, and their 99th percentiles.
_REFERENCE = torch.tensor([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
_REFERENCE_MOST = torch.tensor([1.9705, 1.0308])
_WHITE = 240.0  # intensity of glass, there
_CLEAR = 0.15  # densities below which a pixel counts as glass, there
_LEAST_TISSUE = 0.01  # share of pixels without which no stain can be estimated


def density(images: torch.Tensor, white: float = 255.0) -> torch.Tensor:
    """Return the optical densities of (..., 3, H, W) values 0..255."""
    return -torch.log(images.to(torch.float32).clamp_min(1.0) / white)


def change_stains(
    images: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Multiply and shift the amounts of haematoxylin, eosin and residual.

    So Tellez et al. 2018 (doi:10.1109/TMI.2018.2820199) vary the staining of slides.

    Args:
        images: (N, 3, H, W) uint8.
        factor: (N, 3) of the stains.
        offset: (N, 3) of the stains, in densities.

    Returns:
        (N, 3, H, W) uint8.
    """
    device, mix = images.device, _HED.T
    matrix = mix @ torch.diag_embed(factor) @ torch.linalg.inv(mix)
    shift = (mix @ offset[:, :, None]).to(device)
    pixels = density(images).flatten(2)
    changed = torch.baddbmm(shift, matrix.to(device), pixels).neg_().exp_().mul_(255)
    return changed.round_().clamp_(0, 255).to(torch.uint8).view(images.shape)


def macenko(images: torch.Tensor) -> torch.Tensor:
    """Bring each image of a batch to the reference staining (Macenko et al. 2009).

    Images that are all glass, or of one stain only, are left as they are.

    Args:
        images: (N, 3, H, W) uint8.

    Returns:
        (N, 3, H, W) uint8.
    """
    return torch.stack([_macenko(image) for image in images])


def _macenko(image: torch.Tensor) -> torch.Tensor:
    densities = density(image, _WHITE).flatten(1)
    tissue = densities[:, (densities > _CLEAR).all(dim=0)]
    if tissue.shape[1] < max(2, _LEAST_TISSUE * densities.shape[1]):
        return image
    stains = _stains(tissue)
    if stains is None:
        return image
    amounts = torch.linalg.lstsq(stains, densities).solution
    most = _percentile(amounts, 99)
    if (most <= 1e-3).any():
        return image
    amounts = amounts * (_REFERENCE_MOST.to(image.device) / most)[:, None]
    changed = _WHITE * torch.exp(-(_REFERENCE.to(image.device).T @ amounts))
    return changed.round().clamp(0, 255).to(torch.uint8).reshape(image.shape)


def _stains(tissue: torch.Tensor) -> torch.Tensor | None:
    """Find the densities (3, 2) of haematoxylin and eosin in (3, M) densities.

    They are the extreme directions of the plane that the densities spread in most.
    """
    _, vectors = torch.linalg.eigh(torch.cov(tissue))
    plane = vectors[:, [2, 1]]
    plane = plane * torch.where(plane.sum(dim=0) < 0, -1.0, 1.0)
    first, second = plane.T @ tissue
    angles = torch.atan2(second, first)
    low, high = _percentile(angles[None], 1)[0], _percentile(angles[None], 99)[0]
    if high - low < 1e-3:
        return None
    ends = torch.stack([torch.stack([a.cos(), a.sin()]) for a in (low, high)], dim=1)
    found: torch.Tensor = plane @ ends
    # Haematoxylin is the one that absorbs more red.
    return found if found[0, 0] > found[0, 1] else found.flip(1)


def _percentile(values: torch.Tensor, percent: int) -> torch.Tensor:
    """Return a percentile of each row: the value at its place, not interpolated."""
    place = min(values.shape[1], 1 + values.shape[1] * percent // 100)
    return values.kthvalue(place, dim=1).values
