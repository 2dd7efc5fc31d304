"""What a stage would do, before it is started: slides planned, some regions tried.

By the stage's own functions, in processes that may die of a file, without Ray. Nothing
is written into the stage's folder.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from medray.errors import LostError, StoreError
from medray.execution.commit import changed_slides
from medray.execution.isolation import call_each
from medray.execution.lost import outcome_of, plan_of
from medray.execution.progress import Progress
from medray.execution.stage import (
    AnyPlan,
    AnyRegion,
    AnyStage,
    Outcome,
    do_region,
    finish_slide,
    make_nothing,
    missing_regions,
    plan_slide,
)
from medray.execution.tasks import (
    Failure,
    FinishTask,
    NotPlanned,
    Plan,
    PlannedSlide,
    SlideTask,
    Stored,
)
from medray.geometry import Rectangle
from medray.slides import SlideFile, fetch, fetch_if_copied
from medray.storage import Ledger, files

# Each may take the memory that decoding one file needs, see medray.slides.limits.
_MAX_PROCESSES = 8

type See = Callable[[PlannedSlide[Any], Sequence[Rectangle]], Any]
"""What is to be known of a planned slide and all its regions."""


@dataclass(frozen=True)
class RehearsedSlide:
    """A slide that a stage would have to look at.

    Attributes:
        slide: Its id.
        status: Whether it would be done, is what it was when it was finished though
            somebody touched it, or would fail.
        changed: Whether it was finished before.
        digest: Of its content.
        facts: Of the stage; None unless it would be done.
        todo: The regions that are yet to be done.
        seen: What `see` gave.
        why: It would fail.
        seconds: That planning it took.
    """

    slide: str
    status: Literal["todo", "unchanged", "failed"]
    changed: bool
    digest: str = ""
    facts: Any = None
    todo: tuple[AnyRegion, ...] = ()
    seen: Any = None
    why: str = ""
    seconds: float = 0.0


def rehearse_slides(
    stage: AnyStage,
    slides: Sequence[SlideFile],
    ledger: Ledger,
    annotations: Mapping[str, str],
    see: See,
) -> list[RehearsedSlide]:
    """Plan the slides that a stage would do, in the order of the request.

    Args:
        stage: What would be done.
        slides: Of the request.
        ledger: Of the stage's folder; changed in memory, and not to be used any more.
        annotations: Address of the annotation of each slide that has one.
        see: Of a module, to be called where the slide is planned.

    Raises:
        ConfigError: As `run_stage`.
    """
    asked = [
        _Ask(replace(stage, create=make_nothing), task, see)
        for task in changed_slides(slides, ledger, annotations)
    ]
    found: dict[str, RehearsedSlide] = {}
    with Progress(f"{stage.name} --dry-run", len(asked)) as progress:
        for ask, result in call_each(
            _plan, asked, processes=_processes(len(asked)), limit_s=stage.timeout
        ):
            task = ask.task
            if isinstance(result, LostError):
                lost = plan_of(task, result, "opening or reading")
                result = _rehearsed(task, lost, (), None, 0.0)
            found[task.input.slide] = result
            progress.slide(task.input.slide, f"{result.status} {result.why}".strip())
    return [found[ask.task.input.slide] for ask in asked]


@dataclass(frozen=True)
class Trial:
    """What some regions of one slide took.

    Attributes:
        slide: Its id.
        pixels: Of the regions.
        seconds: On one core.
        stored_bytes: What they are when stored.
        why: It could not be done.
    """

    slide: str
    pixels: int = 0
    seconds: float = 0.0
    stored_bytes: int = 0
    why: str = ""


def try_regions(
    stage_of: Callable[[str], AnyStage],
    slides: Sequence[RehearsedSlide],
    *,
    regions: int,
    seed: int,
) -> list[Trial]:
    """Do some regions of slides, one after the other, and finish these slides.

    Into a folder for temporary files, that is removed.

    Args:
        stage_of: Returns the stage that planned them, into another folder.
        slides: With something to do.
        regions: Of each slide at most, chosen by chance.
        seed: Decides which.

    Raises:
        StoreError: The folder cannot be written.
    """
    trials = []
    with tempfile.TemporaryDirectory(prefix="medray-") as folder:
        asked = []
        for number, one in enumerate(slides):
            count = min(regions, len(one.todo))
            todo = random.Random(seed).sample(one.todo, count)
            asked.append(_Try(stage_of(f"{folder}/{number}"), todo))
        limit_s = asked[0].stage.timeout * (regions + 1) if asked else 0.0
        for ask, result in call_each(_try, asked, processes=1, limit_s=limit_s):
            if isinstance(result, LostError):
                lost = outcome_of(ask.todo[0], result)
                assert isinstance(lost, Failure)
                result = Trial(ask.todo[0].slide.slide, why=lost.why)
            if isinstance(result, Failure):
                raise StoreError(result.why)
            trials.append(result)
    return trials


# --- in the processes -----------------------------------------------------------------


@dataclass(frozen=True)
class _Ask:
    """A slide to plan."""

    stage: AnyStage
    task: SlideTask
    see: See


@dataclass(frozen=True)
class _Try:
    """Regions of a slide to do."""

    stage: AnyStage
    todo: Sequence[AnyRegion]


def _plan(ask: _Ask) -> Generator[None, None, RehearsedSlide]:
    task, file = ask.task, ask.task.input.file
    yield from fetch_if_copied(file.uri, file.scene, file.plane)
    start = time.perf_counter()
    # As if nothing were committed: then all regions are in the plan.
    plan = plan_slide(ask.stage, replace(task, committed="", shards={}))
    if not isinstance(plan, Plan):
        return _rehearsed(task, plan, (), None, time.perf_counter() - start)
    regions = [region.planned for region in plan.todo]
    missing = missing_regions(task, plan.slide.digest, regions, ask.stage.out)
    indices = {region.index for region in missing}
    todo = tuple(region for region in plan.todo if region.index in indices)
    seen = ask.see(plan.slide, [region.region for region in regions])
    return _rehearsed(task, plan, todo, seen, time.perf_counter() - start)


def _rehearsed(
    task: SlideTask,
    plan: AnyPlan,
    todo: tuple[AnyRegion, ...],
    seen: Any,
    seconds: float,
) -> RehearsedSlide:
    slide, changed = task.input.slide, bool(task.done)
    match plan:
        case Plan():
            facts = plan.slide.facts
            return RehearsedSlide(
                slide,
                "todo",
                changed,
                digest=plan.slide.digest,
                facts=facts,
                todo=todo,
                seen=seen,
                seconds=seconds,
            )
        case NotPlanned():
            why = plan.failure.why
            return RehearsedSlide(slide, "failed", changed, plan.digest, why=why)
        case _:
            return RehearsedSlide(slide, "unchanged", changed, task.done)


def _try(ask: _Try) -> Generator[None, None, Trial | Failure]:
    stage, (first, *_) = ask.stage, ask.todo
    name = first.slide.slide
    yield from fetch(first.slide.uri) if first.slide.copied else ()
    start, pixels, records = time.perf_counter(), 0, {}
    stage.create(first.slide)
    for region in ask.todo:
        outcome: Outcome = do_region(stage, region)
        if not isinstance(outcome, Stored):
            failed = outcome.store == "out"
            return outcome if failed else Trial(name, why=outcome.why)
        records[region.index] = outcome.record
        pixels += region.region.height * region.region.width
    if first.slide.regions > 1:  # the only region of a slide has finished it
        finish_slide(stage, FinishTask(first.slide, records))
    seconds = time.perf_counter() - start
    return Trial(name, pixels, seconds, sum(files.list_files(stage.out).values()))


def _processes(tasks: int) -> int:
    return max(1, min(tasks, os.cpu_count() or 1, _MAX_PROCESSES))
