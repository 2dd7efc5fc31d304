"""Distributed batch processing of pathology slides on Ray.

The functions below are imported when they are first used, so that a worker that reads
slides never imports torch, and geometry can be had without Ray.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medray.check import check
    from medray.evaluate import evaluate
    from medray.infer import infer
    from medray.ingest import ingest
    from medray.slides import open_slide
    from medray.store.omezarr import open_mask
    from medray.train import train
    from medray.tune import tune

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
    "check": "medray.check",
    "evaluate": "medray.evaluate",
    "infer": "medray.infer",
    "ingest": "medray.ingest",
    "open_mask": "medray.store.omezarr",
    "open_slide": "medray.slides",
    "train": "medray.train",
    "tune": "medray.tune",
}


def _function(name: str) -> property:
    """Give a function of its module, whoever has imported that.

    Where a module of a package is imported, Python makes it an attribute of the package
    by its name; `medray.infer` would then be a function once and a module ever after.
    """

    def get(_: object) -> Any:
        return getattr(importlib.import_module(_HOME[name]), name)

    def keep(_: object, module: Any) -> None:
        """Leave the function where Python puts the module."""

    return property(get, keep)


class _Package(types.ModuleType):
    """This package, with functions that are looked up when they are used."""


for _name in _HOME:
    setattr(_Package, _name, _function(_name))
sys.modules[__name__].__class__ = _Package
