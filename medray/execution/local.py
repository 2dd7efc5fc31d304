"""A stage in this process, one thing after the other: for debugging and notebooks.

The same files as on a cluster, byte for byte. A decoder that ends or hangs its process
ends or hangs this one: whoever has strangers' files takes Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from medray.execution.commit import Commit
from medray.execution.progress import Progress
from medray.execution.signals import stopping
from medray.execution.stage import (
    Stage,
    do_region,
    finish_slide,
    not_finite,
    plan_slide,
    read_region,
    write_region,
)
from medray.slides import fetch, fetch_if_copied
from medray.types import Layers, Row


def run_here(
    stage: Stage,
    todo: list[Row],
    commit: Commit,
    progress: Progress,
    check: Callable[[], None],
) -> None:
    """Run a stage over slides; see `medray.execution.scheduler.run_on_ray`."""
    predictor: Any = None

    def do(region: Row) -> Row:
        nonlocal predictor
        if stage.device is None:
            return do_region(stage, region)
        row, pixels = read_region(stage, region)
        layers: Layers = {}
        if pixels is not None:
            if predictor is None:
                predictor = stage.device.load(os.cpu_count() or 1)
            source = stage.device.source(row, pixels)
            (result,) = predictor.predict(iter([source]))
            if not result.finite:
                row = row | not_finite(row)
            layers = stage.device.layers(result)
        return row if "error" in row else write_region(stage, row, layers)

    def note(row: Row) -> None:
        header = commit.take(row, progress)
        if header is not None:
            header = header | {"records": commit.records(header)}
            commit.finished(header, finish_slide(stage, header), progress)

    with stopping() as asked:

        def go_on() -> None:
            check()
            if asked.signal:
                raise commit.stopped(asked.signal)

        for row in todo:
            go_on()
            _wait(fetch_if_copied(row["uri"], row.get("scene"), row.get("plane")))
            header, regions = plan_slide(stage, row)
            if not regions:
                note(header)
            for region in regions:
                go_on()
                if row["slide"] in commit.lost:
                    note(header | region | {"error": commit.lost[row["slide"]]})
                    continue
                _wait(fetch(row["uri"]) if header.get("copied") else ())
                note(do(header | region))


def _wait(steps: Iterable[Any]) -> None:
    for _ in steps:
        pass
