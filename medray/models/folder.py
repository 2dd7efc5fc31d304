"""The model folder: what training hands to inference.

It holds model.yaml (what it is and how it must be fed: `ModelConfig`),
weights.safetensors, metrics.json (how good it was on validation data) and README.md
(the model card). One that `medray export` made has the exported network in place of the
weights, and export.json.
"""

from __future__ import annotations

from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from medray.errors import FormatError
from medray.models.card import model_card
from medray.models.config import (
    WEIGHTS,
    Architecture,
    ModelConfig,
    digest_of,
    is_exported,
    read_config,
)
from medray.models.prune import fit
from medray.storage import files, write_settings


def save_model(
    folder: str, config: ModelConfig, model: nn.Module, metrics: dict[str, Any]
) -> None:
    """Write a model folder; `model.yaml` comes last, so a folder with it is whole."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    weights = safetensors.torch.save(state, {"format": "pt"})
    files.write_bytes(files.join(folder, WEIGHTS), weights)
    files.write_json(files.join(folder, "metrics.json"), metrics)
    digest = digest_of(config, files.join(folder, WEIGHTS))
    card = model_card(config, metrics, digest)
    files.write_bytes(files.join(folder, "README.md"), card.encode())
    write_settings(files.join(folder, "model.yaml"), config)


def _build(architecture: Architecture, classes: int) -> nn.Module:
    # Imported here: each brings libraries that take seconds to load.
    if architecture.name == "classifier":
        from medray.models.classifiers import build_classifier

        return build_classifier(architecture, classes)
    from medray.models.segmenters import build_segmenter

    return build_segmenter(architecture, classes)


def load_model(folder: str) -> tuple[nn.Module, ModelConfig]:
    """Load a model for inference, in evaluation mode on the CPU.

    Raises:
        ConfigError: The folder is no model folder.
        FormatError: The weights are not safetensors or do not fit the architecture;
            the exported network is damaged or does not fit the configuration.
    """
    config = read_config(folder)
    if is_exported(folder):
        from medray.models.exported import load_exported

        return load_exported(folder, config), config
    model = _build(config.architecture, len(config.classes))
    uri = files.join(folder, WEIGHTS)
    try:
        state = safetensors.torch.load(files.read_bytes(uri))
        fit(model, state)
        model.load_state_dict(state)
    except (FileNotFoundError, safetensors.SafetensorError, RuntimeError) as error:
        problem = " ".join(str(error).split())[:300]
        raise FormatError(
            f"{uri}: expected the weights of {config.architecture.name} with encoder "
            f"{config.architecture.encoder} and {len(config.classes)} classes, "
            f"found {problem}"
        ) from error
    return model.eval(), config
