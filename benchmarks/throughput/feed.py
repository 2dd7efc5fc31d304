"""Feeding a training: reading crops and augmenting them, compared with libraries.

Interleaved, on the same crops, in one process of two threads:

    read      parts of shards (`read_part`), and slices of the same arrays with zarr
    change    a batch at once (`move`, `recolour`), and torchvision, crop by crop

Run: python -m benchmarks.throughput.feed --sides 64 256 512 --rounds 5
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from benchmarks import harness
from medray.datasets.synthetic import generate
from medray.geometry import Rectangle
from medray.slides.opening import open_slide
from medray.storage import ome_zarr
from medray.storage.squares import read_part
from medray.training.augment import Augment, move, recolour

SLIDE = 2048
CHANGES = Augment(rotate=15, zoom=0.2, shift=0.05, saturation=0.15, hue=0.03)


def make_level(folder: Path, side: int, patch: int) -> ome_zarr.Pixels:
    """A generated slide as a dataset has it, patches as large as the crops."""
    generate(folder, slides=1, seed=1, height=side, width=side)
    with open_slide(next((folder / "slides").iterdir())) as slide:
        pixels = np.moveaxis(slide.read(0, 0, side, side), 2, 0)
    uri = str(folder / "slide.ome.zarr")
    ome_zarr.create_image(
        uri, side, side, mpp=0.5, name="s", attributes={}, region=side, patch=patch
    )
    ome_zarr.write_region(uri, Rectangle(0, 0, side, side), pixels)
    return ome_zarr.open_level(uri)


def of_torchvision(augment: Augment) -> Callable[[torch.Tensor, torch.Tensor], object]:
    """The same changes by torchvision, each crop by itself."""
    turn = v2.RandomChoice([v2.Identity(), v2.RandomRotation((90.0, 90.0))])
    affine = v2.RandomAffine(
        augment.rotate,
        translate=(augment.shift, augment.shift),
        scale=(1 - augment.zoom, 1 + augment.zoom),
        interpolation=v2.InterpolationMode.BILINEAR,
        fill={tv_tensors.Image: 255, tv_tensors.Mask: 0},
    )
    jitter = v2.ColorJitter(
        augment.brightness, augment.contrast, augment.saturation, augment.hue
    )
    flips = [v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]
    every = v2.Compose([*flips, turn, affine, jitter])

    def change(images: torch.Tensor, masks: torch.Tensor) -> object:
        pairs = [
            every(tv_tensors.Image(image), tv_tensors.Mask(mask[None]))
            for image, mask in zip(images, masks, strict=True)
        ]
        return torch.stack([image for image, _ in pairs])

    return change


def measure(side: int, crops: int, rounds: int) -> Iterator[harness.Rounds]:
    """Compare reading and changing a batch of crops of one size, in ms per crop."""
    corners = np.random.default_rng(0).integers(0, SLIDE // side, (crops, 2)) * side

    def timed(do: Callable[[], object]) -> Callable[[], dict[str, float]]:
        def run() -> dict[str, float]:
            start = time.perf_counter()
            do()
            return {"ms per crop": (time.perf_counter() - start) / crops * 1e3}

        return run

    with tempfile.TemporaryDirectory() as name:
        level = make_level(Path(name), SLIDE, side)

        def by_zarr() -> list[np.ndarray]:
            return [level[:, y : y + side, x : x + side] for y, x in corners]

        def by_medray() -> list[np.ndarray]:
            return [read_part(level, y, x, side, side) for y, x in corners]

        ways = {"medray": timed(by_medray), "zarr": timed(by_zarr)}
        yield harness.interleaved(ways, rounds, what="read", side=side)
        images = torch.from_numpy(np.stack(by_medray()))
    masks = (images[:, 0] > 128).byte()
    theirs = of_torchvision(CHANGES)

    def ours() -> torch.Tensor:
        return recolour(CHANGES, move(CHANGES, images, masks, seed=1)[0], seed=2)

    ways = {"medray": timed(ours), "torchvision": timed(lambda: theirs(images, masks))}
    yield harness.interleaved(ways, rounds, what="change", side=side)


def main(
    sides: tuple[int, ...] = (64, 256, 512), crops: int = 32, rounds: int = 5
) -> Iterator[harness.Result]:
    """Compare reading crops with zarr, and augmenting them with torchvision.

    Args:
        sides: Of the crops, pixels.
        crops: Number of crops in a batch.
        rounds: Number of rounds.
    """
    torch.set_num_threads(2)
    for side in sides:
        yield from measure(side, crops, rounds)


if __name__ == "__main__":
    harness.run(main)
