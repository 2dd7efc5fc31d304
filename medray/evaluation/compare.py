"""Two runs -> which is better, whether that is chance, and where they differ.

diff      region by region, mask against mask
score     both against one truth, where there is one; the difference by bootstrap
show      the slides that lost most, or changed most
report    compare.json, slides.csv, compare.html; a/ and b/ are the two evaluations
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from medray.classes import Classes
from medray.errors import MedrayError
from medray.evaluation.diff import Difference, diff
from medray.evaluation.evaluate import evaluate, match_ground_truth
from medray.evaluation.ground_truth import read_known, read_truth
from medray.evaluation.html import ACCENT, SOFT, as_svg, data_uri, finish_axes, render
from medray.evaluation.metrics import class_scores, difference, summary
from medray.evaluation.report import (
    CHANGE,
    Counts,
    draw_change,
    draw_overlay,
    read_counts,
)
from medray.geometry import Rectangle
from medray.inference.run import RunSettings, mask_uri, read_run
from medray.slides import open_row, read_thumbnail
from medray.storage import files, ome_zarr
from medray.storage.yaml_config import to_dict
from medray.types import Row

log = logging.getLogger(__name__)

_SHOWN = 6  # slides with pictures
_MAX_ROWS = 500  # slides in the page's table; slides.csv has them all
_OVERLAY_PX = 600


@dataclass(frozen=True)
class Comparison:
    """How two runs of the same slides compare; B is RUN_B, taken as the newer one.

    Attributes:
        out: Folder of the comparison.
        report: The page to open.
        compared: Slides whose masks were compared.
        changed: Those of them whose masks differ.
        scored: Slides that both evaluations counted; 0 without a truth.
        f1: Pooled F1 of A over these; None: undefined, or without a truth.
        other_f1: Of B.
        difference: B minus A.
        interval: Its 95 % interval by a paired bootstrap over slides.
        p_value: Of no difference, two-sided, by the same bootstrap.
        worse: Slides whose F1 is lower in B, the largest loss first.
        better: Slides whose F1 is higher in B, the largest gain first.
        failed: Why some slides cannot be compared.
    """

    out: str
    report: str
    compared: int
    changed: int
    scored: int
    f1: float | None
    other_f1: float | None
    difference: float | None
    interval: list[float] | None
    p_value: float | None
    worse: list[str]
    better: list[str]
    failed: dict[str, str]


def compare(run: str, other: str, *, out: str, truth: str | None = None) -> Comparison:
    """Compare the masks of two runs, and their scores where there is a truth.

    Args:
        run: Folder of a run, as `medray infer` writes it: A.
        other: Folder of another of the same classes: B.
        out: Folder of the comparison; made if needed.
        truth: Dataset, or folder of annotations named like the slides.

    Raises:
        ConfigError: One is no finished run, their classes differ, or nothing has a
            truth.
    """
    run, other, out = (files.absolute(place) for place in (run, other, out))
    settings = (read_run(run), read_run(other))
    classes = settings[0].classes
    masks = diff(run, other)
    failed = dict(masks.not_compared)
    counts: list[Counts] = []
    slides: list[str] = []
    if truth is not None:
        folders = files.join(out, "a"), files.join(out, "b")
        for place, folder in zip((run, other), folders, strict=True):
            failed |= evaluate(place, truth=truth, out=folder).failed | failed
        slides, counts = _paired(*map(read_counts, folders))
    scores = difference(*counts) if slides else {}
    rows = _rows(settings, masks, run, slides, counts)
    by_loss = [row for row in rows if row.get("difference")]
    found = Comparison(
        out,
        files.join(out, "compare.html"),
        masks.compared,
        len(masks.changed),
        len(slides),
        scores.get("f1"),
        scores.get("other_f1"),
        scores.get("difference"),
        scores.get("interval"),
        scores.get("p_value"),
        [row["slide"] for row in by_loss if row["difference"] < 0],
        [row["slide"] for row in by_loss[::-1] if row["difference"] > 0],
        failed,
    )
    shown = _worth_seeing(rows, bool(slides))
    pictures = _pictures(shown, (run, other), truth, classes)
    page = render(
        "compare.html.jinja",
        title=f"{_name(run)} and {_name(other)}",
        runs=(run, other),
        found=found,
        verdict=_verdict(found),
        settings=_changed_settings(*settings),
        agreement=masks.agreement,
        classes=classes,
        per_class=[class_scores(c.sum(axis=0), classes.names) for c in counts],
        rows=rows[:_MAX_ROWS],
        left_out=max(0, len(rows) - _MAX_ROWS),
        pictures=[
            (row, pictures[row["slide"]]) for row in shown if pictures[row["slide"]]
        ],
        legend=CHANGE if slides else {},
        figure=_figure(rows) if slides else "",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    _write_table(rows, files.join(out, "slides.csv"))
    files.write_bytes(files.join(out, "compare.html"), page.encode())
    # Last: a folder with compare.json is a whole comparison.
    files.write_json(files.join(out, "compare.json"), asdict(found))
    return found


# --- score ----------------------------------------------------------------------------


def _paired(
    before: Mapping[str, Counts | None], after: Mapping[str, Counts | None]
) -> tuple[list[str], list[Counts]]:
    """Give the slides that both counted, and their counts: (N, C, C) of each run."""
    slides = []
    pairs = []
    for slide, ours in sorted(before.items()):
        theirs = after.get(slide)
        if ours is not None and theirs is not None:
            slides.append(slide)
            pairs.append((ours, theirs))
    if not pairs:
        return [], []
    return slides, [*np.array(pairs, np.int64).swapaxes(0, 1)]


def _rows(
    settings: Sequence[RunSettings],
    masks: Difference,
    run: str,
    slides: Sequence[str],
    counts: Sequence[Counts],
) -> list[Row]:
    """Give a row a slide: the largest loss first, or else the largest change."""
    names = settings[0].classes.names
    table = files.read_table(files.join(run, "slides.parquet")).to_pylist()
    done = {row["slide"]: row for row in table if row["status"] == "done"}
    scores = {
        slide: [summary(side[k], names)["f1"] for side in counts]
        for k, slide in enumerate(slides)
    }
    rows = []
    for slide in sorted(done.keys() - masks.not_compared.keys()):
        pixels = done[slide]["height"] * done[slide]["width"]
        changed = sum(count for _, count in masks.changed.get(slide, []))
        ours, theirs = scores.get(slide, (None, None))
        moved = None if ours is None or theirs is None else theirs - ours
        rows.append(
            {
                "slide": slide,
                "f1": ours,
                "other_f1": theirs,
                "difference": moved,
                "changed_px": changed,
                "changed": changed / pixels,
            }
        )
    rows.sort(
        key=lambda row: (
            row["difference"] is None,
            row["difference"] or 0.0,
            -row["changed"],
            row["slide"],
        )
    )
    return rows


def _verdict(found: Comparison) -> str:
    """Say in a sentence what the figures mean."""
    if not found.scored:
        same = found.compared - found.changed
        return (
            f"{found.changed} of {found.compared} masks differ, {same} are the same "
            f"to the last pixel. Without a truth nobody can say which is better."
        )
    if found.difference is None:
        return "There was nothing to find, and nothing was found: no score to compare."
    if found.interval is None:
        return "One slide alone cannot tell a difference from chance."
    low, high = found.interval
    if low > 0:
        return "B is better than A, by more than these slides would vary by chance."
    if high < 0:
        return "B is worse than A, by more than these slides would vary by chance."
    if low == high == 0:
        return "A and B score the same on every one of these slides."
    return "These slides are too few, or too unlike, to tell A and B apart."


def _changed_settings(before: RunSettings, after: RunSettings) -> list[Row]:
    """Give what was set otherwise: key, and its value in A and in B."""
    flat = [_flat(to_dict(settings)) for settings in (before, after)]
    keys = [*flat[0], *(key for key in flat[1] if key not in flat[0])]
    return [
        {"key": key, "a": values[0], "b": values[1]}
        for key in keys
        if (values := [side.get(key, "-") for side in flat])[0] != values[1]
    ]


def _flat(values: Mapping[str, Any], before: str = "") -> Row:
    found: Row = {}
    for key, value in values.items():
        name = f"{before}{key}"
        found |= _flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


# --- show -----------------------------------------------------------------------------


def _worth_seeing(rows: Sequence[Row], scored: bool) -> list[Row]:
    if scored:
        return [row for row in rows if (row["difference"] or 0.0) < 0][:_SHOWN]
    most = sorted(rows, key=lambda row: (-row["changed"], row["slide"]))
    return [row for row in most if row["changed_px"]][:_SHOWN]


def _pictures(
    rows: Sequence[Row], runs: tuple[str, str], truth: str | None, classes: Classes
) -> dict[str, str]:
    """Draw slides; one that cannot be drawn has none, with a warning."""
    wanted = {row["slide"] for row in rows}
    table = files.read_table(files.join(runs[0], "slides.parquet")).to_pylist()
    if truth is not None and wanted:
        table = match_ground_truth(table, files.absolute(truth), classes)
    done = [row for row in table if row["slide"] in wanted]
    found = dict.fromkeys(wanted, "")
    for row in done:
        try:
            found[row["slide"]] = data_uri(_picture(row, runs, truth, classes))
        except (MedrayError, OSError) as error:
            log.warning("no picture of slide %s: %s", row["slide"], error)
    return found


def _picture(
    row: Row, runs: tuple[str, str], truth: str | None, classes: Classes
) -> bytes:
    """Draw a slide with both masks at a coarse level."""
    shapes = ome_zarr.level_shapes(row["height"], row["width"])
    level = next(k for k, shape in enumerate(shapes) if max(shape) <= 2 * _OVERLAY_PX)
    before, after = (
        np.asarray(ome_zarr.open_level(mask_uri(run, row["slide"]), level)[:])
        for run in runs
    )
    height, width = before.shape
    with open_row(row) as slide:
        thumbnail, _, _ = read_thumbnail(slide, 2 * _OVERLAY_PX)
    size = (width, height)
    rgb = np.asarray(Image.fromarray(thumbnail).resize(size, Image.Resampling.BOX))
    if truth is None:
        return draw_overlay(rgb, before, after, classes, ("A", "B", "what differs"))
    whole = Rectangle(0, 0, height, width)
    true = read_truth(row, whole, classes, 2**level)
    known = read_known(row, whole, classes, 2**level)
    if known is not None:
        before, after = (np.where(known, mask, true) for mask in (before, after))
    return draw_change(rgb, true, before, after)


def _figure(rows: Sequence[Row]) -> Markup:
    """Draw a dot a slide: its F1 in A and in B."""
    pairs = [(r["f1"], r["other_f1"]) for r in rows if r["difference"] is not None]
    figure = Figure(figsize=(4.4, 4.2), layout="constrained")
    axes = figure.subplots()
    least = max(0.0, min((min(pair) for pair in pairs), default=0.0) - 0.05)
    axes.plot([least, 1], [least, 1], color=SOFT, linewidth=1)
    axes.scatter(
        [ours for ours, _ in pairs],
        [theirs for _, theirs in pairs],
        s=24 if len(pairs) <= 300 else 6,
        alpha=0.55,
        color=ACCENT,
        linewidths=0,
        zorder=3,
        rasterized=len(pairs) > 300,
    )
    axes.set_xlim(least, 1.01)
    axes.set_ylim(least, 1.01)
    axes.set_aspect("equal")
    finish_axes(axes, "F1 in A", "F1 in B")
    return as_svg(figure)


# --- report ---------------------------------------------------------------------------


def _name(run: str) -> str:
    return run.rsplit("/", 1)[-1]


def _write_table(rows: Sequence[Row], uri: str) -> None:
    schema = pa.schema(
        [
            ("slide", pa.string()),
            ("f1", pa.float64()),
            ("other_f1", pa.float64()),
            ("difference", pa.float64()),
            ("changed_px", pa.int64()),
            ("changed", pa.float64()),
        ]
    )
    csv = io.BytesIO()
    pyarrow.csv.write_csv(pa.Table.from_pylist([*rows], schema), csv)
    files.write_bytes(uri, csv.getvalue())
