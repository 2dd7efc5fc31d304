"""The report of an evaluation: metrics.json, per_slide tables and one HTML page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from medray.classes import Classes, rgb_of
from medray.errors import ConfigError
from medray.evaluation.figures import (
    draw_distribution,
    draw_precision_recall,
    draw_reliability,
)
from medray.evaluation.html import ACCENT, INK, data_uri, render
from medray.evaluation.metrics import SCORES, Counts, class_scores, summary
from medray.evaluation.overlay import AGREEMENT
from medray.evaluation.seen import SeenSlides
from medray.evaluation.slide_metrics import SlideReport, score_slides
from medray.storage import files

_SHOWN = 4  # overlays of the worst slides, and as many of the best
_MAX_ROWS = 500  # slides in a table of the page; per_slide.csv has them all
_MAX_COHORTS = 50  # values of a column on the page; metrics.json has them all


def read_counts(out: str) -> dict[str, Counts | None]:
    """Read the counts of each slide of a report.

    Args:
        out: Folder of a report of `medray evaluate`.

    Returns:
        By slide (C, C) int64, see medray.evaluation.metrics; None of those that failed.

    Raises:
        ConfigError: There is no such report, or an older medray wrote it.
    """
    uri = files.join(out, "per_slide.parquet")
    if not files.exists(uri):
        raise ConfigError(f"{out}: expected a report; `medray evaluate` writes one")
    table = files.read_table(uri)
    if "confusion" not in table.column_names:
        raise ConfigError(
            f"{uri}: has no column confusion, so an older medray wrote it; evaluate "
            f"that run again, into another folder"
        )
    rows = table.select(["slide", "confusion"]).to_pylist()
    side = next((math.isqrt(len(r["confusion"])) for r in rows if r["confusion"]), 0)
    return {
        row["slide"]: np.array(row["confusion"], np.int64).reshape(side, side)
        if row["confusion"] is not None
        else None
        for row in rows
    }


def slides_to_show(slides: Sequence[SlideReport], n: int = _SHOWN) -> list[str]:
    """Name the `n` slides with the worst and the `n` with the best F1, worst first.

    Slides without an F1 (failed, or nothing to find and nothing found) are never
    named; ties go by name.
    """
    scored = []
    for slide in slides:
        if slide.counts is not None:
            names = [str(i) for i in range(len(slide.counts))]
            f1 = summary(slide.counts, names)["f1"]
            if f1 is not None:
                scored.append((f1, slide.slide))
    scored.sort()
    shown = scored if len(scored) <= 2 * n else scored[:n] + scored[len(scored) - n :]
    return [name for _, name in shown]


# --- tables ---------------------------------------------------------------------------


def _schema(names: Sequence[str]) -> pa.Schema:
    """Return the columns of per_slide; with types, so that all-blank columns keep one.

    `confusion` has the (C, C) counts, row by row; per_slide.csv goes without it.
    """
    fields = [(name, pa.string()) for name in ("slide", "status", "message")]
    fields += [(score, pa.float64()) for score in (*SCORES, "accuracy")]
    for name in names:
        fields.append((f"f1_{name}", pa.float64()))
        fields.append((f"truth_px_{name}", pa.int64()))
        fields.append((f"predicted_px_{name}", pa.int64()))
    fields.append(("confusion", pa.list_(pa.int64())))
    return pa.schema(fields)


def _slide_row(slide: SlideReport, names: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(_schema(names).names)
    row |= {"slide": slide.slide, "status": slide.status, "message": slide.message}
    row["reading"] = slide.reading  # for the page alone; no column of the tables
    counts = slide.counts
    if counts is None:
        return row
    row |= summary(counts, names)
    row["confusion"] = counts.ravel().tolist()
    for i, scores in enumerate(class_scores(counts, names)):
        row[f"f1_{names[i]}"] = scores["f1"]
        row[f"truth_px_{names[i]}"] = int(counts[i].sum())
        row[f"predicted_px_{names[i]}"] = int(counts[:, i].sum())
    if row["f1"] is None:
        nothing = "nothing to find, nothing found"
        row["message"] = f"{nothing}; {slide.message}" if slide.message else nothing
    return row


def write_report(
    out: str,
    *,
    title: str,
    classes: Classes,
    slides: Sequence[SlideReport],
    provenance: Mapping[str, str],
    date: str,
    truth: str = "",
    levels: Counts | None = None,
    fields: Mapping[str, Sequence[tuple[str, bytes]]] | None = None,
    cohorts: Mapping[str, Mapping[str, str]] | None = None,
    notes: Sequence[str] = (),
    about: str = "",
    seen: SeenSlides | None = None,
) -> dict[str, Any]:
    """Write metrics.json, per_slide.parquet, per_slide.csv and report.html.

    Args:
        out: Folder to write into.
        title: Of the page.
        classes: Names by label value.
        slides: The slides, in the order of the tables.
        provenance: What made the masks and the truth, for the page and metrics.json.
        date: When, ISO 8601.
        truth: Where the truth lies, for `medray view`; the page does not show it.
        levels: Pixels by their probability, see
        `medray.evaluation.curves.count_levels`.
        fields: Captions and pictures of fields of view, under their headings.
        cohorts: The value of each slide ("": not known), by what it is a value of.
        notes: What else to know of it, such as what a table did not say.
        about: Which slides these are, for the page.
        seen: Which of them the model has seen; None: that is not known.

    Returns:
        What metrics.json holds: what `score_slides` finds, and `provenance`, `date`,
        `truth`, `seen_slides` (None: not known; `train` and `val`, the slides that
        trained and chose the model) and `unseen`: `slides`, the pooled scores and
        `interval` of the others, if both kinds are there.
    """
    names = classes.names
    metrics = score_slides(slides, names, levels=levels, cohorts=cohorts)
    if found := [*notes, *metrics.get("notes", [])]:
        metrics["notes"] = found
    metrics |= {"provenance": dict(provenance), "date": date, "truth": truth}
    metrics |= {"seen_slides": asdict(seen) if seen is not None else None}
    metrics |= {"unseen": _score_unseen(slides, names, cohorts, seen)}
    rows = [_slide_row(slide, names) for slide in slides]
    page = _page(
        title, classes, slides, rows, metrics, levels, fields or {}, about, seen
    )
    table = pa.Table.from_pylist(rows, _schema(names))
    files.write_table(files.join(out, "per_slide.parquet"), table)
    files.write_csv(files.join(out, "per_slide.csv"), table.drop_columns("confusion"))
    files.write_bytes(files.join(out, "report.html"), page.encode())
    # Last: a folder with metrics.json is a whole report.
    files.write_json(files.join(out, "metrics.json"), metrics)
    return metrics


def _score_unseen(
    slides: Sequence[SlideReport],
    names: Sequence[str],
    cohorts: Mapping[str, Mapping[str, str]] | None,
    seen: SeenSlides | None,
) -> dict[str, Any] | None:
    """Score the slides that are new to the model; None if all are, or none is."""
    known = {*seen.train, *seen.val} if seen is not None else set()
    new = [slide for slide in slides if slide.slide not in known]
    if not known or not any(slide.counts is not None for slide in new):
        return None
    found = score_slides(new, names, cohorts=cohorts)
    kept = {name: found[name] for name in (*SCORES, "accuracy", "interval")}
    return {"slides": found["slides"]["evaluated"]} | kept


# --- page -----------------------------------------------------------------------------


def _page(
    title: str,
    classes: Classes,
    slides: Sequence[SlideReport],
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
    levels: Counts | None,
    fields: Mapping[str, Sequence[tuple[str, bytes]]],
    about: str,
    seen: SeenSlides | None,
) -> str:
    done = [row for row in rows if row["status"] == "done"]
    failed = [row for row in rows if row["status"] != "done"]
    scored = [row["f1"] for row in done if row["f1"] is not None]
    done.sort(key=lambda row: (row["f1"] is None, row["f1"] or 0.0, row["slide"]))
    legend = dict(AGREEMENT)
    if len(classes) == 2:
        del legend["another class"]
    return render(
        "report.html.jinja",
        title=title,
        about=about,
        seen="" if seen is None else str(seen),
        classes=classes,
        metrics=metrics,
        scores=(*SCORES, "accuracy"),
        legend=legend,
        shown=_shown(slides, rows),
        failed=failed[:_MAX_ROWS],
        failed_left_out=max(0, len(failed) - _MAX_ROWS),
        rows=done[:_MAX_ROWS],
        left_out=max(0, len(done) - _MAX_ROWS),
        confusion=_confusion_cells(np.array(metrics["confusion"], np.int64)),
        scored=len(scored),
        blank=len(done) - len(scored),
        distribution=draw_distribution(scored) if scored else "",
        cohorts=metrics["cohorts"],
        most_cohorts=_MAX_COHORTS,
        fields={
            heading: [(caption, data_uri(picture)) for caption, picture in pictures]
            for heading, pictures in fields.items()
            if pictures
        },
        precision_recall=""
        if levels is None
        else draw_precision_recall(levels, classes),
        reliability="" if levels is None else draw_reliability(levels),
    )


def _shown(
    slides: Sequence[SlideReport], rows: Sequence[dict[str, Any]]
) -> dict[str, list[tuple[dict[str, Any], str]]]:
    """Return the row and the picture of the slides to show, under their headings."""
    row_of = {row["slide"]: row for row in rows}
    overlays = {slide.slide: slide.overlay for slide in slides}
    names = slides_to_show(slides)
    half = math.ceil(len(names) / 2)
    groups = {"Worst slides": names[:half], "Best slides": names[half:][::-1]}
    if len(names) < 2:
        groups = {"The slide": names}
    return {
        heading: pictures
        for heading, group in groups.items()
        if (
            pictures := [
                (row_of[name], data_uri(overlay))
                for name in group
                if (overlay := overlays[name])
            ]
        )
    }


def _confusion_cells(counts: Counts) -> list[list[dict[str, Any]]]:
    """Return share of the row, pixels and colours of each cell of the matrix."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    white, full = (np.array(rgb_of(c), np.float32) for c in ("#ffffff", ACCENT))

    def cell(i: int, j: int) -> dict[str, Any]:
        mixed = np.rint(white + share[i, j] * (full - white)).astype(int).tolist()
        return {
            "share": f"{share[i, j]:.1%}" if counts[i].any() else "\N{EN DASH}",
            "px": int(counts[i, j]),
            "fill": f"rgb({mixed[0]},{mixed[1]},{mixed[2]})",
            "ink": "#fff" if share[i, j] > 0.5 else INK,
        }

    return [[cell(i, j) for j in range(len(counts))] for i in range(len(counts))]
