"""Stages that do nothing, for tests of what is around them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from medray.execution.commit import outcome_columns
from medray.execution.stage import Stage
from medray.execution.tasks import PlannedRegion, SlideInput
from medray.slides.fingerprint import slide_digest
from medray.storage.ledger import Ledger


@dataclass(frozen=True)
class EmptyRecord:
    """The record of a region of which nothing is written."""

    files: dict[str, str] = field(default_factory=dict)


def empty_stage(
    out: str, regions: Sequence[PlannedRegion[None]]
) -> Stage[Any, Any, Any, Any, Any]:
    """A stage that plans the same regions for each slide."""
    return Stage(
        name="empty",
        out=out,
        record=EmptyRecord,
        plan=lambda source, digest, slide: (None, regions),
        read=lambda task: (None, None),
        write=lambda task, seen, layers, timing: EmptyRecord(),
        finish=lambda slide, records: None,
        slide_row=lambda slide, records, finished: {},
    )


def commit_done(ledger: Ledger, source: SlideInput) -> None:
    """Note that a slide is done, as a stage does."""
    digest = slide_digest(source.uri)
    ledger.commit_slide(outcome_columns(source, digest, "done", ""))
