"""A run and the truth -> counts, scores and a report.

The way of a mask, top to bottom:

    match    each finished slide of the run with its annotation or dataset labels
    count    a region of the mask against the same region of the truth: (C, C) counts
    show     overlays of the worst and best slides
    report   metrics.json, per_slide.parquet and .csv, report.html
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
from PIL import Image

from medray import cluster
from medray.classes import Classes
from medray.errors import ConfigError, MedrayError
from medray.grid import Rectangle, plan_regions
from medray.metrics import confusion
from medray.progress import Progress
from medray.report import SlideReport, draw_overlay, slides_to_show, write_report
from medray.run import against_plan, mask_uri, read_run
from medray.slides import open_slide, read_thumbnail
from medray.slides.digest import slide_stamp
from medray.store import files, omezarr
from medray.truths import find_truths, name_in, read_known, read_truth

log = logging.getLogger(__name__)
Row = dict[str, Any]

_OVERLAY_PX = 600


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        out: Folder of the report.
        report: The page to open.
        f1: Pooled F1, macro over the foreground classes; None: there was none.
        interval: Its 95 % bootstrap interval over slides.
        evaluated: Slides that were counted.
        failed: Reason of each slide that could not be, by slide.
    """

    out: str
    report: str
    f1: float | None
    interval: list[float] | None
    evaluated: int
    failed: dict[str, str]


def evaluate(
    run: str,
    *,
    truth: str,
    out: str,
    split: str | None = None,
    slides: Collection[str] | None = None,
) -> Evaluation:
    """Compare the masks of a run with the truth, and write a report.

    Args:
        run: Folder of a run, as `medray infer` writes it.
        truth: Dataset, or folder of annotations named like the slides.
        out: Folder of the report; made if needed.
        split: With a dataset: only its slides of this split (train, val or test).
        slides: Only these of the run, by their ids.

    Raises:
        ConfigError: The request is wrong, or nothing in RUN has a truth.
    """
    run, truth, out = (files.absolute(place) for place in (run, truth, out))
    settings = read_run(run)
    table = files.join(run, "slides.parquet")
    if not files.exists(table):
        raise ConfigError(f"{table} is missing; run `medray infer` to its end")
    rows: list[Row] = files.read_table(table).to_pylist()
    if slides is not None:
        rows = [row for row in rows if row["slide"] in slides]
    matched = match_truths(rows, truth, settings.classes, split)
    inputs = _digest(matched, settings.digest())
    report = files.join(out, "report.html")
    if (before := _reported_before(out, inputs)) is not None:
        return before
    results = _failed_inference(rows, matched)
    done = [row for row in matched if row["status"] == "done"]
    if done:
        cluster.connect()
        results += _count(done, run, settings.classes)
    shown = set(slides_to_show(results))
    overlays = _draw([r for r in done if r["slide"] in shown], run, settings.classes)
    results = [_with_overlay(r, overlays.get(r.slide)) for r in results]
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    metrics = write_report(
        out,
        title=f"Evaluation of {run.rsplit('/', 1)[-1]}",
        classes=settings.classes,
        slides=sorted(results, key=lambda result: result.slide),
        provenance={
            "run": run.rsplit("/", 1)[-1],
            "run digest": settings.digest(),
            "model": settings.names,
            "model digest": settings.model_digest,
            "truth": truth.rsplit("/", 1)[-1],
            "inputs": inputs,
            "precision": settings.options.prediction.precision,
            "window": f"{settings.windows.size} px, every {settings.windows.stride}",
            "stitching": settings.options.prediction.stitch,
            "resolution": f"{settings.model_mpp or 'level 0'} um per pixel",
        }
        | against_plan(run, rows)
        | {f"version of {name}": v for name, v in settings.versions.items()},
        date=date,
        truth=truth,
    )
    failed = {r.slide: r.message for r in results if r.status != "done"}
    evaluated = sum(r.status == "done" for r in results)
    interval = metrics["interval"]["f1"] if metrics["interval"] else None
    return Evaluation(out, report, metrics["f1"], interval, evaluated, failed)


# --- match ----------------------------------------------------------------------------


def match_truths(
    rows: list[Row], truth: str, classes: Classes, split: str | None = None
) -> list[Row]:
    """Give the run's rows that have a truth, with `truth` and `kind` added.

    Args:
        rows: Of the run's slides.parquet.
        truth: Dataset, or folder of annotations named like the slides.
        classes: Of the run.
        split: With a dataset: only its slides of this split.

    Raises:
        ConfigError: The request is wrong, or no row has a truth.
    """
    places, kind = find_truths(truth, classes, split)
    matched = [
        row | {"truth": places[name], "kind": kind}
        for row in rows
        if (name := name_in(row["slide"], places))
    ]
    if not matched:
        raise ConfigError(
            f"none of the {len(rows)} slides of the run has a truth in {truth}; "
            f"expected files named like the slides, such as {rows[0]['slide']}.svg"
            if rows
            else "the run holds no slides"
        )
    if len(matched) < len(rows):
        log.warning("%d slides have no truth", len(rows) - len(matched))
    return matched


def with_truth(slides: Iterable[str], truth: str, classes: Classes) -> set[str]:
    """Tell which slides have a truth.

    Args:
        slides: Ids, as in a run.
        truth: Dataset, or folder of annotations named like the slides.
        classes: Of the model.

    Raises:
        ConfigError: The dataset has other classes.
    """
    places, _ = find_truths(truth, classes)
    return {slide for slide in slides if name_in(slide, places)}


def evaluated_slides(out: str) -> set[str]:
    """Give the slides of a report, as `evaluate` wrote it; none where there is none."""
    uri = files.join(out, "per_slide.parquet")
    if not files.exists(uri):
        return set()
    return set(files.read_table(uri)["slide"].to_pylist())


def _digest(matched: list[Row], run_digest: str) -> str:
    """Name what an evaluation depends on."""
    parts = [run_digest]
    for row in matched:
        parts += [row["slide"], str(row["digest"]), row["status"], row["truth"]]
        labels = row["kind"] == "labels"
        uri = files.join(row["truth"], "zarr.json") if labels else row["truth"]
        parts.append(slide_stamp(uri))
    text = json.dumps(sorted(parts))
    return f"blake2b:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def _reported_before(out: str, inputs: str) -> Evaluation | None:
    uri = files.join(out, "metrics.json")
    if not files.exists(uri):
        return None
    metrics = files.read_json(uri)
    if metrics["provenance"].get("inputs") != inputs:
        return None
    table = files.read_table(files.join(out, "per_slide.parquet")).to_pylist()
    failed = {r["slide"]: r["message"] for r in table if r["status"] != "done"}
    interval = metrics["interval"]["f1"] if metrics["interval"] else None
    report = files.join(out, "report.html")
    evaluated = metrics["slides"]["evaluated"]
    return Evaluation(out, report, metrics["f1"], interval, evaluated, failed)


def _failed_inference(rows: list[Row], matched: list[Row]) -> list[SlideReport]:
    wanted = {row["slide"] for row in matched}
    return [
        SlideReport(row["slide"], "failed", f"inference: {row['message']}", None, None)
        for row in rows
        if row["slide"] in wanted and row["status"] != "done"
    ]


# --- count ----------------------------------------------------------------------------


def _count(done: list[Row], run: str, classes: Classes) -> list[SlideReport]:
    """Count every region of every slide; a slide that fails becomes a row with why."""
    size = 2 * omezarr.REGION
    rows: list[Row] = [
        {"row": json.dumps(row), "region": [r.y, r.x, r.height, r.width]}
        for row in done
        for r in plan_regions(row["height"], row["width"], size)
    ]
    zero = np.zeros((len(classes), len(classes)), np.int64)
    counts = {row["slide"]: zero.copy() for row in done}
    left = {row["slide"]: 0 for row in done}
    for item in rows:
        left[json.loads(item["row"])["slide"]] += 1
    errors: dict[str, str] = {}
    with Progress("evaluate", len(done)) as progress:
        for result in _counted(rows, run, classes):
            slide = result["slide"]
            if "error" in result:
                errors.setdefault(slide, result["error"])
            else:
                counts[slide] += np.asarray(result["counts"])
            progress.region(result["pixels"])
            left[slide] -= 1
            if not left[slide]:
                error = errors.get(slide)
                progress.slide(slide, f"failed: {error}" if error else "done")
    return [
        SlideReport(slide, "failed", errors[slide], None, None)
        if slide in errors
        else SlideReport(slide, "done", "", counts[slide], None)
        for slide in counts
    ]


def _counted(rows: list[Row], run: str, classes: Classes) -> Iterator[Row]:
    with cluster.streaming(block_bytes=1 << 20):
        counted = ray.data.from_items(
            rows, override_num_blocks=min(len(rows), 1000)
        ).map_batches(
            _count_region,
            batch_size=1,
            num_cpus=1,
            fn_kwargs={"run": run, "classes": classes},
        )
        for item in counted.iter_rows():
            yield json.loads(item["json"])


def _count_region(batch: Row, *, run: str, classes: Classes) -> Row:
    row = json.loads(batch["row"][0])
    region = Rectangle(*map(int, batch["region"][0]))
    result: Row = {"slide": row["slide"], "pixels": region.height * region.width}
    try:
        mask = omezarr.open_level(mask_uri(run, row["slide"]))
        predicted = np.asarray(mask[region.slices()])
        truth = read_truth(row, region, classes)
        known = read_known(row, region, classes)
        if known is not None:
            truth, predicted = truth[known], predicted[known]
        result["counts"] = confusion(truth, predicted, len(classes)).tolist()
    except (MedrayError, OSError, ValueError) as error:
        result["error"] = f"{error}"
    return {"json": [json.dumps(result)]}


# --- show -----------------------------------------------------------------------------


def _draw(rows: list[Row], run: str, classes: Classes) -> dict[str, bytes]:
    """Draw overlays in Ray tasks; one that fails is left out, with a warning."""
    draw = ray.remote(_overlay)
    pending = {row["slide"]: draw.remote(row, run, classes) for row in rows}
    overlays = {}
    for slide, reference in pending.items():
        try:
            overlays[slide] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            log.warning("no overlay of slide %s: %s", slide, error.cause)
    return overlays


def _overlay(row: Row, run: str, classes: Classes) -> bytes:
    """Draw a slide with truth and prediction at a coarse level."""
    shapes = omezarr.level_shapes(row["height"], row["width"])
    fitting = [k for k, shape in enumerate(shapes) if max(shape) <= 2 * _OVERLAY_PX]
    level = fitting[0]
    predicted = np.asarray(omezarr.open_level(mask_uri(run, row["slide"]), level)[:])
    height, width = predicted.shape
    whole = Rectangle(0, 0, height, width)
    truth = read_truth(row, whole, classes, 2**level)
    known = read_known(row, whole, classes, 2**level)
    if known is not None:
        predicted = np.where(known, predicted, truth)
    with open_slide(row["uri"]) as slide:
        thumbnail, _, _ = read_thumbnail(slide, 2 * _OVERLAY_PX)
    picture = Image.fromarray(thumbnail).resize((width, height), Image.Resampling.BOX)
    return draw_overlay(np.asarray(picture), truth, predicted, classes)


def _with_overlay(result: SlideReport, overlay: bytes | None) -> SlideReport:
    return SlideReport(
        result.slide, result.status, result.message, result.counts, overlay
    )
