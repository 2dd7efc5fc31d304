"""Distributed batch processing of pathology slides on Ray.

The functions below are imported when they are first used, so that a worker that reads
slides never imports torch, and geometry can be had without Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medray.apps.check_slides import check
    from medray.datasets.ingest_slides import ingest
    from medray.evaluation.evaluate_run import evaluate
    from medray.inference.infer_run import infer
    from medray.slides import open_slide
    from medray.storage.ome_zarr import open_mask
    from medray.training.train_model import train
    from medray.training.tune_model import tune

__all__ = [
    "check",
    "evaluate",
    "infer",
    "ingest",
    "open_mask",
    "open_slide",
    "train",
    "tune",
]

_HOME = {
    "check": "medray.apps.check_slides",
    "evaluate": "medray.evaluation.evaluate_run",
    "infer": "medray.inference.infer_run",
    "ingest": "medray.datasets.ingest_slides",
    "open_mask": "medray.storage.ome_zarr",
    "open_slide": "medray.slides",
    "train": "medray.training.train_model",
    "tune": "medray.training.tune_model",
}


def __getattr__(name: str) -> Any:
    """Import a function when it is first used (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
