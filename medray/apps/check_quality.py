"""Slide quality control of `medray check`: the columns of a slide."""

from __future__ import annotations

from dataclasses import asdict

from medray.slides import QualityLimits, Slide, judge, measure_quality
from medray.types import Row

QUALITY = (
    *("qc_tissue_share", "qc_tissue_mm2", "qc_focus", "qc_blurred_share"),
    *("qc_pen_share", "qc_fold_share", "qc_bubble_share"),
)
"""Columns of values; staining is compared by nights only."""


def start_quality(limits: QualityLimits | None) -> Row:
    """Return the columns of a slide that is not measured yet; none without limits."""
    return dict.fromkeys(QUALITY) | {"quality": ""} if limits else {}


def quality_facts(slide: Slide, mpp: float | None, limits: QualityLimits | None) -> Row:
    """Measure a slide and report what is worse than a limit; {} without limits."""
    if limits is None:
        return {}
    values = asdict(measure_quality(slide, mpp))
    verdict = judge(values, limits)
    said = "; ".join(filter(None, [verdict.quarantined, verdict.flagged]))
    found = {name: values[name.removeprefix("qc_")] for name in QUALITY}
    return found | {"quality": said}
