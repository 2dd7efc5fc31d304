"""The Prometheus metrics of a stage."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from medray.execution.commit import Commit


class Gauges:
    """The Prometheus metrics of a run; Ray adds `ray_` to the names."""

    def __init__(self) -> None:
        self.slides = Counter("medray_slides_done_total", "Slides finished.")
        self.failures = Counter("medray_slides_failed_total", "Slides that failed.")
        self.regions = Counter("medray_regions_done_total", "Regions committed.")
        self.waiting = Gauge(
            "medray_regions_waiting", "Regions that wait for a process."
        )
        self.before = (0, 0, 0)

    def update(self, commit: Commit, waiting: float) -> None:
        """Add what was committed since the last call; set how many regions wait."""
        self.waiting.set(waiting)
        now = (commit.done, len(commit.failed), commit.regions)
        counters = (self.slides, self.failures, self.regions)
        for counter, value, before in zip(counters, now, self.before, strict=True):
            if value > before:
                counter.inc(value - before)
        self.before = now
