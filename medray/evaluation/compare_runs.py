"""Two runs -> which is better, whether that is chance, and where they differ.

diff      region by region, mask against mask
score     both against one truth, where there is one; the difference by bootstrap
show      the slides that lost most, or changed most
report    compare.json, slides.csv, compare.html; a/ and b/ are the two evaluations
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import pyarrow as pa

from medray.classes import Classes
from medray.errors import MedrayError
from medray.evaluation.diff_runs import changed_settings, diff, pair_counts, rows_of
from medray.evaluation.evaluate_run import evaluate
from medray.evaluation.figures import draw_pairs
from medray.evaluation.html import data_uri, render
from medray.evaluation.metrics import Counts, class_scores, difference
from medray.evaluation.overlay import CHANGE
from medray.evaluation.pictures import draw_runs
from medray.evaluation.report import read_counts
from medray.evaluation.truth_files import match_ground_truth
from medray.inference import read_run
from medray.storage import files
from medray.types import Row

log = logging.getLogger(__name__)

_SHOWN = 6  # slides with pictures
_MAX_ROWS = 500  # slides in the page's table; slides.csv has them all


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

    def __str__(self) -> str:
        lines = [f"cannot      {slide}: {why}" for slide, why in self.failed.items()]
        if self.difference is not None:
            span, p_value = "", ""
            if self.interval:
                span = f" [{self.interval[0]:+.4f}, {self.interval[1]:+.4f}]"
                p_value = f", p = {self.p_value:.3g}"
            lines += [
                f"F1          {self.f1:.4f} and {self.other_f1:.4f}",
                f"difference  {self.difference:+.4f}{span}{p_value}",
            ]
        lines += [f"worse       {slide}" for slide in self.worse[:10]]
        lines += [
            f"report      {self.report}",
            f"{self.compared} slides compared, {self.changed} differ, {self.scored} "
            f"have a truth: {len(self.better)} better, {len(self.worse)} worse; "
            f"{len(self.failed)} could not be compared",
        ]
        return "\n".join(lines)


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

    Examples:
        >>> from medray.evaluation import compare
        >>> compared = compare("run", "run", out="compared")
        >>> compared.compared, compared.changed
        (4, 0)
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
        slides, counts = pair_counts(*map(read_counts, folders))
    scores = difference(*counts) if slides else {}
    rows = rows_of(settings, masks, run, slides, counts)
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
        settings=changed_settings(*settings),
        agreement=masks.agreement,
        classes=classes,
        per_class=[class_scores(c.sum(axis=0), classes.names) for c in counts],
        rows=rows[:_MAX_ROWS],
        left_out=max(0, len(rows) - _MAX_ROWS),
        pictures=[
            (row, pictures[row["slide"]]) for row in shown if pictures[row["slide"]]
        ],
        legend=CHANGE if slides else {},
        figure=draw_pairs(rows) if slides else "",
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    _write_table(rows, files.join(out, "slides.csv"))
    files.write_bytes(files.join(out, "compare.html"), page.encode())
    # Last: a folder with compare.json is a whole comparison.
    files.write_json(files.join(out, "compare.json"), asdict(found))
    return found


# --- words ----------------------------------------------------------------------------


def _verdict(found: Comparison) -> str:
    """Return in a sentence what the figures mean."""
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
            found[row["slide"]] = data_uri(draw_runs(row, runs, truth, classes))
        except (MedrayError, OSError) as error:
            log.warning("no picture of slide %s: %s", row["slide"], error)
    return found


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
    files.write_csv(uri, pa.Table.from_pylist([*rows], schema))
