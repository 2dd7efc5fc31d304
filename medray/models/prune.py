"""Structured pruning: whole channels are removed, so the network is really smaller."""

from __future__ import annotations

import torch
from torch import nn

from medray.errors import ConfigError


def thinned(network: nn.Module, share: float) -> nn.Module:
    """Remove the channels of least weight from each layer, and what depends on them.

    By torch-pruning (Fang et al. 2023, https://arxiv.org/abs/2301.12900): channels that
    depend on each other through sums and joins are removed together, those of the least
    norm of their weights first (Li et al. 2017). The outputs' number stays.

    Args:
        network: Maps (N, 3, H, W) to (N, C, H, W).
        share: Of each group of channels, 0..1.

    Raises:
        ConfigError: torch-pruning is not installed, or cannot follow the network.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise ConfigError(
            "prune: needs torch-pruning; install medray with the extra `prune`"
        ) from error
    example = torch.zeros(1, 3, 64, 64)
    network = network.eval().requires_grad_(True)
    outputs = network(example).shape[1]
    last = [
        layer
        for layer in network.modules()
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d))
        and layer.out_channels == outputs
    ]
    try:
        pruner = torch_pruning.pruner.MetaPruner(
            network,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            ignored_layers=last,
        )
        pruner.step()
        if network(example).shape[1] != outputs:
            raise ValueError("the number of classes changed")
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"prune: torch-pruning cannot follow this network ({problem}); choose "
            f"another decoder or encoder"
        ) from error
    return network


def fit(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Cut a network's layers to the channels that `state` has, before it is loaded.

    So the folder of a pruned model needs no record of how it was pruned.

    Args:
        network: As its architecture builds it.
        state: Weights of the same layers, possibly of fewer channels.
    """
    for name, layer in network.named_modules():
        weight = state.get(f"{name}.weight")
        if weight is None or not hasattr(layer, "weight"):
            continue
        if layer.weight is None or layer.weight.shape == weight.shape:
            continue
        for kind, values in (
            ("_parameters", layer._parameters),
            ("_buffers", layer._buffers),
        ):
            for key, old in values.items():
                new = state.get(f"{name}.{key}")
                if old is None or new is None or new.shape == old.shape:
                    continue
                fresh = torch.empty_like(new, dtype=old.dtype)
                getattr(layer, kind)[key] = (
                    nn.Parameter(fresh) if kind == "_parameters" else fresh
                )
        if isinstance(layer, nn.Conv2d):
            depthwise = layer.groups > 1 and weight.shape[1] == 1
            layer.out_channels = weight.shape[0]
            layer.groups = weight.shape[0] if depthwise else layer.groups
            layer.in_channels = weight.shape[1] * layer.groups
        elif isinstance(layer, nn.ConvTranspose2d):
            layer.in_channels, layer.out_channels = weight.shape[:2]
        elif isinstance(layer, nn.BatchNorm2d):
            layer.num_features = weight.shape[0]
