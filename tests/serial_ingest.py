"""Ingest in one process and one loop, without a cluster."""

import functools
from pathlib import Path
from typing import Any

from medray.annotations.matching import match_annotations
from medray.classes import Classes
from medray.datasets.dataset import DatasetSettings, open_dataset
from medray.datasets.ingest import (
    _assign_splits,
    _cut,
    _finish,
    _plan,
    _slide_row,
    _write_patches,
)
from medray.datasets.overrides import with_overrides
from medray.errors import MedrayError
from medray.execution.commit import Commit, changed_slides
from medray.execution.progress import Progress
from medray.slides.discovery import find_slides
from medray.storage import files
from medray.storage.ledger import Ledger

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
    ledger = Ledger(str(out), keep_finished=True)
    wanted = with_overrides(
        find_slides([str(slides)]), mpp=mpp, scene=scene, plane=plane
    )
    matched = match_annotations(wanted, str(annotations) if annotations else None)
    commit = Commit(ledger, _slide_row)
    progress = Progress("serial", len(wanted))

    def note(row: Row) -> None:
        header = commit.take(row, progress)
        if header is None:
            return
        result: Row | Exception
        try:
            result = _finish(header | {"records": commit.records(header)}, str(out))
        except MedrayError as error:
            result = error
        commit.finished(header, result, progress)

    for row in changed_slides(wanted, ledger, matched):
        header, regions = _plan(row, how, str(out))
        if not regions:
            note(header)
        for region in regions:
            todo = header | region
            note(todo | _cut(todo, how, str(out)))
    commit.close(progress)
    split = functools.partial(_assign_splits, group_of={}, split_of=None)
    split(ledger, fractions=(1.0, 0.0, 0.0), seed=0)
    _write_patches(str(out), ledger)
    ledger.close()
    table = files.read_table(f"{out}/slides.parquet").to_pylist()
    return {row["slide"]: row for row in table}
