"""Distributed batch processing of pathology slides on Ray.

The functions below are imported when they are first used, so that a worker that reads
slides never imports torch, and geometry can be had without Ray.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from medray.apps import check as check
    from medray.datasets import ingest as ingest
    from medray.evaluation import evaluate as evaluate
    from medray.inference import infer as infer
    from medray.slides import open_slide as open_slide
    from medray.storage import open_mask as open_mask
    from medray.training import train as train
    from medray.training import tune as tune

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "apps": ["check"],
        "datasets": ["ingest"],
        "evaluation": ["evaluate"],
        "inference": ["infer"],
        "slides": ["open_slide"],
        "storage": ["open_mask"],
        "training": ["train", "tune"],
    },
)
