"""The result of a task, or the failure of one that killed its processes."""

from __future__ import annotations

from typing import Any

from medray.execution.stage import AnyPlan, AnyRegion, Outcome
from medray.execution.tasks import Failure, Finish, NotPlanned, SlideTask


def plan_of(task: SlideTask, result: Any, doing: str = "opening") -> AnyPlan:
    """Return a slide's plan, or the failure if it killed its processes."""
    if isinstance(result, Exception):
        why = f"{task.input.uri}: quarantined: {doing} it: {result}"
        return NotPlanned(Failure(why))
    plan: AnyPlan = result
    return plan


def outcome_of(task: AnyRegion, result: Any) -> Outcome:
    """Return the result of a region, or the failure if it killed its processes."""
    if isinstance(result, Exception):
        why = f"{task.slide.uri}: quarantined: {task.where}: {result}"
        return Failure(why, quarantined=True)
    outcome: Outcome = result
    return outcome


def finish_of(result: Any) -> Finish[Any] | Failure:
    """Return what finishing a slide returned, or that it killed its processes."""
    if isinstance(result, Exception):
        return Failure(f"{result}")
    finish: Finish[Any] | Failure = result
    return finish
