"""A model folder -> the same network for another runtime, compared before it is kept.

The way of an export, top to bottom:

    patches   windows of a dataset, of a slide, or of a generated one
    write     the file, in a temporary folder
    compare   file and model on the windows: classes, probabilities, speed
    keep      what agrees is copied to its place; what does not is gone
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from medray.apps.export_agreement import FORMATS, keep
from medray.apps.probe_windows import ProbeWindows, find_windows
from medray.errors import ConfigError, check_positive
from medray.models import (
    WEIGHTS,
    ModelConfig,
    Network,
    choose_device,
    folded,
    is_exported,
    load_model,
    read_config,
)
from medray.storage import files, write_settings

_LEAST = {"int8": 0.98}
_LEAST_ELSE = 0.999  # share of pixels (images) that must have the same class


@dataclass(frozen=True)
class Export:
    """What was exported.

    Attributes:
        out: The folder.
        format: One of FORMATS.
        file: The network's file.
        compared: Windows on which export and model were compared.
        source: Where these come from.
        agreement: Share of pixels (of a classifier: images) with the same class.
        largest_difference: Of a probability.
        speed_up: How many times as fast as the model.
        model_f1: F1 of the model on these windows; None where nothing is annotated.
        f1: F1 of the export on them.
        model_bytes: Size of the model's weights.
        file_bytes: Size of the file.
    """

    out: str
    format: str
    file: str
    compared: int
    source: str
    agreement: float
    largest_difference: float
    speed_up: float
    model_f1: float | None
    f1: float | None
    model_bytes: int
    file_bytes: int

    def __str__(self) -> str:
        before, after = self.model_bytes / 2**20, self.file_bytes / 2**20
        lines = [
            f"classes   the same in {self.agreement:.3%}; probabilities differ by at "
            f"most {self.largest_difference:.4f}",
            f"size      {after:.1f} MiB, the model's weights {before:.1f} MiB",
            f"speed     {self.speed_up:.2f} times the model's",
        ]
        if self.f1 is not None and self.model_f1 is not None:
            lines.append(f"F1        {self.f1:.4f}, the model's {self.model_f1:.4f}")
        lines.append(f"out       {self.out}")
        lines.append(f"compared on {self.compared} windows of {self.source}")
        return "\n".join(lines)


def export(
    model: str, *, format: str, out: str, data: str = "", agreement: float | None = None
) -> Export:
    """Write a model for another runtime, if it says the same there.

    Args:
        model: Folder of `medray train`.
        format: Format: pt2, onnx, int8, tensorrt or wsinfer.
        out: Folder to make; it must not hold a model yet.
        data: Dataset or slide to compare export and model on. "": generated windows.
        agreement: Least share of pixels with the same class (0.999; 0.98 for int8). Of
            classifiers: of images.

    Raises:
        ConfigError: The request is wrong, or a package or a GPU is missing.
        MedrayError: The export says something else than the model; nothing is left.
    """
    check_positive(agreement=agreement)
    model, out = files.absolute(model), files.absolute(out)
    config = read_config(model)
    _check(model, config, format, out)
    network, config = load_model(model)
    windows = find_windows(config, files.absolute(data) if data else "", format)
    with tempfile.TemporaryDirectory(prefix="medray-export-") as made:
        windows = _write(made, model, network, config, format, windows)
        device = choose_device()
        before = Network(network, config, device, torch.float32)
        least = _LEAST.get(format, _LEAST_ELSE) if agreement is None else agreement
        found = keep(made, out, before, config, windows, least)
    name = FORMATS[format]
    result = Export(
        out=out,
        format=format,
        file=name,
        compared=len(windows.pixels),
        source=windows.source,
        model_bytes=files.size(files.join(model, WEIGHTS)),
        file_bytes=files.size(files.join(out, name)),
        **asdict(found),
    )
    # Last: a folder with export.json is whole.
    files.write_json(files.join(out, "export.json"), asdict(result))
    return result


def _check(model: str, config: ModelConfig, format: str, out: str) -> None:
    """Raise an error for what cannot be exported, before any work."""
    if format not in FORMATS:
        raise ConfigError(f"format: expected one of {list(FORMATS)}, found {format!r}")
    if is_exported(model):
        raise ConfigError(
            f"{model}: comes from `medray export`; give the model folder that it was "
            f"made from"
        )
    if config.morphology is not None:
        raise ConfigError(
            f"{model}: takes measures of nucleus and cytoplasm beside the pixels, and "
            f"no export has an input for them; train with model.morphology=false"
        )
    for name in ("model.yaml", "config.json", *FORMATS.values()):
        if files.exists(files.join(out, name)):
            raise ConfigError(
                f"{out}: holds a model ({name}); choose another --out, or delete it"
            )
    if format in ("onnx", "int8"):
        try:
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"format {format}: needs {error.name}; install medray with the extra "
                f"`export`"
            ) from error
    if format == "tensorrt":
        if not torch.cuda.is_available():
            raise ConfigError(
                "format tensorrt: needs an NVIDIA GPU, which this machine has not; "
                "export where the model is to run, or take onnx"
            )
        try:
            import torch_tensorrt  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                "format tensorrt: needs torch-tensorrt; install it beside medray"
            ) from error
    if format == "wsinfer":
        _check_wsinfer(model, config)


def _check_wsinfer(model: str, config: ModelConfig) -> None:
    if not config.classifies:
        raise ConfigError(
            f"{model}: WSInfer classifies patches, this is a segmenter "
            f"({config.architecture.name}); export it as onnx"
        )
    if config.mpp is None:
        raise ConfigError(
            f"{model}: WSInfer needs the microns per pixel of the patches, and this "
            f"model has none; train on data with a resolution (`medray ingest --mpp`)"
        )
    if config.stain != "none":
        raise ConfigError(
            f"{model}: brings the staining to one ({config.stain}), which WSInfer "
            f"cannot; train with stain: none"
        )
    if config.zscore:
        raise ConfigError(
            f"{model}: scales each window by its own mean and deviation, which WSInfer "
            f"cannot; train with scaling: unit"
        )


# --- write ----------------------------------------------------------------------------


def _write(
    made: str,
    model: str,
    network: torch.nn.Module,
    config: ModelConfig,
    format: str,
    windows: ProbeWindows,
) -> ProbeWindows:
    """Write the file and its model.yaml; return the windows to compare on."""
    from medray.models import Normalise, exported

    network = folded(network.eval())
    path = os.path.join(made, FORMATS[format])
    if format == "int8":
        # What the ranges are taken from says nothing of their worth: it is left out.
        third = np.arange(len(windows.pixels)) % 3 == 0
        pixels = torch.from_numpy(windows.every(third).pixels).permute(0, 3, 1, 2)
        exported.write_int8(network, config, path, Normalise(config)(pixels))
        windows = windows.every(~third)
    else:
        write = {
            "pt2": exported.write_pt2,
            "onnx": exported.write_onnx,
            "tensorrt": exported.write_tensorrt,
            "wsinfer": exported.write_torchscript,
        }
        write[format](network, config, path)
    card = _card(files.read_bytes(files.join(model, "README.md")).decode(), format)
    files.write_bytes(os.path.join(made, "README.md"), card.encode())
    if format == "wsinfer":
        files.write_json(os.path.join(made, "config.json"), _wsinfer_config(config))
        return windows
    for name in ("metrics.json", "seen.txt"):
        uri = files.join(model, name)
        if files.exists(uri):
            files.write_bytes(os.path.join(made, name), files.read_bytes(uri))
    write_settings(os.path.join(made, "model.yaml"), config)
    return windows


def _card(before: str, format: str) -> str:
    return f"{before}\nExported as {format}; `export.json` says how well it agrees.\n"


def _wsinfer_config(config: ModelConfig) -> dict[str, Any]:
    """Return what WSInfer must know, by its model zoo's schema 1.0.

    https://github.com/SBU-BMI/wsinfer-zoo, model-config.schema.json
    """
    size = config.window.size
    normalise = {"mean": list(config.mean), "std": list(config.std)}
    return {
        "spec_version": "1.0",
        "architecture": config.architecture.encoder.removeprefix("tu-"),
        "num_classes": len(config.classes),
        "class_names": list(config.classes.names),
        "patch_size_pixels": size,
        "spacing_um_px": config.mpp,
        "transform": [
            {"name": "Resize", "arguments": {"size": size}},
            {"name": "ToTensor"},
            {"name": "Normalize", "arguments": normalise},
        ],
    }
