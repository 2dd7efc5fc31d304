"""The report of an evaluation: metrics.json, per_slide tables and one HTML page."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from medray.classes import Classes
from medray.errors import ConfigError
from medray.evaluation.curves import draw_precision_recall, draw_reliability, summed_up
from medray.evaluation.html import ACCENT, INK, LINE, SOFT, as_svg, data_uri, render
from medray.evaluation.metrics import SCORES, bootstrap, class_scores, summary
from medray.storage import files
from medray.types import UInt8

Counts = npt.NDArray[np.int64]

_SHOWN = 4  # overlays of the worst slides, and as many of the best
_MAX_ROWS = 500  # slides in a table of the page; per_slide.csv has them all
_MAX_COHORTS = 50  # values of a column, likewise; metrics.json has them all
PATIENT = "patient"
"""Column of cohorts whose values are resampled for intervals."""
_PANEL = (440, 294)  # height and width in pixels that a panel of an overlay may have
# Colour-blind safe (Okabe and Ito 2008).
AGREEMENT = {
    "correct": "#009e73",
    "wrongly marked": "#d55e00",
    "missed": "#0072b2",
    "another class": "#cc79a7",
}
CHANGE = {
    "right now": "#009e73",
    "wrong now": "#d55e00",
    "wrong otherwise": "#cc79a7",
}


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


# --- pictures -------------------------------------------------------------------------


def draw_overlay(
    rgb: UInt8,
    truth: UInt8,
    predicted: UInt8,
    classes: Classes,
    titles: tuple[str, str, str] = ("truth", "prediction", "agreement"),
) -> bytes:
    """Draw a slide with the truth, with the prediction, and with their agreement.

    Args:
        rgb: (h, w, 3) uint8, the slide at any coarse level.
        truth: (h, w) uint8 label values.
        predicted: (h, w) uint8 label values.
        classes: Gives the colours.
        titles: Of the three panels.

    Returns:
        A JPEG of the panels side by side, at most 900 pixels wide.

    Raises:
        ValueError: The three do not have the same height and width.
    """
    size, pixels, (true, found) = _enlarged(rgb, truth, predicted)
    panels = (
        _outlined(pixels, true, classes),
        _outlined(pixels, found, classes),
        _agreement(pixels, true, found),
    )
    return _sheet(dict(zip(titles, panels, strict=True)), size)


def draw_change(rgb: UInt8, truth: UInt8, before: UInt8, after: UInt8) -> bytes:
    """Draw how two predictions agree with the truth, and what became of their errors.

    Args:
        rgb: (h, w, 3) uint8, the slide at any coarse level.
        truth: (h, w) uint8 label values.
        before: (h, w) uint8 label values of prediction A.
        after: (h, w) uint8 label values of prediction B.

    Returns:
        A JPEG of the panels side by side, at most 900 pixels wide.

    Raises:
        ValueError: The four do not have the same height and width.
    """
    size, pixels, (true, old, new) = _enlarged(rgb, truth, before, after)
    panels = {
        "A": _agreement(pixels, true, old),
        "B": _agreement(pixels, true, new),
        "what changed": _painted(
            pixels,
            {
                CHANGE["right now"]: (old != true) & (new == true),
                CHANGE["wrong now"]: (old == true) & (new != true),
                CHANGE["wrong otherwise"]: (old != new) & (old != true) & (new != true),
            },
        ),
    }
    return _sheet(panels, size)


def _enlarged(
    rgb: UInt8, *labels: UInt8
) -> tuple[tuple[int, int], UInt8, tuple[UInt8, ...]]:
    """Give a panel's (height, width), and what to draw in it at twice that size.

    Drawn large and then reduced, outlines become smooth.
    """
    shapes = [rgb.shape[:2], *(label.shape for label in labels)]
    if len(set(shapes)) > 1:
        raise ValueError(f"slide and labels are of different sizes: {shapes}")
    height, width = shapes[0]
    scale = min(_PANEL[0] / height, _PANEL[1] / width, 4.0)
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    drawn = (2 * size[0], 2 * size[1])
    pixels = _resized(rgb, drawn, Image.Resampling.BICUBIC)
    nearest = (_resized(label, drawn, Image.Resampling.NEAREST) for label in labels)
    return size, pixels, tuple(nearest)


def _sheet(panels: Mapping[str, UInt8], size: tuple[int, int]) -> bytes:
    """Put panels side by side under their titles, reduced to (height, width)."""
    gap, band = 8, 22
    count = len(panels)
    sheet_width = count * size[1] + (count - 1) * gap
    sheet = Image.new("RGB", (sheet_width, size[0] + band), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for i, (title, panel) in enumerate(panels.items()):
        left = i * (size[1] + gap)
        draw.text((left, 2), title, fill=SOFT, font=font)
        reduced = _resized(panel, size, Image.Resampling.BOX)
        sheet.paste(Image.fromarray(reduced), (left, band))
    buffer = io.BytesIO()
    # Without chroma subsampling: it washes out thin coloured lines.
    sheet.save(buffer, "JPEG", quality=85, subsampling=0)
    return buffer.getvalue()


def _resized(image: UInt8, size: tuple[int, int], how: Image.Resampling) -> UInt8:
    """Resize to (height, width)."""
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), how))


def _color(code: str) -> npt.NDArray[np.float32]:
    return np.array(list(bytes.fromhex(code[1:])), np.float32)


def _outlined(rgb: UInt8, labels: UInt8, classes: Classes) -> UInt8:
    """Tint each class and draw its outline."""
    shown = rgb.astype(np.float32)
    for value in np.unique(labels[labels > 0]).tolist():
        color = _color(classes.colors[value])
        inside = labels == value
        shown[inside] = 0.8 * shown[inside] + 0.2 * color
        shown[inside & ~ndimage.binary_erosion(inside, iterations=3)] = color
    return shown.astype(np.uint8)


def _agreement(rgb: UInt8, truth: UInt8, predicted: UInt8) -> UInt8:
    """Colour each pixel by whether truth and prediction agree, on a pale slide."""
    places = {
        "correct": (truth == predicted) & (truth > 0),
        "wrongly marked": (truth == 0) & (predicted > 0),
        "missed": (truth > 0) & (predicted == 0),
        "another class": (truth != predicted) & (truth > 0) & (predicted > 0),
    }
    return _painted(rgb, {AGREEMENT[name]: where for name, where in places.items()})


def _painted(rgb: UInt8, places: Mapping[str, npt.NDArray[np.bool_]]) -> UInt8:
    """Paint places in their colours on a pale slide."""
    shown = np.repeat(rgb.mean(axis=2, keepdims=True) * 0.5 + 127, 3, axis=2)
    for color, where in places.items():
        shown[where] = 0.35 * shown[where] + 0.65 * _color(color)
    return shown.astype(np.uint8)


def _distribution_figure(values: Sequence[float]) -> Markup:
    """Draw a dot a slide, and a box around the middle half, as an SVG element."""
    figure = Figure(figsize=(5.6, 1.9), layout="constrained")
    axes = figure.subplots()
    many = len(values) > 300
    if len(values) >= 5:
        axes.boxplot(
            values,
            orientation="horizontal",
            widths=0.55,
            showfliers=False,
            boxprops={"color": SOFT},
            whiskerprops={"color": SOFT},
            capprops={"color": SOFT},
            medianprops={"color": INK, "linewidth": 2},
            zorder=4,
        )
    jitter = np.random.default_rng(0).uniform(-0.18, 0.18, len(values))
    axes.scatter(
        values,
        1 + jitter,
        s=6 if many else 24,
        alpha=0.25 if many else 0.55,
        color=ACCENT,
        linewidths=0,
        zorder=3,
        rasterized=many,  # thousands of vector dots would bloat the page
    )
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(0.6, 1.4)
    axes.set_yticks([])
    axes.set_xlabel("F1 of each slide", color=SOFT)
    axes.tick_params(colors=SOFT)
    axes.spines[["top", "left", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    return as_svg(figure)


# --- tables ---------------------------------------------------------------------------


def _schema(names: Sequence[str]) -> pa.Schema:
    """Give the columns of per_slide; with types, so that all-blank columns keep one.

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
    places: Mapping[str, Sequence[tuple[str, bytes]]] | None = None,
    cohorts: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Any]:
    """Write metrics.json, per_slide.parquet, per_slide.csv and report.html.

    Args:
        out: Folder to write into.
        title: Of the page.
        classes: Names by label value.
        slides: The slides, in the order of the tables.
        provenance: What made the masks and the truth, for the page and metrics.json.
        date: When, ISO 8601.
        truth: Where the truth lies, for `medray view`; the page does not tell.
        levels: Pixels by their probability, see
        `medray.evaluation.curves.count_levels`.
        places: Captions and pictures of places, under their headings.
        cohorts: The value of each slide ("": not known), by what it is a value of.

    Returns:
        What metrics.json holds: the pooled scores (f1 first of all), `interval` and
        `interval_over` (slides or patients), `per_class`, `confusion`, `classes`,
        `curves` (None without `levels`), `cohorts`, `slides`, `provenance`, `date`,
        `truth`.
    """
    names, cohorts = classes.names, cohorts or {}
    done = [slide for slide in slides if slide.counts is not None]
    each = _stacked(done, len(names))
    pooled = each.sum(axis=0)
    failed = len(slides) - len(done)
    patients = cohorts.get(PATIENT, {})
    metrics: dict[str, Any] = dict(summary(pooled, names))
    metrics |= {
        "interval": bootstrap(_by_patient(done, each, patients), names),
        "interval_over": "patients" if patients else "slides",
        "per_class": class_scores(pooled, names),
        "confusion": pooled.tolist(),
        "classes": list(names),
        "curves": None if levels is None else summed_up(levels, names),
        "cohorts": {
            column: _cohort_rows(done, values, patients, names)
            for column, values in cohorts.items()
            if column != PATIENT
        },
        "slides": {"evaluated": len(done), "failed": failed},
        "provenance": dict(provenance),
        "date": date,
        "truth": truth,
    }
    rows = [_slide_row(slide, names) for slide in slides]
    page = _page(title, classes, slides, rows, metrics, levels, places or {})
    table = pa.Table.from_pylist(rows, _schema(names))
    csv = io.BytesIO()
    pyarrow.csv.write_csv(table.drop_columns("confusion"), csv)
    files.write_table(files.join(out, "per_slide.parquet"), table)
    files.write_bytes(files.join(out, "per_slide.csv"), csv.getvalue())
    files.write_bytes(files.join(out, "report.html"), page.encode())
    # Last: a folder with metrics.json is a whole report.
    files.write_json(files.join(out, "metrics.json"), metrics)
    return metrics


def _stacked(slides: Sequence[SlideReport], classes: int) -> Counts:
    """Give the counts of slides: (N, C, C)."""
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


# --- page -----------------------------------------------------------------------------


def _page(
    title: str,
    classes: Classes,
    slides: Sequence[SlideReport],
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
    levels: Counts | None,
    places: Mapping[str, Sequence[tuple[str, bytes]]],
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
        distribution=_distribution_figure(scored) if scored else "",
        cohorts=metrics["cohorts"],
        most_cohorts=_MAX_COHORTS,
        places={
            heading: [(caption, data_uri(picture)) for caption, picture in pictures]
            for heading, pictures in places.items()
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
    """Give the row and the picture of the slides to show, under their headings."""
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
    """Give share of the row, pixels and colours of each cell of the matrix."""
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    white, full = _color("#ffffff"), _color(ACCENT)

    def cell(i: int, j: int) -> dict[str, Any]:
        mixed = np.rint(white + share[i, j] * (full - white)).astype(int).tolist()
        return {
            "share": f"{share[i, j]:.1%}" if counts[i].any() else "\N{EN DASH}",
            "px": int(counts[i, j]),
            "fill": f"rgb({mixed[0]},{mixed[1]},{mixed[2]})",
            "ink": "#fff" if share[i, j] > 0.5 else INK,
        }

    return [[cell(i, j) for j in range(len(counts))] for i in range(len(counts))]
