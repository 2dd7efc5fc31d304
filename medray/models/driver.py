"""Whether this machine may have a GPU, without torch, whose import takes seconds."""

from __future__ import annotations

from pathlib import Path

# NVIDIA's driver, that of Windows under its Linux, AMD's.
_DRIVERS = ("/proc/driver/nvidia", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")


def has_gpu_driver() -> bool:
    """Return whether a GPU's driver is here; without one torch can use no GPU."""
    return any(Path(device).exists() for device in _DRIVERS)
