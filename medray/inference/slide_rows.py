"""The row of a finished slide in slides.parquet, summed up from its regions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from medray.classes import Classes
from medray.errors import SlideError
from medray.inference.regions import (
    FinishedMask,
    InferSlide,
    RegionRecord,
    SlideFacts,
)
from medray.slides import mpp_columns
from medray.storage import add_note
from medray.types import Columns


class _Record(Protocol):
    """What the records of runs and of features have in common."""

    @property
    def read_at(self) -> float: ...
    @property
    def read_s(self) -> float: ...
    @property
    def predict_s(self) -> float | None: ...
    @property
    def waited_s(self) -> float | None: ...
    @property
    def write_s(self) -> float: ...
    @property
    def written_at(self) -> float: ...


def start_row(
    facts: SlideFacts, regions: int, records: Sequence[_Record], note: str = ""
) -> Columns:
    """Return the first columns of a slide that a model has looked at.

    Args:
        facts: Of the slide.
        regions: How many regions its plan has.
        records: Of its regions.
        note: What the user should know.

    Returns:
        How it was read, how long its regions took, and when the first was read and the
        last written; seconds.
    """
    working = facts.working
    return {
        "level": working.level,
        "scale": working.scale,
        "downsample": working.downsample,
        "mpp": working.mpp,
        **mpp_columns(facts.mpp),
        "height": working.height,
        "width": working.width,
        "level0_height": facts.level0_height,
        "level0_width": facts.level0_width,
        "regions": regions,
        "note": note or working.note,
        "read_s": sum(record.read_s for record in records),
        "predict_s": sum(record.predict_s or 0.0 for record in records),
        "waited_s": sum(record.waited_s or 0.0 for record in records),
        "write_s": sum(record.write_s for record in records),
        "first_read_at": min((record.read_at for record in records), default=None),
        "last_write_at": max((record.written_at for record in records), default=None),
    }


def slide_row(
    slide: InferSlide,
    records: Sequence[RegionRecord],
    finished: FinishedMask,
    classes: Classes,
) -> Columns:
    """Sum up a finished slide for slides.parquet.

    Raises:
        SlideError: Nothing of the slide could be read.
    """
    facts = slide.facts
    row = start_row(facts, slide.regions, records)
    total = facts.working.height * facts.working.width
    unreadable = sum(record.unreadable_px for record in records)
    if unreadable and unreadable >= sum(sum(record.class_px) for record in records):
        raise SlideError(next(record.why for record in records if record.why))
    if unreadable:
        why = next(record.why for record in records if record.unreadable_px)
        add_note(row, f"{unreadable / total:.2%} of its pixels cannot be read: {why}")
    row["unreadable_px"] = unreadable
    counts = np.zeros(len(classes), np.int64)
    for record in records:
        counts += np.asarray(record.class_px)
    counts[0] += total - counts.sum()
    if finished.cleaned_px is not None:
        counts = np.asarray(finished.cleaned_px)
    row["merkle_root"] = finished.merkle_root
    names = classes.names
    row |= {f"px_{name}": int(n) for name, n in zip(names, counts, strict=True)}
    looked_at = sum(record.predicted_px for record in records)
    row["predicted_px"] = looked_at
    counts[0] = max(0, looked_at - int(counts[1:].sum()))
    row["label"] = names[int(counts.argmax())] if looked_at else names[0]
    if looked_at:
        uncertainty = [
            r.uncertainty_sum for r in records if r.uncertainty_sum is not None
        ]
        disagreement = [
            r.disagreement_sum for r in records if r.disagreement_sum is not None
        ]
        if uncertainty:
            row["uncertainty"] = sum(uncertainty) / 255 / looked_at
        if disagreement:
            row["disagreement"] = sum(disagreement) / looked_at
        row |= _probabilities(records, names, looked_at)
    row["windows"] = sum(record.windows for record in records)
    return row


def _probabilities(
    records: Sequence[RegionRecord], classes: Sequence[str], looked_at: int
) -> dict[str, float]:
    """Return the mean and highest probability of each class, where it was looked."""
    sums = [record.p_sum for record in records if record.p_sum is not None]
    most = [record.p_max for record in records if record.p_max is not None]
    if len(sums) < len(records):
        return {}
    means = np.sum(sums, axis=0) / 255 / looked_at
    row: dict[str, float] = {}
    highest = np.max(most, axis=0) / 255
    for name, mean, high in zip(classes, means, highest, strict=True):
        row |= {f"mean_p_{name}": float(mean), f"max_p_{name}": float(high)}
    return row
