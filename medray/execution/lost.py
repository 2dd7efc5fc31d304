"""What came of a task, where its processes may have died of it."""

from __future__ import annotations

from typing import Any

from medray.execution.stage import AnyPlan, AnyRegion, Outcome
from medray.execution.tasks import Failure, Finish, NotPlanned, SlideTask


def plan_of(task: SlideTask, result: Any, doing: str = "opening") -> AnyPlan:
    """Return a slide's plan, or that it cost its processes."""
    if isinstance(result, Exception):
        why = f"{task.input.uri}: quarantined: {doing} it: {result}"
        return NotPlanned(Failure(why))
    plan: AnyPlan = result
    return plan


def outcome_of(task: AnyRegion, result: Any) -> Outcome:
    """Return what came of a region, or that it cost its processes."""
    if isinstance(result, Exception):
        why = f"{task.slide.uri}: quarantined: {task.where}: {result}"
        return Failure(why, quarantined=True)
    outcome: Outcome = result
    return outcome


def finish_of(result: Any) -> Finish[Any] | Failure:
    """Return what finishing a slide gave, or that it cost its processes."""
    if isinstance(result, Exception):
        return Failure(f"{result}")
    finish: Finish[Any] | Failure = result
    return finish
