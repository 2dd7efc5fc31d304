"""What feeds a training, reading crops and changing them, beside the libraries' ways.

Interleaved, on the same crops, in one process of two threads:

    read      parts of shards (`read_square`) beside slicing the same arrays with zarr
    change    a batch at once (`move`, `recolour`) beside torchvision, crop by crop

Run: python benchmarks/feed.py --sides 64 256 512 --rounds 5
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from medray.datasets.synthetic import generate
from medray.geometry import Rectangle
from medray.slides import open_slide
from medray.storage import ome_zarr
from medray.storage.squares import read_square
from medray.training.augment import move, recolour
from medray.training.recipe import Augment

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


def compare(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, do in ways.items():
            start = time.perf_counter()
            do()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def measure(side: int, crops: int, rounds: int) -> dict[str, object]:
    """Compare reading and changing a batch of crops of one size."""
    corners = np.random.default_rng(0).integers(0, SLIDE // side, (crops, 2)) * side
    with tempfile.TemporaryDirectory() as name:
        level = make_level(Path(name), SLIDE, side)

        def by_zarr() -> list[np.ndarray]:
            return [level[:, y : y + side, x : x + side] for y, x in corners]

        def by_medray() -> list[np.ndarray]:
            return [read_square(level, y, x, side, side) for y, x in corners]

        read = compare({"zarr": by_zarr, "medray": by_medray}, rounds)
        images = torch.from_numpy(np.stack(by_medray()))
    masks = (images[:, 0] > 128).byte()
    theirs = of_torchvision(CHANGES)

    def ours() -> torch.Tensor:
        return recolour(CHANGES, move(CHANGES, images, masks, seed=1)[0], seed=2)

    change = compare(
        {"torchvision": lambda: theirs(images, masks), "medray": ours}, rounds
    )
    line: dict[str, object] = {"side": side, "threads": torch.get_num_threads()}
    for what, found in (("read", read), ("change", change)):
        for way, seconds in found.items():
            line[f"{what}, {way}: ms a crop"] = round(seconds / crops * 1e3, 3)
        other, mine = found.values()
        line[f"{what}: times"] = round(other / mine, 1)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--crops", type=int, default=32, help="in a batch")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(2)
    for side in args.sides:
        print(json.dumps(measure(side, args.crops, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
