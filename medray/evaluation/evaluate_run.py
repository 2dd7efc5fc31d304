"""A run and the truth -> counts, scores and a report.

The way of a mask, top to bottom:

    match    each finished slide of the run with its annotation or dataset labels
    count    a region of the mask against the same region of the truth: (C, C) counts,
             histograms of the probabilities, where it is wrong or uncertain
    show     overlays of the worst and best slides, and of such fields of view
    report   metrics.json, per_slide.parquet and .csv, report.html
"""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

from medray.datasets import (
    PATIENT,
    Joined,
    Unknown,
    join_table,
    names_of_slides,
    read_cohorts,
)
from medray.errors import ConfigError
from medray.evaluation.count import Counted, count_slides
from medray.evaluation.html import check_folder
from medray.evaluation.metrics import f1_line
from medray.evaluation.pictures import draw_fields, draw_slides
from medray.evaluation.report import slides_to_show, write_report
from medray.evaluation.seen import (
    SeenSlides,
    describe_slides,
    find_seen,
    rows_of_truth,
)
from medray.evaluation.slide_metrics import SlideReport
from medray.evaluation.truth_files import match_ground_truth
from medray.execution import settle_executor
from medray.inference import against_plan, read_run
from medray.slides import SlideFile, slide_fingerprint
from medray.storage import files, named_digest
from medray.types import Executor, Row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        out: Folder of the report.
        report: The page to open.
        f1: Pooled F1, macro over the foreground classes; None: there was none.
        interval: Its 95 % bootstrap interval, over patients where they are said, else
            over slides.
        evaluated: Slides that were counted.
        failed: Reason of each slide that could not be, by slide.
        seen: Slides that the model has seen: `train`, those that it was trained on,
            and `val`, those that chose its epoch; None: not recorded.
        unseen_f1: F1 of the other slides; None if there are no others, or none is seen.
    """

    out: str
    report: str
    f1: float | None
    interval: list[float] | None
    evaluated: int
    failed: dict[str, str]
    seen: SeenSlides | None = None
    unseen_f1: float | None = None

    def __str__(self) -> str:
        seen = ""
        if self.seen is not None and str(self.seen):
            others = "none" if self.unseen_f1 is None else f"{self.unseen_f1:.4f}"
            seen = f"seen    {self.seen}; F1 of the others {others}\n"
        return (
            f"{f1_line(self.f1, self.interval)}\n"
            f"{seen}"
            f"report  {self.report}\n"
            f"out     {self.out}\n"
            f"{self.evaluated} slides evaluated, {len(self.failed)} failed"
        )


def evaluate(
    run: str,
    *,
    truth: str,
    out: str,
    split: str | None = None,
    slides: Collection[str] | None = None,
    cohorts: str | None = None,
    ignore_unknown: bool = False,
    executor: Executor = "auto",
) -> Evaluation:
    """Compare the masks of a run with the truth, and write a report.

    Of a run with `--probabilities` the report has curves of precision over recall and
    of calibration, of one with `--quality` the most uncertain fields of view.

    Args:
        run: Folder of a run, as `medray infer` writes it.
        truth: Dataset, or folder of annotations named like the slides.
        out: Folder of the report; made if needed.
        split: With a dataset, only its slides of this split. train, val or test.
        slides: Only these of the run, by their ids.
        cohorts: CSV (slide,scanner,site,...): also scores of each value of each column.
            With a column `patient` intervals are found by resampling patients instead
            of slides. A blank cell is a value that is not known.
        ignore_unknown: Leave out rows of a table that name no slide. Without it they
            are refused.
        executor: On the Ray of RAY_ADDRESS, in processes here, or in this one (local).
            `auto`: Ray, but processes where no cluster is named and the files are few.

    Raises:
        ConfigError: The request is wrong, nothing in RUN has a truth, or OUT holds
            another kind of report.

    Examples:
        >>> evaluation = medray.evaluate(
        ...     "run", truth="annotations", out="report", executor="local"
        ... )
        >>> evaluation.evaluated, evaluation.failed
        (4, {})
    """
    run, truth, out = (files.absolute(place) for place in (run, truth, out))
    check_folder(out, "per_slide.parquet")
    settings = read_run(run)
    table = files.join(run, "slides.parquet")
    if not files.exists(table):
        raise ConfigError(f"{table} is missing; run `medray infer` to its end")
    rows: list[Row] = files.read_table(table).to_pylist()
    known = _join_cohorts(cohorts, rows, ignore_unknown) if cohorts else None
    matched = match_ground_truth(rows, truth, settings.classes, split)
    if slides is not None:
        rows = [row for row in rows if row["slide"] in slides]
        matched = [row for row in matched if row["slide"] in slides]
        if not matched:
            raise ConfigError(
                f"{truth}: none of the {len(slides)} slides asked for has a truth there"
            )
    dataset = rows_of_truth(matched, truth)
    seen = find_seen(matched, run, dataset)
    if seen is not None and str(seen):
        log.warning("%s; scores of them say little of new slides", seen)
    inputs = _digest(matched, settings.digest(), known, seen)
    if (before := _reported_before(out, inputs)) is not None:
        return before
    results = _failed_inference(rows, matched)
    done = [row for row in matched if row["status"] == "done"]
    executor = settle_executor(executor, [row["uri"] for row in done])
    counted = Counted([], None, {})
    if done:
        counted = count_slides(done, run, settings, executor)
        results += counted.slides
    shown = slides_to_show(results)
    overlays = draw_slides(
        [row for row in done if row["slide"] in shown], run, settings.classes, executor
    )
    results = [replace(r, overlay=overlays.get(r.slide)) for r in results]
    fields = {
        heading: draw_fields(worst, done, run, settings.classes, executor)
        for heading, worst in counted.fields.items()
    }
    values = known.values_of(row["slide"] for row in matched) if known else {}
    ids = [result.slide for result in results if result.status == "done"]
    about = describe_slides(ids, dataset, values.get(PATIENT, {}))
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    prediction = settings.options.prediction
    metrics = write_report(
        out,
        title=f"Evaluation of {run.rsplit('/', 1)[-1]}",
        classes=settings.classes,
        slides=sorted(results, key=lambda result: result.slide),
        levels=counted.levels,
        fields=fields,
        cohorts=values,
        notes=[str(known)] if known else [],
        about=about,
        seen=seen,
        provenance={
            "run": run.rsplit("/", 1)[-1],
            "run digest": settings.digest(),
            "model": settings.names,
            "model digest": settings.model_digest,
            "truth": truth.rsplit("/", 1)[-1],
            "slides": about,
            "inputs": inputs,
            "precision": prediction.precision,
            "window": f"{settings.windows.size} px, every {settings.windows.stride}",
            "stitching": prediction.stitch,
            "resolution": f"{settings.model_mpp or 'level 0'} um per pixel",
        }
        | ({"compiled": "yes"} if prediction.compile == "on" else {})
        | against_plan(run, rows)
        | {f"version of {name}": v for name, v in settings.versions.items()},
        date=date,
        truth=truth,
    )
    failed = {r.slide: r.message for r in results if r.status != "done"}
    return _evaluation(out, metrics, failed)


def _evaluation(out: str, metrics: Row, failed: dict[str, str]) -> Evaluation:
    """Return the result of an evaluation by its metrics.json."""
    seen, unseen = metrics["seen_slides"], metrics["unseen"]
    return Evaluation(
        out=out,
        report=files.join(out, "report.html"),
        f1=metrics["f1"],
        interval=metrics["interval"]["f1"] if metrics["interval"] else None,
        evaluated=metrics["slides"]["evaluated"],
        failed=failed,
        seen=SeenSlides(**seen) if seen is not None else None,
        unseen_f1=unseen["f1"] if unseen is not None else None,
    )


def evaluated_slides(out: str) -> set[str]:
    """Return the slides of a report that `evaluate` wrote; none if there is none."""
    uri = files.join(out, "per_slide.parquet")
    if not files.exists(uri):
        return set()
    return set(files.read_table(uri)["slide"].to_pylist())


def _join_cohorts(uri: str, rows: list[Row], ignore_unknown: bool) -> Joined:
    """Join a table of cohorts to all slides of a run, before anything is counted."""
    slides = [SlideFile(row["slide"], row["uri"]) for row in rows]
    unknown: Unknown = "ignore" if ignore_unknown else "refuse"
    return join_table(read_cohorts(uri), names_of_slides(slides), unknown=unknown)


def _digest(
    matched: list[Row],
    run_digest: str,
    cohorts: Joined | None,
    seen: SeenSlides | None,
) -> str:
    """Name what an evaluation depends on."""
    groups = {}
    if cohorts:
        groups = {name: cohorts.column(name) for name in cohorts.table.columns}
    parts = [run_digest, *([json.dumps(groups, sort_keys=True)] if groups else [])]
    parts.append(f"seen {seen}" if seen is None else json.dumps(asdict(seen)))
    for row in matched:
        parts += [row["slide"], str(row["digest"]), row["status"], row["truth"]]
        labels = row["kind"] == "labels"
        uri = files.join(row["truth"], "zarr.json") if labels else row["truth"]
        parts.append(slide_fingerprint(uri))
    return named_digest(json.dumps(sorted(parts)).encode())


def _reported_before(out: str, inputs: str) -> Evaluation | None:
    uri = files.join(out, "metrics.json")
    if not files.exists(uri):
        return None
    metrics = files.read_json(uri)
    if metrics["provenance"].get("inputs") != inputs:
        return None
    table = files.read_table(files.join(out, "per_slide.parquet")).to_pylist()
    failed = {r["slide"]: r["message"] for r in table if r["status"] != "done"}
    return _evaluation(out, metrics, failed)


def _failed_inference(rows: list[Row], matched: list[Row]) -> list[SlideReport]:
    wanted = {row["slide"] for row in matched}
    return [
        SlideReport(row["slide"], "failed", f"inference: {row['message']}", None, None)
        for row in rows
        if row["slide"] in wanted and row["status"] != "done"
    ]
