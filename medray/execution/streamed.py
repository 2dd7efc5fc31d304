"""A stage without a device: slides stream through processes, of Ray Data or of our own.

A row of the stream is a slide to plan, a region to do, or a slide to finish. A slide of
one region is planned, done and finished as one row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from medray.execution.commit import Commit
from medray.execution.lost import finish_of, outcome_of, plan_of
from medray.execution.signals import GRACE_S, stopping
from medray.execution.stage import (
    AnyPlan,
    AnyRegion,
    AnyStage,
    Outcome,
    do_region,
    finish_slide,
    plan_slide,
)
from medray.execution.tasks import (
    FinishTask,
    Plan,
    RegionTask,
    SlideTask,
)
from medray.slides import fetch, fetch_if_copied

type AnyTask = SlideTask | AnyRegion | FinishTask[Any, Any]


@dataclass(frozen=True)
class _Planned:
    """The result of planning a slide.

    Attributes:
        plan: Of it.
        outcome: Of its only region, which was done at once; None: it has more, or none.
    """

    plan: AnyPlan
    outcome: Outcome | None = None


class RowStream(Protocol):
    """The interface of `medray.execution.stream.Stream` and `Processes`."""

    @property
    def busy(self) -> bool:
        """Whether rows are under way."""

    @property
    def places(self) -> int:
        """How many processes there can be now."""

    @property
    def room(self) -> int:
        """How many more rows keep the processes busy."""

    def give(self, rows: list[Any]) -> None:
        """Queue rows."""

    def stop(self) -> None:
        """Begin no other row."""

    def take(self, seconds: float = 1.0) -> list[tuple[Any, Any]]:
        """Return rows with their results."""


def timeout_of(stage: AnyStage, task: AnyTask) -> float:
    """Return a task's timeout in seconds; of finishing, the sum over its regions."""
    regions = len(task.records) if isinstance(task, FinishTask) else 1
    return stage.timeout * max(1, regions)


def stream_slides(
    start: Callable[[], AbstractContextManager[RowStream]],
    todo: list[SlideTask],
    commit: Commit,
    check: Callable[[], None],
    note: Callable[[int], None] = lambda _: None,
) -> None:
    """Run a stage over slides through a stream of `do_task`.

    Args:
        start: Starts where its rows are done.
        todo: The slides.
        commit: Records the result of each task.
        check: Raises if it may not go on.
        note: Is called again and again with how many regions wait.

    Raises:
        StoppedError: SIGTERM or Ctrl-C.
        MedrayError: Storage fails, or the processes die, whichever tasks they get.
    """
    with stopping() as asked, start() as stream:
        slides, regions = deque(todo), deque[AnyRegion]()
        planning = 0  # slides
        regions_each = 2.0  # that are left to do of a slide, once it is planned
        while slides or regions or stream.busy:
            check()
            if asked.signal:
                stream.stop()
                deadline = time.monotonic() + GRACE_S
                while stream.busy and time.monotonic() < deadline:
                    _take(stream, commit)
                commit.ledger.flush()  # before the processes are ended
                raise commit.stopped(asked.signal)
            room, given = stream.room, list[AnyTask]()
            while regions and room > len(given):
                task = regions.popleft()
                if failure := commit.quarantined.get(task.slide.slide):
                    _finish(stream, commit.region(task, failure))
                else:
                    given.append(task)
            # Planned ahead, but not all: gigapixel slides have many regions.
            most = room if regions_each <= 1 else 2 * stream.places - planning
            while slides and room > len(given) and most > 0:
                given.append(slides.popleft())
                planning, most = planning + 1, most - 1
            stream.give(given)
            planned, found = _take(stream, commit)
            regions.extend(found)
            planning -= planned
            if planned:
                regions_each = max(len(found) / planned, regions_each / 2)
            note(len(regions))


def _take(stream: RowStream, commit: Commit) -> tuple[int, list[AnyRegion]]:
    """Commit results of tasks; return how many slides were planned, and regions."""
    found: list[AnyRegion] = []
    planned_slides = 0
    for task, result in stream.take():
        match task:
            case SlideTask():
                planned = _planned_of(task, result)
                planned_slides += 1
                _finish(stream, commit.plan(task, planned.plan))
                if isinstance(planned.plan, Plan):
                    if planned.outcome is None:
                        found += planned.plan.todo
                    else:
                        (region,) = planned.plan.todo
                        _finish(stream, commit.region(region, planned.outcome))
            case RegionTask():
                _finish(stream, commit.region(task, outcome_of(task, result)))
            case FinishTask():
                commit.finished(task, finish_of(result))
    return planned_slides, found


def _finish(stream: RowStream, task: FinishTask[Any, Any] | None) -> None:
    if task is not None:
        stream.give([task])


def do_task(stage: AnyStage, task: AnyTask) -> Generator[None, None, Any]:
    """Do a task; yield while a copy of its file is fetched, and between its steps."""
    match task:
        case SlideTask():
            file = task.input.file
            for _ in fetch_if_copied(file.uri, file.scene, file.plane):
                yield
            plan = plan_slide(stage, task)
            if (
                stage.device is None
                and isinstance(plan, Plan)
                and plan.slide.regions == len(plan.todo) == 1
            ):
                yield
                return _Planned(plan, do_region(stage, plan.todo[0]))
            return _Planned(plan)
        case RegionTask():
            for _ in fetch(task.slide.uri) if task.slide.copied else ():
                yield
            return do_region(stage, task)
        case FinishTask():
            for _ in fetch(task.slide.uri) if task.slide.copied else ():
                yield
            return finish_slide(stage, task)


def slide_of(task: AnyTask) -> str:
    """Return the id of a task's slide."""
    return task.input.slide if isinstance(task, SlideTask) else task.slide.slide


def _planned_of(task: SlideTask, result: Any) -> _Planned:
    if isinstance(result, Exception):
        return _Planned(plan_of(task, result, "opening or reading"))
    planned: _Planned = result
    return planned
