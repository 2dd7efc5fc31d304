"""Distributed batch processing of pathology slides on Ray.

The functions below are imported when they are first used, so that a worker that reads
slides never imports torch, and geometry can be had without Ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medray.evaluate import evaluate
    from medray.infer import infer
    from medray.ingest import ingest
    from medray.slides import open_slide
    from medray.store.omezarr import open_mask
    from medray.train import train
    from medray.tune import tune

__all__ = ["evaluate", "infer", "ingest", "open_mask", "open_slide", "train", "tune"]

_HOME = {
    "evaluate": "medray.evaluate",
    "infer": "medray.infer",
    "ingest": "medray.ingest",
    "open_mask": "medray.store.omezarr",
    "open_slide": "medray.slides",
    "train": "medray.train",
    "tune": "medray.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'medray' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
