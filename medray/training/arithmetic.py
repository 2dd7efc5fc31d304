"""How networks are computed in training: device, precision and memory layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Arithmetic:
    """The device on which networks are computed, and the precision.

    Attributes:
        device: Of networks and inputs.
        dtype: float32, or the lower precision that autocast takes.
        channels_last: Layout of networks and inputs.
    """

    device: torch.device
    dtype: torch.dtype
    channels_last: bool

    def place(self, network: nn.Module) -> nn.Module:
        """Bring a network to the device and the layout."""
        network = network.to(self.device)
        if self.channels_last:
            network = network.to(memory_format=torch.channels_last)
        return network

    def forward(
        self, network: nn.Module, inputs: torch.Tensor, *beside: torch.Tensor
    ) -> torch.Tensor:
        """Return float32 logits (N, C, H, W), of a classifier (N, C, 1, 1)."""
        if not self.channels_last:
            inputs = inputs.contiguous()
        low = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, enabled=low):
            logits: torch.Tensor = network(inputs, *beside)
        if logits.ndim == 2:  # of a classifier: for the whole crop
            logits = logits[:, :, None, None]
        return logits.float()
