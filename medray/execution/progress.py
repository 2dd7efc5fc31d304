"""Progress of a stage: a live bar on a terminal, one line per slide in a log."""

from __future__ import annotations

import logging
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)


class Progress:
    """Counts slides, regions and failures; shown on stderr."""

    def __init__(self, stage: str, slides: int) -> None:
        self._stage = stage
        self._failed = self._regions = 0
        self._megapixels, self._since = 0.0, time.monotonic()
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task(stage, total=slides, note="starting")

    def __enter__(self) -> Progress:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar."""
        self._bar.stop()

    def region(self, pixels: int) -> None:
        """Count a region of so many pixels."""
        if not self._regions:
            self._since = time.monotonic()
        self._regions += 1
        self._megapixels += pixels / 1e6
        self._refresh(0)

    def slide(self, slide: str, outcome: str) -> None:
        """Count a slide and log its outcome."""
        failed = outcome.startswith("failed")
        self._failed += failed
        level = logging.WARNING if failed else logging.INFO
        log.log(level, "stage=%s slide=%s %s", self._stage, slide, outcome)
        self._refresh(1)

    def _refresh(self, advance: int) -> None:
        # Since the first region: before it the workers start.
        elapsed = max(1e-3, time.monotonic() - self._since)
        share = max(0, 1 - 1 / max(1, self._regions)) / elapsed
        notes = [f"{self._failed} failed"] if self._failed else []
        if self._regions:
            rate = f"{self._regions * share:.2g}/s"
            speed = f"{self._megapixels * share:.3g} MPix/s"
            notes = [f"{self._regions} regions", rate, speed, *notes]
        self._bar.update(self._task, advance=advance, note=", ".join(notes))
