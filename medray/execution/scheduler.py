"""Schedule slides and their regions onto workers until each is committed or failed."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import ray

from medray.execution import cluster
from medray.execution.actor_pool import Pool, poll
from medray.execution.backlog import Backlog
from medray.execution.commit import Commit
from medray.execution.gauges import Gauges
from medray.execution.gpu_worker import start_gpu_workers
from medray.execution.lost import finish_of, outcome_of, plan_of
from medray.execution.signals import GRACE_S, stopping
from medray.execution.stage import (
    AnyRegion,
    AnyStage,
    finish_slide,
    plan_slide,
)
from medray.execution.stream import CORE, Stream
from medray.execution.streamed import do_task, slide_of, stream_slides, timeout_of
from medray.execution.tasks import (
    FinishTask,
    Plan,
    SlideTask,
)
from medray.slides import bound_memory, fetch, fetch_if_copied


class SlideWorker:
    """An actor for the work on whole slides: plans them first, finishes them last."""

    def __init__(self, stage: AnyStage) -> None:
        """Keep the stage, and bound this process' memory."""
        bound_memory()
        self._stage = stage

    def work(self, tasks: list[SlideTask | FinishTask[Any, Any]]) -> Iterator[Any]:
        """Yield the plan of each slide to plan, the result of finishing the others."""
        for task in tasks:
            if isinstance(task, SlideTask):
                file = task.input.file
                for _ in fetch_if_copied(file.uri, file.scene, file.plane):
                    yield []
                yield [plan_slide(self._stage, task)]
            else:
                for _ in fetch(task.slide.uri) if task.slide.copied else ():
                    yield []
                yield [finish_slide(self._stage, task)]


def _start_slide_workers(stage: AnyStage, slides: int) -> Pool:
    """Start the slide workers: one for every four cores, none without a slide.

    Where nodes come on request there may be no core yet: they may grow to one for each
    GPU worker.
    """
    start = functools.partial(
        ray.remote(SlideWorker).options(num_cpus=0.25).remote, stage
    )
    cpus = int(ray.cluster_resources().get("CPU", 1))

    def allowed(task: SlideTask | FinishTask[Any, Any]) -> float:
        # What is finished takes longer the more regions it has.
        regions = len(task.records) if isinstance(task, FinishTask) else 1
        return stage.timeout * max(1, regions)

    slide_workers = max(1, min(cpus // 4, slides))
    most = min(cluster.gpu_workers(), slides)
    return Pool(start, "work", slide_workers, most=most, timeout=allowed)


def run_on_ray(
    stage: AnyStage, todo: list[SlideTask], commit: Commit, check: Callable[[], None]
) -> None:
    """Run a stage over slides on the Ray cluster that this process is connected to.

    Without a device it runs on Ray Data, with one on GPU workers.

    Args:
        stage: What is done.
        todo: The slides.
        commit: Records the result of each task.
        check: Raises if it may not go on.

    Raises:
        StoppedError: SIGTERM or Ctrl-C.
        MedrayError: Storage fails, or the processes die, whichever tasks they get.
    """
    if stage.device is None:
        _stream_on_ray(stage, todo, commit, check)
        return
    batch = 16 if cluster.gpus() else 8
    with (
        _start_slide_workers(stage, len(todo)) as slide_workers,
        start_gpu_workers(stage, len(todo)) as gpu_workers,
    ):
        schedule(todo, slide_workers, gpu_workers, commit, batch, check)


def _stream_on_ray(
    stage: AnyStage, todo: list[SlideTask], commit: Commit, check: Callable[[], None]
) -> None:
    gauges = Gauges()
    start = functools.partial(
        Stream,
        functools.partial(do_task, stage),
        num_cpus=CORE,
        timeout=functools.partial(timeout_of, stage),
        bounded=True,
        expected=len(todo),
        group=slide_of,
    )
    note = functools.partial(gauges.update, commit)
    stream_slides(start, todo, commit, check, note)


def schedule(
    todo: list[SlideTask],
    slide_workers: Pool,
    gpu_workers: Pool,
    commit: Commit,
    batch: int,
    check: Callable[[], None],
) -> None:
    """Keep all processes busy until every slide is done or has failed.

    Args:
        todo: The slides.
        slide_workers: Plan and finish slides.
        gpu_workers: Do regions.
        commit: Records the result of each task.
        batch: How many regions a worker is given at once.
        check: Raises if it may not go on.

    Raises:
        StoppedError: SIGTERM or Ctrl-C.
        MedrayError: Storage fails, or the processes die, whichever tasks they get.
    """
    share = max(1, min(batch, len(todo) // (2 * slide_workers.size)))
    slides = deque(todo[first : first + share] for first in range(0, len(todo), share))
    planned: deque[AnyRegion] = deque()
    planning = 0
    backlog = Backlog(len(todo))
    gauges = Gauges()

    def finish(task: FinishTask[Any, Any] | None) -> None:
        if task is not None:
            slide_workers.give([task])

    def take() -> None:
        nonlocal planning
        for pool, task, result in poll(slide_workers, gpu_workers):
            if pool is gpu_workers:
                backlog.done += 1
                finish(commit.region(task, outcome_of(task, result)))
            elif isinstance(task, FinishTask):
                commit.finished(task, finish_of(result))
            else:
                planning -= 1
                plan = plan_of(task, result)
                found = plan.todo if isinstance(plan, Plan) else ()
                backlog.slides -= 1
                backlog.planned += 1
                backlog.found += len(found)
                planned.extend(found)
                finish(commit.plan(task, plan))
        gauges.update(commit, backlog.waiting(len(planned)))

    with stopping() as asked:
        while slides or planned or slide_workers.busy or gpu_workers.busy:
            if asked.signal:
                deadline = time.monotonic() + GRACE_S
                while (
                    slide_workers.busy or gpu_workers.busy
                ) and time.monotonic() < deadline:
                    take()
                raise commit.stopped(asked.signal)
            check()
            # Ahead of the region workers, but not all: gigapixel slides have many
            # regions.
            most = 2 * batch * gpu_workers.size
            while slides and slide_workers.room > 0 and len(planned) < most:
                planning += len(slides[0])
                slide_workers.give(slides.popleft())
            if slides and slide_workers.room <= 0 and not planned:
                slide_workers.grow()
            if backlog.asks_for_more(len(planned), gpu_workers):
                gpu_workers.grow()
            # Full batches; but a worker with nothing to do gets what there is.
            enough = batch if planning and gpu_workers.busy else 1
            while len(planned) >= enough and gpu_workers.room > 0:
                tasks = [planned.popleft() for _ in range(min(batch, len(planned)))]
                good = []
                for task in tasks:  # no more processes for a slide that ends them
                    if failure := commit.quarantined.get(task.slide.slide):
                        finish(commit.region(task, failure))
                    else:
                        good.append(task)
                if good:
                    gpu_workers.give(good)
            if slide_workers.awaited or gpu_workers.awaited:
                take()
    gauges.update(commit, 0)
