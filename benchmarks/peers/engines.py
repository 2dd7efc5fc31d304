"""Other systems as engines: pixels, a model and windows in, a mask out.

Used as their documentation says, with the options that suit them best. Runs in an
environment of its own, see benchmarks/peers/README.md; of medray it needs the geometry
and the checks only.
"""

import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import nn

from medray.geometry import Windows

UInt8 = np.ndarray

warnings.filterwarnings("ignore")


def tiatoolbox(pixels: UInt8, model: nn.Module, windows: Windows, batch: int) -> UInt8:
    """SemanticSegmentor on a TIFF in WSI mode; the most likely class is its mask."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "slide.tif"
        write_tiff(path, pixels)
        return tiatoolbox_file(path, model, windows, batch, Path(name) / "out")


def tiatoolbox_file(
    path: Path, model: nn.Module, windows: Windows, batch: int, out: Path
) -> UInt8:
    from tiatoolbox.models.engine.io_config import IOSegmentorConfig
    from tiatoolbox.models.engine.semantic_segmentor import SemanticSegmentor
    from tiatoolbox.models.models_abc import ModelABC

    class Wrapped(ModelABC):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(images)

        @staticmethod
        def postproc(image: np.ndarray) -> np.ndarray:  # as its own UNetModel has it
            return np.argmax(image, axis=-1)

        @staticmethod
        def infer_batch(model: nn.Module, images: torch.Tensor, *, device: str):
            with torch.inference_mode():
                pixels = images.to(device).float().permute(0, 3, 1, 2).contiguous()
                return model(pixels).permute(0, 2, 3, 1).cpu().numpy()

    shutil.rmtree(out, ignore_errors=True)
    side = [windows.size, windows.size]
    resolution = [{"units": "baseline", "resolution": 1.0}]
    config = IOSegmentorConfig(
        input_resolutions=resolution,
        output_resolutions=resolution,
        patch_input_shape=side,
        patch_output_shape=side,
        stride_shape=[windows.stride, windows.stride],
        save_resolution=resolution[0],
    )
    engine = SemanticSegmentor(
        model=Wrapped(), batch_size=batch, num_workers=0, device="cpu", verbose=False
    )
    result = engine.run(
        images=[path],
        patch_mode=False,
        ioconfig=config,
        auto_get_mask=False,
        save_dir=out,
        overwrite=True,
        output_type="zarr",
        memory_threshold=80,
    )
    import zarr

    (uri,) = result.values() if isinstance(result, dict) else (result,)
    group = zarr.open(str(uri), mode="r")
    return np.asarray(group["predictions"][:]).astype(np.uint8)


def monai(pixels: UInt8, model: nn.Module, windows: Windows, batch: int) -> UInt8:
    """sliding_window_inference of the whole image, Gaussian weights."""
    from monai.inferers import sliding_window_inference

    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    with torch.inference_mode():
        scores = sliding_window_inference(
            image,
            roi_size=(windows.size, windows.size),
            sw_batch_size=batch,
            predictor=model,
            overlap=1 - windows.stride / windows.size,
            mode="gaussian",
        )
    return scores[0].argmax(0).numpy().astype(np.uint8)


def ratiopath(pixels: UInt8, model: nn.Module, windows: Windows, batch: int) -> UInt8:
    """grid_tiles and MaskBuilder (mean of overlaps); tiles past the end are padded."""
    from ratiopath.masks.mask_builders import MaskBuilder
    from ratiopath.tiling import grid_tiles

    height, width = pixels.shape[:2]
    side, stride = (windows.size,) * 2, (windows.stride,) * 2
    tiles = list(grid_tiles((height, width), side, stride, last="keep"))
    builder = MaskBuilder((height, width), side, side, stride, n_channels=4)
    pad = [(0, windows.size), (0, windows.size), (0, 0)]
    padded = np.pad(pixels, pad, constant_values=255)
    for first in range(0, len(tiles), batch):
        coords = np.stack(tiles[first : first + batch])
        cut = np.stack(
            [padded[y : y + windows.size, x : x + windows.size] for y, x in coords]
        )
        with torch.inference_mode():
            scores = model(torch.from_numpy(cut).permute(0, 3, 1, 2).float())
        builder.update_batch(scores.numpy(), coords)
    scores = builder.finalize()["mask"]
    return scores.argmax(axis=0)[:height, :width].astype(np.uint8)


def ratiopath_shifted(
    pixels: UInt8, model: nn.Module, windows: Windows, batch: int
) -> UInt8:
    """The same with `last="shift"`: no tile reaches past the slide's end."""
    from ratiopath.masks.mask_builders import MaskBuilder
    from ratiopath.tiling import grid_tiles

    height, width = pixels.shape[:2]
    side, stride = (windows.size,) * 2, (windows.stride,) * 2
    tiles = list(grid_tiles((height, width), side, stride, last="shift"))
    builder = MaskBuilder((height, width), side, side, stride, n_channels=4)
    for y, x in tiles:
        cut = pixels[None, y : y + windows.size, x : x + windows.size]
        with torch.inference_mode():
            scores = model(torch.from_numpy(cut).permute(0, 3, 1, 2).float())
        builder.update_batch(scores.numpy(), np.array([[y, x]]))
    scores = builder.finalize()["mask"]
    return scores.argmax(axis=0)[:height, :width].astype(np.uint8)


def write_tiff(path: Path, pixels: UInt8) -> None:
    """Write a tiled TIFF that says 0.5 microns per pixel."""
    tifffile.imwrite(
        path,
        pixels,
        tile=(256, 256),
        photometric="rgb",
        resolution=(20000, 20000),
        resolutionunit="CENTIMETER",
        metadata=None,
    )


ENGINES: dict[str, Callable[[UInt8, nn.Module, Windows, int], UInt8]] = {
    "TIAToolbox": tiatoolbox,
    "MONAI": monai,
    "ratiopath": ratiopath,
    "ratiopath, shift": ratiopath_shifted,
}
