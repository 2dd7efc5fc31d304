"""A stage on this machine, without Ray, with the same files as on a cluster.

`run_in_processes` is for little work: what Ray promises of slides that end or hang
their decoder holds there, too. `run_here` is for debugging and notebooks: one thing
after the other in this process, which such a slide ends.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from medray.execution.commit import Commit
from medray.execution.predicting import PredictingStream
from medray.execution.processes import Processes
from medray.execution.signals import stopping
from medray.execution.stage import (
    AnyRegion,
    AnyStage,
    Outcome,
    Timing,
    do_region,
    finish_slide,
    not_finite,
    plan_slide,
    read_region,
    write_region,
)
from medray.execution.streamed import do_task, slide_of, stream_slides, timeout_of
from medray.execution.tasks import Failure, FinishTask, Plan, SlideTask
from medray.slides import fetch, fetch_if_copied


def run_in_processes(
    stage: AnyStage, todo: list[SlideTask], commit: Commit, check: Callable[[], None]
) -> None:
    """Run a stage over slides; see `medray.execution.scheduler.run_on_ray`."""
    if stage.device is not None:
        start: Callable[[], Any] = functools.partial(PredictingStream, stage)
    else:
        start = functools.partial(
            Processes,
            functools.partial(do_task, stage),
            timeout=functools.partial(timeout_of, stage),
            group=slide_of,
        )
    stream_slides(start, todo, commit, check)


def run_here(
    stage: AnyStage, todo: list[SlideTask], commit: Commit, check: Callable[[], None]
) -> None:
    """Run a stage over slides; see `medray.execution.scheduler.run_on_ray`."""
    do = _Predicting(stage).do if stage.device else _doing(stage)

    def finish(task: FinishTask[Any, Any] | None) -> None:
        if task is not None:
            commit.finished(task, finish_slide(stage, task))

    with stopping() as asked:

        def go_on() -> None:
            check()
            if asked.signal:
                raise commit.stopped(asked.signal)

        for task in todo:
            go_on()
            file = task.input.file
            _wait(fetch_if_copied(file.uri, file.scene, file.plane))
            plan = plan_slide(stage, task)
            finish(commit.plan(task, plan))
            for region in plan.todo if isinstance(plan, Plan) else ():
                go_on()
                outcome: Outcome | None = commit.quarantined.get(file.slide)
                if outcome is None:
                    _wait(fetch(file.uri) if region.slide.copied else ())
                    outcome = do(region)
                finish(commit.region(region, outcome))


def _doing(stage: AnyStage) -> Callable[[AnyRegion], Outcome]:
    return lambda region: do_region(stage, region)


class _Predicting:
    """Runs regions on a device; its models are loaded when a region has pixels."""

    def __init__(self, stage: AnyStage) -> None:
        assert stage.device is not None
        self._stage, self._device = stage, stage.device
        self._predictor: Any = None

    def do(self, task: AnyRegion) -> Outcome:
        read = read_region(self._stage, task)
        if isinstance(read, Failure):
            return read
        seen, arrays = read
        if arrays is None:
            return write_region(self._stage, task, seen, {}, None)
        if self._predictor is None:
            self._predictor = self._device.load(os.cpu_count() or 1)
        start = time.perf_counter()
        source = self._device.source(task, seen, arrays)
        (result,) = self._predictor.predict(iter([source]))
        timing = Timing(0.0, time.perf_counter() - start)
        if not result.finite:
            return not_finite(task)
        layers = self._device.layers(result)
        return write_region(self._stage, task, seen, layers, timing)


def _wait(steps: Iterable[Any]) -> None:
    for _ in steps:
        pass
