"""Networks as files of other runtimes: written, and loaded again.

All take (N, 3, S, S) float32, normalised, S the model's window, and any N; they give
its logits. The normalisation stays outside, in the model's configuration.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from medray.errors import ConfigError, FormatError
from medray.models.config import ModelConfig, check_runtime, weights_uri
from medray.storage import files, to_dict


class Exported(nn.Module):
    """An exported network in the place of a model; it is always in evaluation mode."""

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Take what maps inputs to logits."""
        super().__init__()
        self.run = run

    def train(self, mode: bool = True) -> Exported:
        """Do nothing: what differs in training was left out."""
        return self

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map (N, 3, S, S) to logits (N, C, S, S) or (N, C)."""
        return self.run(inputs)


# --- load -----------------------------------------------------------------------------


def load_exported(folder: str, config: ModelConfig) -> Exported:
    """Load the network of an exported model folder, and try it on one window.

    Raises:
        ConfigError: A package that it needs is not installed.
        FormatError: The file is damaged, or does not fit the configuration.
    """
    check_runtime(folder)
    uri = weights_uri(folder)
    data = files.read_bytes(uri)
    size = config.window.size
    expected = f"expected a network of {size} px windows and {len(config.classes)} "
    expected += "classes as `medray export` writes it"
    try:
        if uri.endswith("tensorrt.pt2"):
            import torch_tensorrt  # noqa: F401  its operators are then known
        model = Exported(_load_onnx(data) if uri.endswith(".onnx") else _load_pt2(data))
        with torch.inference_mode():
            found = tuple(model(torch.zeros(1, 3, size, size, device=_device())).shape)
    except Exception as error:  # both runtimes raise exceptions of many kinds
        problem = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise FormatError(f"{uri}: {expected}, found {problem}") from error
    if found not in ((1, len(config.classes)), (1, len(config.classes), size, size)):
        raise FormatError(f"{uri}: {expected}, found outputs of shape {list(found)}")
    return model


def _device() -> str:
    # What a program makes of itself, such as positions, is made on a device it names.
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load_pt2(data: bytes) -> nn.Module:
    from torch.export.passes import move_to_device_pass

    program = torch.export.load(io.BytesIO(data))
    if _device() == "cuda":
        program = move_to_device_pass(program, "cuda")
    return program.module()


def _load_onnx(data: bytes) -> Callable[[torch.Tensor], torch.Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # On a CPU each of the predictor's threads runs batches of its own.
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    wanted = ("CUDAExecutionProvider", "CPUExecutionProvider")
    there = onnxruntime.get_available_providers()
    session = onnxruntime.InferenceSession(
        data, options, providers=[name for name in wanted if name in there]
    )
    name = session.get_inputs()[0].name

    def run(inputs: torch.Tensor) -> torch.Tensor:
        feed = inputs.detach().to("cpu", torch.float32).contiguous().numpy()
        return torch.from_numpy(session.run(None, {name: feed})[0]).to(inputs.device)

    return run


# --- write ----------------------------------------------------------------------------


def write_pt2(model: nn.Module, config: ModelConfig, path: str) -> None:
    """Write a program of torch.export; errors of all: see `medray.apps.export`."""
    torch.export.save(_program(model, config), path)


def write_onnx(model: nn.Module, config: ModelConfig, path: str) -> None:
    """Write ONNX, with the model's configuration as JSON in its metadata `medray`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            _program(model, config),
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            verbose=False,
        )
    program.model.metadata_props["medray"] = json.dumps(to_dict(config))
    program.save(path, external_data=False)


def write_int8(
    model: nn.Module, config: ModelConfig, path: str, inputs: torch.Tensor
) -> None:
    """Write ONNX whose convolutions and products are of 8 bit.

    By ONNX Runtime's static quantisation: weights per channel, activations by the
    ranges that `inputs` give them.

    Args:
        model: The network.
        config: Its configuration.
        path: File to write; files next to it are left.
        inputs: (N, 3, S, S) float32, normalised: what the ranges are taken from.
    """
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Inputs(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rest: Iterator[torch.Tensor] = iter(torch.split(inputs, 1))

        def get_next(self) -> dict[str, Any] | None:
            one = next(self._rest, None)
            return None if one is None else {"images": one.contiguous().numpy()}

    plain, prepared = f"{path}.float", f"{path}.prepared"
    write_onnx(model, config, plain)
    quant_pre_process(plain, prepared, skip_symbolic_shape=True)
    quantization.quantize_static(
        prepared,
        path,
        Inputs(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        # On processors without VNNI sums of 8-bit products would saturate.
        reduce_range=True,
    )
    quantised = onnx.load(path)
    onnx.helper.set_model_props(quantised, {"medray": json.dumps(to_dict(config))})
    onnx.save(quantised, path)
    for left in (plain, prepared):
        os.remove(left)


def write_torchscript(model: nn.Module, config: ModelConfig, path: str) -> None:
    """Write TorchScript, as older runtimes (WSInfer, QuPath's) read it."""
    size = config.window.size
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, torch.zeros(2, 3, size, size)).save(path)  # type: ignore[no-untyped-call]


def write_tensorrt(model: nn.Module, config: ModelConfig, path: str) -> None:
    """Compile for this machine's GPU with TensorRT, in float16 where it is as good."""
    import torch_tensorrt

    shape = (3, config.window.size, config.window.size)
    batch = torch_tensorrt.Input(
        min_shape=(1, *shape), opt_shape=(25, *shape), max_shape=(25, *shape)
    )
    engine = torch_tensorrt.compile(
        model.cuda(),
        ir="dynamo",
        inputs=[batch],
        enabled_precisions={torch.float32, torch.float16},
    )
    example = torch.zeros(25, *shape, device="cuda")
    torch_tensorrt.save(engine, path, inputs=[example])


def _program(model: nn.Module, config: ModelConfig) -> torch.export.ExportedProgram:
    size = config.window.size
    batch = torch.export.Dim("batch", min=1)
    try:
        return torch.export.export(
            model, (torch.zeros(2, 3, size, size),), dynamic_shapes=({0: batch},)
        )
    except Exception as error:  # anything that the network's author wrote
        problem = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"export: torch.export cannot follow {config.architecture.name} on "
            f"{config.architecture.encoder}: {problem}"
        ) from error
