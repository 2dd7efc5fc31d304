"""Stains of tissue: their random variation, and bringing them to one appearance.

By Beer and Lambert's law the optical density of a pixel, -ln(I / I0), is a sum of its
stains' colours times their amounts.
"""

from __future__ import annotations

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

# Colours of haematoxylin, eosin and DAB by row, as RGB densities (Ruifrok and Johnston
# 2001, https://pubmed.ncbi.nlm.nih.gov/11531144).
_HED = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
_HED /= _HED.norm(dim=1, keepdim=True)

# What Macenko et al. 2009 (doi:10.1109/ISBI.2009.5193250) bring slides to, as their
# code has it: densities of haematoxylin and eosin, and their 99th percentiles.
_REFERENCE = torch.tensor([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
_REFERENCE_MOST = torch.tensor([1.9705, 1.0308])
_WHITE = 240.0  # intensity of glass, there
_CLEAR = 0.15  # densities below which a pixel counts as glass, there
_LEAST_TISSUE = 0.01  # share of pixels without which no stain can be told


def density(images: torch.Tensor, white: float = 255.0) -> torch.Tensor:
    """Give the optical densities of (..., 3, H, W) values 0..255."""
    return -torch.log(images.to(torch.float32).clamp_min(1.0) / white)


class StainJitter(v2.Transform):  # type: ignore[misc]
    """Change the amount of each stain of an image at random (Tellez et al. 2018).

    Each of haematoxylin, eosin and the residual is multiplied by a number from 1 -
    `strength` to 1 + `strength`, and a tenth of such a number is added.
    """

    def __init__(self, strength: float) -> None:
        super().__init__()
        self.strength = strength

    def make_params(self, flat_inputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Draw the changes."""
        factor, offset = (2 * torch.rand(2, 3) - 1) * self.strength
        return {"factor": 1 + factor, "offset": 0.1 * offset}

    def transform(
        self, inpt: torch.Tensor, params: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Change an image (3, H, W) uint8; masks are left alone."""
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        changed: torch.Tensor = tv_tensors.wrap(
            change_stains(inpt, **params), like=inpt
        )
        return changed


def change_stains(
    image: torch.Tensor, factor: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    """Multiply and shift the amounts of haematoxylin, eosin and residual.

    Args:
        image: (3, H, W) uint8.
        factor: (3,) of the stains.
        offset: (3,) of the stains, in densities.

    Returns:
        (3, H, W) uint8.
    """
    colours = _HED.to(image.device)
    pixels = density(torch.as_tensor(image)).flatten(1)
    amounts = torch.linalg.solve(colours.T, pixels)
    amounts = amounts * factor.to(image.device)[:, None]
    amounts = amounts + offset.to(image.device)[:, None]
    changed = 255 * torch.exp(-(colours.T @ amounts))
    return changed.round().clamp(0, 255).to(torch.uint8).reshape(image.shape)


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
    """Give a percentile of each row: the value at its place, without interpolation."""
    place = min(values.shape[1], 1 + values.shape[1] * percent // 100)
    return values.kthvalue(place, dim=1).values
