"""Segment slides with another system; print what it took as JSON.

Run in the peers' environment by compare.py and kill.py. Counted are reading,
predicting, stitching and writing; imports, loading the model and starting Ray are not.
"""

import logging
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import segmentation_models_pytorch as smp
import tifffile
import torch
import yaml
import zarr
from safetensors.torch import load_file
from torch import nn

from benchmarks import harness
from benchmarks.peers.engines import monai, tiatoolbox_file
from medray.geometry import Windows

warnings.filterwarnings("ignore")
logging.disable(logging.CRITICAL)
BATCH = 4


class Model(nn.Module):
    """The model of a medray folder: pixels of 0 to 255 in, probabilities out."""

    def __init__(self, folder: Path, precision: torch.dtype) -> None:
        super().__init__()
        self.precision = precision
        config = yaml.safe_load((folder / "model.yaml").read_text())
        self.network = smp.create_model(
            config["architecture"]["name"],
            encoder_name=config["architecture"]["encoder"],
            encoder_weights=None,
            in_channels=3,
            classes=len(config["classes"]["names"]),
        )
        self.network.load_state_dict(load_file(folder / "weights.safetensors"))
        self.network.eval().requires_grad_(False)
        mean = torch.tensor(config["mean"]).reshape(1, 3, 1, 1)
        std = torch.tensor(config["std"]).reshape(1, 3, 1, 1)
        self.register_buffer("scale", 1 / (255 * std))
        self.register_buffer("shift", -mean / std)
        self.seconds, self.windows = 0.0, 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        start = time.perf_counter()
        low = self.precision != torch.float32
        with torch.autocast("cpu", self.precision, enabled=low):
            logits = self.network(pixels * self.scale + self.shift)
        probabilities = torch.softmax(logits.float(), dim=1)
        self.seconds += time.perf_counter() - start
        self.windows += len(pixels)
        return probabilities


def run_tiatoolbox(slides: list[Path], model: Model, out: Path, w: Windows) -> None:
    for path in slides:
        mask = tiatoolbox_file(path, model, w, BATCH, out / "tiatoolbox" / path.stem)
        np.save(out / f"{path.stem}.npy", mask)


def run_monai(slides: list[Path], model: Model, out: Path, w: Windows) -> None:
    for path in slides:
        save(out, path, monai(tifffile.imread(path), model, w, BATCH))


def run_ratiopath(slides: list[Path], model: Model, out: Path, w: Windows) -> None:
    """read_slides, tiles, one actor on all cores, MaskBuilder in the driver."""
    import ray
    from ratiopath.masks.mask_builders import MaskBuilder
    from ratiopath.ray import read_slides
    from ratiopath.tiling import grid_tiles, read_slide_tiles
    from ray.data.expressions import col

    def tiles(row: dict) -> list[dict]:
        extent = (row["extent_y"], row["extent_x"])
        side, stride = (w.size, w.size), (w.stride, w.stride)
        keep = ("path", "level", "tile_extent_x", "tile_extent_y")
        return [
            {"tile_y": int(y), "tile_x": int(x)} | {key: row[key] for key in keep}
            for y, x in grid_tiles(extent, side, stride, last="keep")
        ]

    class Actor:
        def __init__(self) -> None:
            torch.set_num_threads(int(ray.cluster_resources()["CPU"]))
            self.model = model

        def __call__(self, batch: dict) -> dict:
            cut = torch.from_numpy(np.stack(batch.pop("tile"))[..., :3])
            before = self.model.seconds
            with torch.inference_mode():
                scores = self.model(cut.permute(0, 3, 1, 2).float())
            batch["seconds"] = np.full(len(cut), self.model.seconds - before) / len(cut)
            return batch | {"scores": scores.numpy()}

    rows = (
        read_slides(
            [str(path) for path in slides],
            tile_extent=w.size,
            stride=w.stride,
            level=0,
        )
        .flat_map(tiles)
        .with_column(
            "tile",
            read_slide_tiles(
                col("path"),
                col("tile_x"),
                col("tile_y"),
                col("tile_extent_x"),
                col("tile_extent_y"),
                col("level"),
            ),
        )
        .map_batches(Actor, batch_size=BATCH, concurrency=1, num_cpus=1)
    )
    builders: dict[str, MaskBuilder] = {}
    sizes = {str(p): tifffile.TiffFile(p).pages[0].shape[:2] for p in slides}
    for batch in rows.iter_batches(batch_size=BATCH):
        model.seconds += float(np.sum(batch["seconds"]))
        model.windows += len(batch["path"])
        for i, path in enumerate(batch["path"]):
            if path not in builders:
                side, stride = (w.size, w.size), (w.stride, w.stride)
                builders[path] = MaskBuilder(sizes[path], side, side, stride, 2)
            coords = np.array([[batch["tile_y"][i], batch["tile_x"][i]]])
            builders[path].update_batch(batch["scores"][i : i + 1], coords)
    for path, builder in builders.items():
        height, width = sizes[path]
        scores = builder.finalize()["mask"][:, :height, :width]
        save(out, Path(path), scores.argmax(axis=0).astype(np.uint8))


class Segmenter:
    """The model as LazySlide calls one."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def to(self, device: str) -> None:
        self.model.to(device)

    def get_transform(self) -> Callable[[np.ndarray], torch.Tensor]:
        return lambda image: torch.from_numpy(image).permute(2, 0, 1).float()

    def segment(self, images: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(probability_map=self.model(images))


def run_lazyslide(slides: list[Path], model: Model, out: Path, w: Windows) -> None:
    """semantic over tiles of the whole slide; its polygons are drawn as a mask."""
    import cv2
    import lazyslide
    from wsidata import open_wsi

    for path in slides:
        wsi = open_wsi(path)
        lazyslide.pp.tile_tissues(
            wsi, w.size, stride_px=w.stride, edge=True, background_filter=False
        )
        lazyslide.seg.semantic(
            wsi,
            Segmenter(model),
            batch_size=BATCH,
            num_workers=0,
            device="cpu",
            amp=False,  # the model casts itself
            class_names=["background", "tumour"],
            ignore_index=[0],
            pbar=False,
            key_added="found",
        )
        mask = np.zeros(tifffile.TiffFile(path).pages[0].shape[:2], np.uint8)
        for shape in wsi["found"].geometry:
            for part in getattr(shape, "geoms", [shape]):
                rings = [part.exterior, *part.interiors]
                points = [
                    np.round(np.asarray(r.coords)).astype(np.int32) for r in rings
                ]
                cv2.fillPoly(mask, points, 1)
        save(out, path, mask)


def save(out: Path, slide: Path, mask: np.ndarray) -> None:
    stored = out / f"{slide.stem}.zarr"
    shutil.rmtree(stored, ignore_errors=True)  # of a run that was killed
    zarr.save_array(str(stored), mask, zarr_format=3)
    np.save(out / f"{slide.stem}.npy", mask)


SYSTEMS: dict[str, Callable[[list[Path], Model, Path, Windows], None]] = {
    "tiatoolbox": run_tiatoolbox,
    "monai": run_monai,
    "ratiopath": run_ratiopath,
    "lazyslide": run_lazyslide,
}


def main(
    system: Literal["tiatoolbox", "monai", "ratiopath", "lazyslide"],
    model: Path,
    out: Path,
    slides: tuple[Path, ...],
    precision: Literal["float32", "bfloat16"] = "float32",
    windows: tuple[int, int] = (512, 384),
) -> Iterator[harness.Result]:
    """Segment slides with another system; the last line is what it took, as JSON.

    Args:
        system: Which.
        model: Model folder of medray.
        out: Folder for masks.
        slides: Files.
        precision: Of the model.
        windows: Size and stride, pixels.
    """
    out.mkdir(parents=True, exist_ok=True)
    network = Model(model, getattr(torch, precision))
    if system == "ratiopath":
        import ray

        ray.init(logging_level=logging.ERROR, log_to_driver=False)
        ray.data.DataContext.get_current().enable_progress_bars = False
    with torch.inference_mode():
        side = windows[0]
        network(torch.zeros(BATCH, 3, side, side))  # warms up
    network.seconds, network.windows = 0.0, 0
    start = time.perf_counter()
    SYSTEMS[system](slides, network, out, Windows(*windows))
    seconds = time.perf_counter() - start
    yield {
        "seconds": seconds,
        "forward": network.seconds,
        "windows": network.windows,
    }


if __name__ == "__main__":
    harness.run(main)
