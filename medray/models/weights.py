"""Encoder weights to start from: downloaded by their libraries, or from a file."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import segmentation_models_pytorch as smp
import timm
import torch
from torch import nn

from medray.errors import ConfigError
from medray.models.config import Architecture
from medray.storage import files

# How the names of encoder weights begin in files that hold more than the encoder, and
# in those of the library that it is from.
_PREFIXES = ("", "encoder.", "features.", "model.", "encoder.model.")


def is_file(weights: str | None) -> bool:
    """Return whether weights are a file, not the name of what a library downloads."""
    return weights is not None and ("/" in weights or "." in weights)


def load_encoder(encoder: nn.Module, uri: str) -> list[str]:
    """Load the weights of an encoder from a file.

    Args:
        encoder: Takes them; the file may hold more (a classifier's last layer, or a
            whole segmenter).
        uri: .safetensors, or what torch.save made of a state dict (read without
            executing anything).

    Returns:
        Names of the other tensors in the file, for which the encoder has no use.

    Raises:
        ConfigError: There is no such file, or it does not hold those weights.
    """
    state = _read_state(uri)
    wanted = encoder.state_dict()
    needed = {key for key in wanted if not key.endswith("num_batches_tracked")}
    best: dict[str, torch.Tensor] = {}
    unused: list[str] = []
    for prefix in _PREFIXES:
        for own in ("", "model.", "features."):
            found = {
                own + key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix)
            }
            fitting = {
                key: value
                for key, value in found.items()
                if key in wanted and value.shape == wanted[key].shape
            }
            if len(needed & fitting.keys()) > len(needed & best.keys()):
                best, unused = fitting, sorted(found.keys() - wanted.keys())
    missing = sorted(needed - best.keys())
    if missing:
        raise ConfigError(
            f"{uri}: expected the weights of the encoder, {len(needed)} tensors; found "
            f"{len(needed) - len(missing)} of them, not {missing[0]} of shape "
            f"{tuple(wanted[missing[0]].shape)}; the file is of another encoder"
        )
    encoder.load_state_dict({**wanted, **best})
    return unused


def _read_state(uri: str) -> dict[str, torch.Tensor]:
    try:
        data = files.read_bytes(files.absolute(uri))
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(data)
        state: Any = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except FileNotFoundError as error:
        raise ConfigError(f"weights: {uri}: there is no such file") from error
    except (safetensors.SafetensorError, pickle.UnpicklingError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"{uri}: expected safetensors, or a state dict by torch.save, "
            f"found {problem}"
        ) from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise ConfigError(f"{uri}: expected a state dict, found {type(state).__name__}")
    return state


def where_from(architecture: Architecture, weights: str) -> str:
    """Return the name of the file with weights that could not be downloaded."""
    name = architecture.encoder
    if architecture.name == "fcn8s":
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        return f"vgg16-397923af.pth of torchvision (looked for in {folder})"
    if name.startswith("tu-"):
        hub = timm.get_pretrained_cfg(name.removeprefix("tu-"), allow_unregistered=True)
        source = getattr(hub, "hf_hub_id", None) or name
        return f"model.safetensors of {source} on the Hugging Face hub"
    known = smp.encoders.encoders.get(name, {}).get("pretrained_settings", {})
    source = known.get(weights, {}).get("repo_id", name)
    return f"model.safetensors of {source} on the Hugging Face hub"
