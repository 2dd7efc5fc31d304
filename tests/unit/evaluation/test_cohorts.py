"""Scores by cohorts and over patients, of which some are not known."""

import numpy as np
import pytest

from medray.classes import Classes
from medray.evaluation.report import write_report
from medray.evaluation.slide_metrics import SlideReport, score_slides

NAMES = ("background", "tumour")


def reports(count: int) -> list[SlideReport]:
    rng = np.random.default_rng(0)
    return [
        SlideReport(f"s{i}", "done", "", rng.integers(1, 99, (2, 2)), None)
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("patients", "over", "note"),
    [
        (["p", "p", "q", "q"], "patients", None),
        (["p", "p", "", ""], "patients", "2 slides without one count as their own"),
        ([""] * 4, "slides", "of no slide the patient is known"),
    ],
)
def test_intervals_are_over_patients_if_any_is_known(
    patients: list[str], over: str, note: str | None
) -> None:
    slides = reports(4)
    said = {slide.slide: who for slide, who in zip(slides, patients, strict=True)}
    metrics = score_slides(slides, NAMES, cohorts={"patient": said})
    assert metrics["interval_over"] == over
    assert [note in one for one in metrics["notes"]] == [True] if note else True
    assert note or metrics["notes"] == []
    plain = score_slides(slides, NAMES)
    assert plain["interval_over"] == "slides"
    assert "notes" not in plain
    assert (metrics["interval"] == plain["interval"]) == (over == "slides")


def test_a_patient_that_is_not_known_is_not_one_of_that_name() -> None:
    """A slide called as a patient is no slide of this patient."""
    slides = reports(3)
    mixed = score_slides(
        slides, NAMES, cohorts={"patient": {"s0": "s2", "s1": "x", "s2": ""}}
    )
    assert mixed["interval"] == score_slides(slides, NAMES)["interval"]


def test_what_is_not_known_is_shown_so(tmp_path: object) -> None:
    site = {"s0": "North", "s1": ""}
    metrics = write_report(
        str(tmp_path),
        title="t",
        classes=Classes(NAMES),
        slides=reports(2),
        provenance={},
        date="2026-01-01",
        cohorts={"site": site},
        notes=["c.csv: 1 of 1 rows matched 1 of 2 slides"],
    )
    assert [row["value"] for row in metrics["cohorts"]["site"]] == ["", "North"]
    with open(f"{tmp_path}/report.html") as file:
        page = file.read()
    assert '<td class="name">unknown</td>' in page
    assert "c.csv: 1 of 1 rows matched 1 of 2 slides." in page
