"""An exported file compared with its model: classes, probabilities, speed."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medray.apps.probe_windows import ProbeWindows
from medray.errors import MedrayError
from medray.evaluation import confusion, of_images, summary
from medray.models import ModelConfig, Network, choose_device, load_model
from medray.storage import files

Run = Callable[[torch.Tensor], torch.Tensor]
"""(N, S, S, 3) uint8 windows to (N, C, h, w) logits."""

FORMATS = {
    "pt2": "model.pt2",
    "onnx": "model.onnx",
    "int8": "model.onnx",
    "tensorrt": "tensorrt.pt2",
    "wsinfer": "torchscript_model.pt",
}
"""What there is, and the file that holds the network."""

_ROUNDS = 5  # of timing


@dataclass(frozen=True)
class Comparison:
    """An export compared with its model, on the same windows.

    Attributes:
        agreement: Share of pixels (of a classifier: images) with the same class.
        largest_difference: Of the probability of a class at a pixel.
        speed_up: Seconds of the model by those of the export, medians of batches that
            they do in turn; on a CPU with one core.
        model_f1: Of the model on the windows; None without labels.
        f1: Of the export.
    """

    agreement: float
    largest_difference: float
    speed_up: float
    model_f1: float | None
    f1: float | None


def keep(
    made: str,
    out: str,
    model: Run,
    config: ModelConfig,
    windows: ProbeWindows,
    least: float,
) -> Comparison:
    """Compare an exported folder with the model, and copy it to its place.

    Args:
        made: The exported folder.
        out: Where it is to be; its configuration, `model.yaml` or `config.json`, comes
            last.
        model: What it was made from.
        config: Its configuration.
        windows: To compare on.
        least: Share of pixels (images) that must have the same class.

    Raises:
        MedrayError: They do not agree; nothing is written.
    """
    found = compare(model, load_run(made), config, windows)
    if not found.agreement >= least or not math.isfinite(found.largest_difference):
        raise MedrayError(
            f"{out}: the export has the model's class in {found.agreement:.2%} of "
            f"{'images' if config.classifies else 'pixels'} of "
            f"{windows.source} (probabilities differ by up to "
            f"{found.largest_difference:.3f}), expected {least:.2%} or more; nothing "
            f"was written. Take another format, or say what is enough with --agreement"
        )
    names = sorted(os.listdir(made), key=lambda n: n in ("model.yaml", "config.json"))
    for name in names:
        files.write_bytes(
            files.join(out, name), files.read_bytes(os.path.join(made, name))
        )
    return found


def load_run(folder: str) -> Run:
    """Load an exported folder as its users do; of WSInfer with its own transforms."""
    if not files.exists(files.join(folder, "config.json")):
        network, config = load_model(folder)
        return Network(network, config, choose_device(), torch.float32)
    from PIL import Image
    from torchvision import transforms

    steps = files.read_json(files.join(folder, "config.json"))["transform"]
    prepare = transforms.Compose(
        [getattr(transforms, s["name"])(**s.get("arguments", {})) for s in steps]
    )
    script: Any = torch.jit.load(  # type: ignore[no-untyped-call]
        files.join(folder, FORMATS["wsinfer"]), map_location=choose_device()
    )

    def run(pixels: torch.Tensor) -> torch.Tensor:
        images = [prepare(Image.fromarray(window.numpy())) for window in pixels.cpu()]
        logits: torch.Tensor = script(torch.stack(images).to(pixels.device))
        return logits[:, :, None, None]

    return run


def compare(
    model: Run, other: Run, config: ModelConfig, windows: ProbeWindows
) -> Comparison:
    """Compare two runs over windows.

    Args:
        model: One of them.
        other: The other.
        config: Of both.
        windows: Whose classes, probabilities and time are compared.
    """
    threads, device = torch.get_num_threads(), choose_device()
    size, count = config.window.size, len(windows.pixels)
    step = min(count, max(1, 512**2 // size**2))
    batches = torch.split(torch.from_numpy(windows.pixels), step)
    counts = [np.zeros((len(config.classes),) * 2, np.int64) for _ in range(2)]
    same, total, largest = 0, 0, 0.0
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            for i, batch in enumerate(batches):
                pixels = batch.to(device)
                one, two = (_probabilities(r, pixels, config) for r in (model, other))
                difference = float((one - two).abs().max())
                # NaN would be lost in a maximum.
                largest = max(largest, difference if difference >= 0 else math.inf)
                labels = [p.argmax(1).to(torch.uint8).cpu().numpy() for p in (one, two)]
                same += int((labels[0] == labels[1]).sum())
                total += labels[0].size
                if windows.labels is not None:
                    truth = windows.labels[i * step : i * step + len(batch)]
                    for found, predicted in zip(counts, labels, strict=True):
                        found += confusion(truth, predicted, len(config.classes))
            seconds = _seconds((model, other), batches[0].to(device))
    finally:
        torch.set_num_threads(threads)
    scores: list[float | None] = [None, None]
    if windows.labels is not None:
        scores = [_f1(found, config) for found in counts]
    return Comparison(
        agreement=same / total,
        largest_difference=largest,
        speed_up=seconds[0] / seconds[1],
        model_f1=scores[0],
        f1=scores[1],
    )


def _probabilities(run: Run, pixels: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    logits = run(pixels).float()
    if config.classifies:
        logits = logits[:, :, :1, :1]
    return torch.softmax(logits, dim=1)


def _f1(counts: npt.NDArray[np.int64], config: ModelConfig) -> float | None:
    names: Sequence[str] = config.classes.names
    if config.classifies:
        counts, names = of_images(counts, names)
    return summary(counts, names)["f1"]


def _seconds(runs: Sequence[Run], pixels: torch.Tensor) -> list[float]:
    """Time a batch, in turn; return the medians."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for taken, run in zip(times, runs, strict=True):
            start = time.perf_counter()
            run(pixels)
            if pixels.is_cuda:
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]
