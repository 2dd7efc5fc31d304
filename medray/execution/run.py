"""Running a stage over slides: which to process, where, and with what result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from medray.execution.commit import Commit, Summary, changed_slides
from medray.execution.progress import Progress
from medray.execution.stage import AnyStage
from medray.slides import SlideFile, log_copies
from medray.storage import Ledger
from medray.types import Executor

log = logging.getLogger(__name__)


def run_stage(
    stage: AnyStage,
    slides: Sequence[SlideFile],
    ledger: Ledger,
    *,
    annotations: Mapping[str, str] | None = None,
    executor: Executor,
    check: Callable[[], None] = lambda: None,
    prepare: Callable[[list[SlideFile]], None] = lambda _: None,
) -> Summary:
    """Run what is missing of a stage; what is done and has not changed is skipped.

    Args:
        stage: What is done.
        slides: Of the request.
        ledger: Of the stage's folder; the caller closes it.
        annotations: Address of the annotation of each slide that has one.
        executor: Where it runs.
        check: Raises if it may not go on, for example as its lock is lost.
        prepare: Is called with the slides that are to be done, if there are any, before
            they are; the cluster is there then.

    Raises:
        ConfigError: A slide would take another one's place, or be there twice.
        StoreError: OUT cannot be written, or the slides' store does not answer.
        StoppedError: SIGTERM or Ctrl-C; what is complete is kept.
        MedrayError: The processes die, whichever tasks they get.
    """
    todo = changed_slides(slides, ledger, annotations)
    ledger.flush()
    log.info("%d slides, %d of them to do, into %s", len(slides), len(todo), stage.out)
    skipped = len(slides) - len(todo)
    if not todo:
        return Summary(stage.out, 0, skipped, {}, 0, 0.0)
    log_copies(task.input.uri for task in todo)
    if executor == "ray":
        # Imported here: the other executor needs no Ray, which takes seconds to load.
        from medray.execution import cluster
        from medray.execution.scheduler import run_on_ray as run

        cluster.connect()
    elif executor == "processes":
        from medray.execution.local import run_in_processes as run
    else:
        from medray.execution.local import run_here as run
    names = {task.input.slide for task in todo}
    prepare([slide for slide in slides if slide.slide in names])
    start = time.perf_counter()
    with Progress(stage.name, len(todo)) as progress, ledger.kept():
        commit = Commit(ledger, stage, progress)
        run(stage, todo, commit, check)
        commit.close()
    return commit.summary(skipped, time.perf_counter() - start)
