"""The report of an evaluation: metrics.json, per_slide tables and one HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from markupsafe import Markup
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from medray.classes import Classes
from medray.metrics import SCORES, bootstrap, class_scores, summary
from medray.store import files

UInt8 = npt.NDArray[np.uint8]

_SHOWN = 4  # overlays of the worst slides, and as many of the best
_MAX_ROWS = 500  # slides in the page's table; per_slide.csv has them all
_AGREEMENT = {
    "correct": (0, 158, 115),
    "wrongly marked": (213, 94, 0),
    "missed": (0, 114, 178),
}


@dataclass(frozen=True)
class SlideReport:
    """One slide of an evaluation.

    Attributes:
        slide: Its id.
        status: done or failed.
        message: Why it failed.
        counts: (C, C) int64, see medray.metrics; None if it failed.
        overlay: Picture made by `draw_overlay`; None for most slides.
    """

    slide: str
    status: str
    message: str
    counts: npt.NDArray[np.int64] | None
    overlay: bytes | None


def slides_to_show(slides: Sequence[SlideReport], n: int = _SHOWN) -> list[str]:
    """Name the `n` slides with the worst and the `n` with the best F1, worst first."""
    scored = []
    for slide in slides:
        if slide.counts is not None:
            names = [str(i) for i in range(len(slide.counts))]
            f1 = summary(slide.counts, names)["f1"]
            if f1 is not None:
                scored.append((f1, slide.slide))
    scored.sort()
    shown = scored if len(scored) <= 2 * n else scored[:n] + scored[-n:]
    return [name for _, name in shown]


# --- pictures -------------------------------------------------------------------------


def draw_overlay(rgb: UInt8, truth: UInt8, predicted: UInt8, classes: Classes) -> bytes:
    """Draw a slide with the truth, with the prediction, and with their agreement.

    Args:
        rgb: (h, w, 3) uint8.
        truth: (h, w) uint8 label values.
        predicted: (h, w) uint8 label values.
        classes: Gives the colours.

    Returns:
        A JPEG of the panels side by side.
    """
    panels = [
        ("truth", _outlined(rgb, truth, classes)),
        ("prediction", _outlined(rgb, predicted, classes)),
        ("agreement", _agreement(rgb, truth, predicted)),
    ]
    height, width = rgb.shape[:2]
    scale = min(1.0, 420 / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    gap, band = 8, 22
    sheet = Image.new("RGB", (3 * size[0] + 2 * gap, size[1] + band), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for i, (title, pixels) in enumerate(panels):
        left = i * (size[0] + gap)
        draw.text((left, 2), title, fill="#444", font=font)
        picture = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
        sheet.paste(picture, (left, band))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _outlined(rgb: UInt8, labels: UInt8, classes: Classes) -> UInt8:
    """Tint each class and draw its outline."""
    shown = rgb.astype(np.float32)
    for value in np.unique(labels[labels > 0]).tolist():
        color = np.array(list(bytes.fromhex(classes.colors[value][1:])), np.float32)
        inside = labels == value
        shown[inside] = 0.75 * shown[inside] + 0.25 * color
        width = max(1, round(max(labels.shape) / 300))
        rim = inside & ~ndimage.binary_erosion(inside, iterations=width)
        shown[rim] = color
    return shown.astype(np.uint8)


def _agreement(rgb: UInt8, truth: UInt8, predicted: UInt8) -> UInt8:
    grey = rgb.mean(axis=2, keepdims=True) * 0.5 + 127
    shown = np.repeat(grey, 3, axis=2)
    right = (truth == predicted) & (truth > 0)
    extra = (predicted > 0) & ~right
    missed = (truth > 0) & (predicted == 0)
    for name, where in zip(_AGREEMENT, (right, extra, missed), strict=True):
        color = np.array(_AGREEMENT[name], np.float32)
        shown[where] = 0.35 * shown[where] + 0.65 * color
    return shown.astype(np.uint8)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _as_svg(figure: Figure) -> str:
    """Give a figure as an SVG element for the page."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        bbox_inches="tight",
        metadata={"Date": None, "Creator": None},
    )
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _confusion_figure(counts: npt.NDArray[np.int64], names: Sequence[str]) -> str:
    size = 2.2 + 0.9 * len(names)
    figure, axes = _figure(size, 0.85 * size)
    rows = counts.sum(axis=1, keepdims=True)
    share = counts / np.maximum(rows, 1)
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.ndindex(*counts.shape):
        color = "white" if share[i, j] > 0.5 else "#222"
        text = f"{share[i, j]:.1%}\n{_short(int(counts[i, j]))}"
        axes.text(j, i, text, ha="center", va="center", color=color, fontsize=9)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    axes.spines[:].set_visible(False)
    return _as_svg(figure)


def _short(count: int) -> str:
    """Write pixels with a unit: 1234567 as 1.2 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit} px"
    return f"{count} px"


def _distribution_figure(values: Sequence[float]) -> str:
    figure, axes = _figure(6.2, 1.9)
    jitter = np.random.default_rng(0).uniform(-0.12, 0.12, len(values))
    if len(values) >= 5:
        axes.boxplot(values, orientation="horizontal", widths=0.5, showfliers=False)
    axes.scatter(values, 1 + jitter, s=22, alpha=0.55, color="#0072b2", zorder=3)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(0.6, 1.4)
    axes.set_yticks([])
    axes.set_xlabel("F1 of each slide")
    axes.spines[["top", "left", "right"]].set_visible(False)
    return _as_svg(figure)


# --- tables ---------------------------------------------------------------------------


def _slide_row(slide: SlideReport, names: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"slide": slide.slide, "status": slide.status}
    row["message"] = slide.message
    counts = slide.counts
    scores = {} if counts is None else summary(counts, names)
    for score in (*SCORES, "accuracy"):
        row[score] = scores.get(score)
    per_class = [] if counts is None else class_scores(counts, names)
    for i, name in enumerate(names):
        row[f"f1_{name}"] = per_class[i]["f1"] if per_class else None
        row[f"truth_px_{name}"] = None if counts is None else int(counts[i].sum())
        row[f"predicted_px_{name}"] = (
            None if counts is None else int(counts[:, i].sum())
        )
    if counts is not None and row["f1"] is None:
        row["message"] = "nothing to find, nothing found"
    return row


def write_report(
    out: str,
    *,
    title: str,
    classes: Classes,
    slides: Sequence[SlideReport],
    provenance: Mapping[str, str],
    date: str,
) -> dict[str, Any]:
    """Write metrics.json, per_slide.parquet, per_slide.csv and report.html.

    Args:
        out: Folder to write into.
        title: Of the page.
        classes: Names by label value.
        slides: The slides, in the order of the tables.
        provenance: What made the masks and the truth, for the page and metrics.json.
        date: When, ISO 8601.

    Returns:
        What metrics.json holds: the pooled scores (f1 first of all), `interval`,
        `per_class`, `confusion`, `classes`, `slides`, `provenance`, `date`.
    """
    names = classes.names
    counted = [slide.counts for slide in slides if slide.counts is not None]
    each = np.array(counted, np.int64).reshape(-1, len(names), len(names))
    pooled = each.sum(axis=0)
    failed = len(slides) - len(counted)
    metrics: dict[str, Any] = dict(summary(pooled, names))
    metrics |= {
        "interval": bootstrap(each, names),
        "per_class": class_scores(pooled, names),
        "confusion": pooled.tolist(),
        "classes": list(names),
        "slides": {"evaluated": len(counted), "failed": failed},
        "provenance": dict(provenance),
        "date": date,
    }
    rows = [_slide_row(slide, names) for slide in slides]
    table = pd.DataFrame(rows)
    page = _page(title, classes, slides, rows, metrics)
    files.write_table(files.join(out, "per_slide.parquet"), pa.Table.from_pandas(table))
    csv = table.to_csv(index=False)
    files.write_bytes(files.join(out, "per_slide.csv"), csv.encode())
    files.write_bytes(files.join(out, "report.html"), page.encode())
    # Last: a folder with metrics.json is a whole report.
    files.write_json(files.join(out, "metrics.json"), metrics)
    return metrics


def _page(
    title: str,
    classes: Classes,
    slides: Sequence[SlideReport],
    rows: Sequence[dict[str, Any]],
    metrics: Mapping[str, Any],
) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("medray"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["score"] = _score
    environment.filters["span"] = _span
    environment.filters["px"] = _short
    scored = [row for row in rows if row["f1"] is not None]
    by_slide = {slide.slide: slide for slide in slides}
    row_of = {row["slide"]: row for row in rows}
    shown = [
        (row_of[name], _data_uri(by_slide[name].overlay))
        for name in slides_to_show(slides)
        if by_slide[name].overlay
    ]
    worst_first = sorted(
        (row for row in rows if row["status"] == "done"),
        key=lambda row: (row["f1"] is None, row["f1"] or 0.0, row["slide"]),
    )
    counts = np.array(metrics["confusion"], np.int64)
    return environment.get_template("report.html.jinja").render(
        title=title,
        classes=classes,
        metrics=metrics,
        scores=(*SCORES, "accuracy"),
        legend=_AGREEMENT,
        shown=shown,
        failed=[row for row in rows if row["status"] != "done"],
        rows=worst_first[:_MAX_ROWS],
        left_out=max(0, len(worst_first) - _MAX_ROWS),
        confusion=Markup(_confusion_figure(counts, classes.names)),
        distribution=Markup(
            _distribution_figure([row["f1"] for row in scored]) if scored else ""
        ),
    )


def _data_uri(picture: bytes | None) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(picture or b'').decode()}"


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _span(value: Sequence[float] | None) -> str:
    return "" if value is None else f"{value[0]:.3f} to {value[1]:.3f}"
