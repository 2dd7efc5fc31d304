"""Scores of slides from their counts: pooled, of each cohort, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medray.datasets import PATIENT
from medray.evaluation.curves import curve_scores
from medray.evaluation.metrics import Counts, bootstrap, class_scores, summary


@dataclass(frozen=True)
class SlideReport:
    """One slide of an evaluation.

    Attributes:
        slide: Its id.
        status: done or failed.
        message: Why it failed, or what to know of its truth.
        counts: (C, C) int64, see medray.evaluation.metrics; None if it failed.
        overlay: Picture made by `draw_overlay`; None for most slides.
        reading: How its pixels were read: microns per pixel, their source, and notes.
    """

    slide: str
    status: str
    message: str
    counts: Counts | None
    overlay: bytes | None
    reading: str = ""


def score_slides(
    slides: Sequence[SlideReport],
    names: Sequence[str],
    *,
    levels: Counts | None = None,
    cohorts: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Score the slides of an evaluation.

    Args:
        slides: All of them, also those that failed.
        names: Of the classes.
        levels: Pixels by their probability, see
            `medray.evaluation.curves.count_levels`.
        cohorts: The value of each slide ("": not known), by what it is a value of.
            With `patient` intervals are found by resampling patients.

    Returns:
        The pooled scores (f1 first of all), `interval` and `interval_over` (patients if
        that of any slide is known, else slides), `per_class`, `confusion`, `classes`,
        `curves` (None without `levels`), `cohorts`, `slides`; with cohorts also `notes`
        on intervals.
    """
    cohorts = cohorts or {}
    done = [slide for slide in slides if slide.counts is not None]
    each = _stacked(done, len(names))
    pooled = each.sum(axis=0)
    patients = cohorts.get(PATIENT, {})
    alone = sum(not patients.get(slide.slide) for slide in done)
    notes = []
    if PATIENT in cohorts and alone == len(done):
        notes = ["of no slide the patient is known: intervals are over slides"]
    elif PATIENT in cohorts and alone:
        notes = [
            f"intervals are over patients; {alone} slides without one count as their "
            f"own"
        ]
    found = summary(pooled, names) | {
        "interval": bootstrap(_by_patient(done, each, patients), names),
        "interval_over": "patients" if alone < len(done) else "slides",
        "per_class": class_scores(pooled, names),
        "confusion": pooled.tolist(),
        "classes": list(names),
        "curves": None if levels is None else curve_scores(levels, names),
        "cohorts": {
            column: _cohort_rows(done, values, patients, names)
            for column, values in cohorts.items()
            if column != PATIENT
        },
        "slides": {"evaluated": len(done), "failed": len(slides) - len(done)},
    }
    return found | ({"notes": notes} if cohorts else {})


def _stacked(slides: Sequence[SlideReport], classes: int) -> Counts:
    """Return the counts of slides: (N, C, C)."""
    counts = [slide.counts for slide in slides]
    return np.array(counts, np.int64).reshape(-1, classes, classes)


def _by_patient(
    slides: Sequence[SlideReport], counts: Counts, patients: Mapping[str, str]
) -> Counts:
    """Add up the counts of each patient; a slide of no known one stands for itself."""
    place: dict[tuple[bool, str], int] = {}
    rows = []
    for slide in slides:
        patient = patients.get(slide.slide, "")
        unit = (bool(patient), patient or slide.slide)
        rows.append(place.setdefault(unit, len(place)))
    total = np.zeros((len(place), *counts.shape[1:]), np.int64)
    np.add.at(total, rows, counts)
    return total


def _cohort_rows(
    slides: Sequence[SlideReport],
    values: Mapping[str, str],
    patients: Mapping[str, str],
    names: Sequence[str],
) -> list[dict[str, Any]]:
    """Score the slides of each value: `value`, `slides`, the scores and `interval`."""
    groups: dict[str, list[SlideReport]] = {}
    for slide in slides:
        groups.setdefault(values.get(slide.slide, ""), []).append(slide)
    rows = []
    for value in sorted(groups):
        each = _stacked(groups[value], len(names))
        found = bootstrap(_by_patient(groups[value], each, patients), names)
        row: dict[str, Any] = {"value": value, "slides": len(each)}
        row |= summary(each.sum(axis=0), names)
        rows.append(row | {"interval": found["f1"] if found else None})
    return rows
