"""A run and the truth -> counts, scores and a report.

The way of a mask, top to bottom:

    match    each finished slide of the run with its annotation or dataset labels
    count    a region of the mask against the same region of the truth: (C, C) counts,
             histograms of the probabilities, where it is wrong or uncertain
    show     overlays of the worst and best slides, and of such places
    report   metrics.json, per_slide.parquet and .csv, report.html
"""

from __future__ import annotations

import csv
import datetime
import hashlib
import heapq
import io
import json
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.data
from PIL import Image

from medray.classes import Classes
from medray.datasets.splits import read_groups
from medray.errors import ConfigError, MedrayError
from medray.evaluation.curves import count_levels
from medray.evaluation.ground_truth import (
    find_ground_truth,
    name_in,
    read_known,
    read_truth,
    truth_note,
)
from medray.evaluation.html import check_folder
from medray.evaluation.metrics import confusion
from medray.evaluation.report import (
    SlideReport,
    draw_overlay,
    slides_to_show,
    write_report,
)
from medray.execution import cluster
from medray.execution.progress import Progress
from medray.geometry import Rectangle, plan_regions
from medray.inference.run import (
    RunSettings,
    against_plan,
    layer_uri,
    mask_uri,
    probabilities_uri,
    read_run,
)
from medray.slides import open_row, read_thumbnail
from medray.slides.discovery import SlideFile
from medray.slides.fingerprint import slide_fingerprint
from medray.slides.resolution import read_working, working_of
from medray.storage import files, ome_zarr
from medray.types import Row

log = logging.getLogger(__name__)

_OVERLAY_PX = 600
_PLACE_PX = 1024
"""Side of a place that is shown, pixels of the mask."""
_PLACES, _PLACES_OF_ONE = 4, 2  # that are shown of a kind, and of them of one slide


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
    cohorts: str | None = None,
) -> Evaluation:
    """Compare the masks of a run with the truth, and write a report.

    Of a run with `--probabilities` the report has curves of precision over recall and
    of calibration, of one with `--quality` the most uncertain places.

    Args:
        run: Folder of a run, as `medray infer` writes it.
        truth: Dataset, or folder of annotations named like the slides.
        out: Folder of the report; made if needed.
        split: With a dataset: only its slides of this split (train, val or test).
        slides: Only these of the run, by their ids.
        cohorts: CSV with the column `slide` and others (scanner, stain, site, ...):
            scores for each value of each. With a column `patient` intervals are found
            by resampling patients instead of slides.

    Raises:
        ConfigError: The request is wrong, nothing in RUN has a truth, or OUT holds
            another kind of report.
    """
    run, truth, out = (files.absolute(place) for place in (run, truth, out))
    check_folder(out, "per_slide.parquet")
    settings = read_run(run)
    table = files.join(run, "slides.parquet")
    if not files.exists(table):
        raise ConfigError(f"{table} is missing; run `medray infer` to its end")
    rows: list[Row] = files.read_table(table).to_pylist()
    matched = match_ground_truth(rows, truth, settings.classes, split)
    if slides is not None:
        rows = [row for row in rows if row["slide"] in slides]
        matched = [row for row in matched if row["slide"] in slides]
        if not matched:
            raise ConfigError(
                f"{truth}: none of the {len(slides)} slides asked for has a truth there"
            )
    groups = read_cohorts(cohorts) if cohorts else {}
    inputs = _digest(matched, settings.digest(), groups)
    report = files.join(out, "report.html")
    if (before := _reported_before(out, inputs)) is not None:
        return before
    results = _failed_inference(rows, matched)
    done = [row for row in matched if row["status"] == "done"]
    counted = _Found()
    if done:
        cluster.connect()
        counted = _count(done, run, settings)
        results += counted.slides
    shown = set(slides_to_show(results))
    jobs = {r["slide"]: (r, run, settings.classes) for r in done if r["slide"] in shown}
    overlays = _draw(_overlay, jobs)
    results = [_with_overlay(r, overlays.get(r.slide)) for r in results]
    places = {
        heading: _show_places(best, done, run, settings.classes)
        for heading, best in counted.places.items()
    }
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    metrics = write_report(
        out,
        title=f"Evaluation of {run.rsplit('/', 1)[-1]}",
        classes=settings.classes,
        slides=sorted(results, key=lambda result: result.slide),
        levels=counted.levels,
        places=places,
        cohorts={
            column: {row["slide"]: _value_of(row["slide"], values) for row in matched}
            for column, values in groups.items()
        },
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


def match_ground_truth(
    rows: list[Row], truth: str, classes: Classes, split: str | None = None
) -> list[Row]:
    """Give the run's rows that have a truth, with `truth` and `kind` added.

    Args:
        rows: Of the run's slides.parquet, all of them: what belongs to one slide is
            not free for another.
        truth: Dataset, or folder of annotations named like the slides.
        classes: Of the run.
        split: With a dataset: only its slides of this split.

    Raises:
        ConfigError: The request is wrong, no row has a truth, or one truth could be
            that of several.
    """
    slides = [
        SlideFile(row["slide"], row["uri"], None, row.get("scene"), row.get("plane"))
        for row in rows
    ]
    places, kind = find_ground_truth(slides, truth, classes, split)
    matched = [
        row | {"truth": places[row["slide"]], "kind": kind}
        for row in rows
        if row["slide"] in places
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


def with_truth(slides: Iterable[SlideFile], truth: str, classes: Classes) -> set[str]:
    """Return the ids of the slides that have a truth.

    Args:
        slides: All that may have one, as in a run.
        truth: Dataset, or folder of annotations named like the slides.
        classes: Of the model.

    Raises:
        ConfigError: The dataset has other classes, or one truth could be that of
            several slides.
    """
    places, _ = find_ground_truth(list(slides), truth, classes)
    return set(places)


def evaluated_slides(out: str) -> set[str]:
    """Give the slides of a report, as `evaluate` wrote it; none where there is none."""
    uri = files.join(out, "per_slide.parquet")
    if not files.exists(uri):
        return set()
    return set(files.read_table(uri)["slide"].to_pylist())


def read_cohorts(uri: str) -> dict[str, dict[str, str]]:
    """Read a CSV (slide, and other columns): each column's values by slide.

    Raises:
        ConfigError: It cannot be read, has no other column, or says two things of one
            slide.
    """
    try:
        text = files.read_bytes(uri).decode("utf-8-sig")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri}: expected a CSV file ({error})") from error
    names = next(csv.reader(io.StringIO(text)), [])
    columns = [name for name in names if name and name != "slide"]
    if not columns:
        raise ConfigError(
            f"{uri}: expected the column slide and at least one other, such as "
            f"scanner, found {names}"
        )
    return {column: read_groups(uri, column) for column in columns}


def _value_of(slide: str, values: Mapping[str, str]) -> str:
    name = name_in(slide, values)
    return values[name] if name is not None else ""


def _digest(
    matched: list[Row], run_digest: str, groups: dict[str, dict[str, str]]
) -> str:
    """Name what an evaluation depends on."""
    parts = [run_digest, *([json.dumps(groups, sort_keys=True)] if groups else [])]
    for row in matched:
        parts += [row["slide"], str(row["digest"]), row["status"], row["truth"]]
        labels = row["kind"] == "labels"
        uri = files.join(row["truth"], "zarr.json") if labels else row["truth"]
        parts.append(slide_fingerprint(uri))
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


@dataclass(frozen=True)
class Place:
    """A square of a mask.

    Attributes:
        amount: What is summed up over its pixels.
        slide: Id.
        y: First row, pixels of the mask.
        x: First column.
    """

    amount: int
    slide: str
    y: int
    x: int


@dataclass
class _Found:
    """What the regions add up to.

    Attributes:
        slides: The result of each slide.
        levels: See `medray.evaluation.curves.count_levels`; None without probabilities.
        places: The worst of them, by the heading that they have in the report.
    """

    slides: list[SlideReport] = field(default_factory=list)
    levels: npt.NDArray[np.int64] | None = None
    places: dict[str, list[Place]] = field(default_factory=dict)


_WRONG, _UNCERTAIN = "Where most is wrong", "Where it is least certain"


def _count(done: list[Row], run: str, settings: RunSettings) -> _Found:
    """Count every region of every slide; a slide that fails becomes a row with why."""
    size = 2 * ome_zarr.REGION
    rows: list[Row] = [
        {"row": json.dumps(row), "region": [r.y, r.x, r.height, r.width]}
        for row in done
        for r in plan_regions(row["height"], row["width"], size)
    ]
    classes = len(settings.classes)
    zero = np.zeros((classes, classes), np.int64)
    counts = {row["slide"]: zero.copy() for row in done}
    readings = {row["slide"]: _reading(row) for row in done}
    left = {row["slide"]: 0 for row in done}
    for item in rows:
        left[json.loads(item["row"])["slide"]] += 1
    errors: dict[str, str] = {}
    notes: dict[str, str] = {}
    levels: Any = 0
    of_slides: dict[str, Any] = {}  # the levels of those under way
    best: dict[str, dict[str, list[Place]]] = {}
    with Progress("evaluate", len(done)) as progress:
        for result in _counted(rows, run, settings):
            slide = result["slide"]
            if "error" in result:
                errors.setdefault(slide, result["error"])
            else:
                counts[slide] += np.asarray(result["counts"])
                notes[slide] = result["note"]
                found = np.asarray(result.get("levels", 0))
                of_slides[slide] = of_slides.get(slide, 0) + found
                for heading, squares in result["places"].items():
                    of_slide = best.setdefault(heading, {}).setdefault(slide, [])
                    of_slide += [Place(n, slide, y, x) for n, y, x in squares]
                    of_slide[:] = _largest(of_slide, _PLACES_OF_ONE)
            progress.region(result["pixels"])
            left[slide] -= 1
            if not left[slide]:
                error = errors.get(slide)
                progress.slide(slide, f"failed: {error}" if error else "done")
                own = of_slides.pop(slide, 0)
                levels += 0 if error else own
    return _Found(
        [
            SlideReport(slide, "failed", errors[slide], None, None)
            if slide in errors
            else SlideReport(
                slide,
                "done",
                notes.get(slide, ""),
                counts[slide],
                None,
                readings[slide],
            )
            for slide in counts
        ],
        levels if np.ndim(levels) else None,
        {
            heading: _largest(
                (one for slide in of.keys() - errors.keys() for one in of[slide]),
                _PLACES,
            )
            for heading, of in sorted(best.items(), reverse=True)
        },
    )


def _reading(row: Row) -> str:
    """Say how a slide of a run was read."""
    said = row.get("note") or ""
    if row.get("mpp_x"):
        mpp = f"{row['mpp_x']:.4g} um per pixel ({row['mpp_from']})"
        said = f"{mpp}; {said}" if said else mpp
    return said


def _largest(places: Iterable[Place], count: int) -> list[Place]:
    """Give those of the largest amounts; equal ones by slide, row and column."""
    return heapq.nsmallest(
        count, places, key=lambda one: (-one.amount, one.slide, one.y, one.x)
    )


def _counted(rows: list[Row], run: str, settings: RunSettings) -> Iterator[Row]:
    with cluster.streaming(block_bytes=1 << 20):
        counted = ray.data.from_items(
            rows, override_num_blocks=min(len(rows), 1000)
        ).map_batches(
            _count_region,
            batch_size=1,
            num_cpus=1,
            fn_kwargs={"run": run, "settings": settings},
        )
        for item in counted.iter_rows():
            yield json.loads(item["json"])


def _count_region(batch: Row, *, run: str, settings: RunSettings) -> Row:
    row = json.loads(batch["row"][0])
    slide, classes = row["slide"], settings.classes
    region = Rectangle(*map(int, batch["region"][0]))
    result: Row = {"slide": slide, "pixels": region.height * region.width}
    try:
        predicted = ome_zarr.open_level(mask_uri(run, slide))[region.slices()]
        truth = read_truth(row, region, classes)
        known = read_known(row, region, classes)
        if known is None:
            known = np.ones(truth.shape, bool)
        true, found = truth[known], predicted[known]
        result["counts"] = confusion(true, found, len(classes)).tolist()
        if settings.options.prediction.probabilities:
            stored = ome_zarr.open_level(probabilities_uri(run, slide))
            shares = stored[(slice(None), *region.slices())][:, known]
            result["levels"] = count_levels(true, found, shares).tolist()
        result["note"] = truth_note(row, classes)
        wrong = known & (truth != predicted)
        result["places"] = {_WRONG: _places_in(wrong, region)}
        if "uncertainty" in settings.layers:
            layer = ome_zarr.open_level(layer_uri(run, slide, "uncertainty"))
            unsure = np.where(known, layer[region.slices()], np.uint8(0))
            result["places"][_UNCERTAIN] = _places_in(unsure, region)
    except (MedrayError, OSError, ValueError) as error:
        result["error"] = f"{error}"
    return {"json": [json.dumps(result)]}


def _places_in(values: npt.NDArray[Any], region: Rectangle) -> list[list[int]]:
    """Give sum, row and column of the squares of a region that have the most."""
    squares = [
        [int(values[part.slices()].sum()), region.y + part.y, region.x + part.x]
        for part in plan_regions(region.height, region.width, _PLACE_PX)
    ]
    squares.sort(key=lambda square: -square[0])
    return [square for square in squares[:_PLACES_OF_ONE] if square[0]]


# --- show -----------------------------------------------------------------------------


def _draw(
    function: Callable[..., bytes], jobs: Mapping[Any, tuple[Any, ...]]
) -> dict[Any, bytes]:
    """Draw pictures in Ray tasks; one that fails is left out, with a warning."""
    draw = ray.remote(function)
    pending = {name: draw.remote(*arguments) for name, arguments in jobs.items()}
    pictures = {}
    for name, reference in pending.items():
        try:
            pictures[name] = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            log.warning("no picture of %s: %s", name, error.cause)
    return pictures


def _overlay(row: Row, run: str, classes: Classes) -> bytes:
    """Draw a slide with truth and prediction at a coarse level."""
    shapes = ome_zarr.level_shapes(row["height"], row["width"])
    fitting = [k for k, shape in enumerate(shapes) if max(shape) <= 2 * _OVERLAY_PX]
    level = fitting[0]
    predicted = np.asarray(ome_zarr.open_level(mask_uri(run, row["slide"]), level)[:])
    height, width = predicted.shape
    whole = Rectangle(0, 0, height, width)
    truth = read_truth(row, whole, classes, 2**level)
    known = read_known(row, whole, classes, 2**level)
    if known is not None:
        predicted = np.where(known, predicted, truth)
    with open_row(row) as slide:
        thumbnail, _, _ = read_thumbnail(slide, 2 * _OVERLAY_PX)
    picture = Image.fromarray(thumbnail).resize((width, height), Image.Resampling.BOX)
    return draw_overlay(np.asarray(picture), truth, predicted, classes)


def _with_overlay(result: SlideReport, overlay: bytes | None) -> SlideReport:
    return replace(result, overlay=overlay)


def _show_places(
    best: list[Place], done: list[Row], run: str, classes: Classes
) -> list[tuple[str, bytes]]:
    """Give captions and pictures of places.

    Slides that are no larger than a place are shown whole already.
    """
    row_of = {
        row["slide"]: row
        for row in done
        if max(row["height"], row["width"]) > _PLACE_PX
    }
    jobs = {
        place: (row_of[place.slide], place, run, classes)
        for place in best
        if place.slide in row_of
    }
    return [
        (f"{place.slide}, pixels from {place.x} across and {place.y} down", picture)
        for place, picture in _draw(_close_up, jobs).items()
    ]


def _close_up(row: Row, place: Place, run: str, classes: Classes) -> bytes:
    """Draw a place with truth and prediction, at the mask's resolution."""
    height = min(_PLACE_PX, row["height"] - place.y)
    width = min(_PLACE_PX, row["width"] - place.x)
    part = Rectangle(place.y, place.x, height, width)
    predicted = ome_zarr.open_level(mask_uri(run, row["slide"]))[part.slices()]
    truth = read_truth(row, part, classes)
    known = read_known(row, part, classes)
    if known is not None:
        predicted = np.where(known, predicted, truth)
    with open_row(row) as slide:
        rgb, _, _ = read_working(slide, working_of(row), part.y, part.x, height, width)
    return draw_overlay(rgb, truth, predicted, classes)
