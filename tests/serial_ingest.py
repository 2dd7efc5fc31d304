"""Ingest in one process and one loop, without a cluster."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from medray.datasets.dataset import open_dataset
from medray.datasets.ingest_request import settle_ingest
from medray.datasets.ingest_slides import ingest_settled
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
    request = settle_ingest(
        [str(slides)],
        out=str(out),
        annotations=str(annotations) if annotations else None,
        classes=classes,
        mpp=mpp,
        scene=scene,
        plane=plane,
        fractions=(1.0, 0.0, 0.0),
    )
    request = replace(request, settings=replace(request.settings, **settings))
    open_dataset(request.out, request.settings)
    ingest_settled(request, "local", lambda: None)
    table = files.read_table(f"{out}/slides.parquet").to_pylist()
    return {row["slide"]: row for row in table}
