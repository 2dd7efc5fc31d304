"""Ingest in one process and one loop, without a cluster."""

import functools
from pathlib import Path
from typing import Any

from medray.annotations.matching import match_annotations
from medray.classes import Classes
from medray.datasets.dataset import DatasetSettings, open_dataset
from medray.datasets.ingest_slides import _assign_splits, _ingest
from medray.datasets.overrides import with_overrides
from medray.slides.discovery import find_slides
from medray.storage import files

Row = dict[str, Any]


def ingest(
    slides: Path,
    out: Path,
    annotations: Path | None = None,
    classes: tuple[str, ...] = ("background", "tumour"),
    mpp: float | str | None = None,
    scene: int | None = None,
    plane: int | None = None,
    **settings: int,
) -> dict[str, Row]:
    """Make a dataset; give the rows of slides.parquet by slide."""
    how = DatasetSettings(classes=Classes(classes), mpp=mpp, **settings)
    open_dataset(str(out), how)
    wanted = with_overrides(
        find_slides([str(slides)]), mpp=mpp, scene=scene, plane=plane
    )
    matched = match_annotations(wanted, str(annotations) if annotations else None)
    split = functools.partial(
        _assign_splits, group_of={}, split_of=None, fractions=(1.0, 0.0, 0.0), seed=0
    )
    _ingest(wanted, matched, how, str(out), split, "local", lambda: None)
    table = files.read_table(f"{out}/slides.parquet").to_pylist()
    return {row["slide"]: row for row in table}
