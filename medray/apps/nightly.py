"""A night: what is new in an inbox becomes masks, a report and a summary.

The way of a file, top to bottom:

    look     what is new or touched since the last night, and no longer being written
    plan     by digest: new content, copies, replacements, what is to be tried again
    infer    the night's run; with annotations an evaluation
    measure  scanner and staining of each finished slide
    commit   the catalog, then the night's summary

OUT/
catalog.parquet             a row a content, of everything ever seen
                            (medray.apps.catalog)
reference.json              staining of the slides that were trained on
nights/YYYY-MM-DD/night.json    the plan; with it a night has begun
                  run/          what `medray infer` makes
                  report/       what `medray evaluate` makes
                  summary.html
                  summary.json  with it the night is committed
lock.json                   who works here, while somebody does

A night that was killed is finished first, by its plan, when the command runs again.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field

import ray

from medray.apps.catalog import (
    Catalog,
    Found,
    Outcome,
    note_files,
    note_outcomes,
    read_catalog,
    values_of,
    write_catalog,
)
from medray.apps.drift import (
    NIGHTS,
    Drift,
    SlideValues,
    as_text,
    class_shares,
    run_values,
    stain_values,
)
from medray.apps.drift import watch as watch_drift
from medray.apps.inbox import Watch, plan_night
from medray.apps.summary import check_webhook, send_summary, write_summary
from medray.datasets.dataset import read_dataset, slide_uri
from medray.errors import ConfigError, FormatError, MedrayError, SlideError
from medray.evaluation.evaluate import evaluate, evaluated_slides
from medray.evaluation.ground_truth import with_truth
from medray.execution import cluster
from medray.inference.infer import infer, settings_of
from medray.inference.run import Options, RunSettings, mask_uri
from medray.slides.discovery import SlideFile, slide_id
from medray.slides.fingerprint import slide_digest
from medray.slides.scanner import UNKNOWN, scanner_of
from medray.storage import files
from medray.storage.lock import locked
from medray.types import Row

log = logging.getLogger(__name__)

_PATIENCE_S = 300.0  # a thumbnail may take


@dataclass(frozen=True)
class Night:
    """What a night did.

    Attributes:
        out: Where all nights are.
        night: Its date.
        summary: The page to open.
        done: Slides that got a mask.
        handed_on: Why slides failed that the next night tries again, by name.
        given_up: Why slides failed for the last time, by name.
        left_out: Why files were not looked at, by name: still being written, no access.
        copies: Files that hold what another file holds.
        replaced: Files that hold something else than before.
        flagged: What drifted, in words.
        committed_before: There was nothing to do: the night is committed.
        seconds: Wall time.
    """

    out: str
    night: str
    summary: str
    done: int = 0
    handed_on: dict[str, str] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    copies: int = 0
    replaced: int = 0
    flagged: list[str] = field(default_factory=list)
    committed_before: bool = False
    seconds: float = 0.0


def nightly(
    inbox: str,
    *,
    model: str | Sequence[str],
    out: str,
    truth: str | None = None,
    reference: str | None = None,
    webhook: str | None = None,
    settle: float = 60.0,
    night: str | None = None,
    tries: int = 3,
    options: Options | None = None,
) -> Night:
    """Predict what is new in an inbox, and say what came of it.

    The night is committed even if single slides fail: they are in its summary, and the
    next night tries them again. The same command again does nothing new.

    Args:
        inbox: Folder or address; searched in depth.
        model: Model folder, or several: an ensemble.
        out: Where all nights are; made if needed.
        truth: Dataset, or folder of annotations named like the slides.
        reference: Dataset that the model was trained on: the night's staining is set
            beside that of its training slides.
        webhook: http:// or https:// address that the summary is sent to as JSON; that
            it cannot be sent is only a warning.
        settle: Seconds between two looks at new files; a file that changed in between
            is left to the next night.
        night: Its date, YYYY-MM-DD; None: that of this night (`night_of`).
        tries: After so many nights a slide that fails is given up.
        options: How; by default the model's way.

    Raises:
        ConfigError: The request is wrong, or another process works there.
        StoreError: OUT cannot be written, or the slides' store does not answer.
        StoppedError: SIGTERM or Ctrl-C; what is complete is kept.
    """
    date = _date(night)
    models = (model,) if isinstance(model, str) else tuple(model)
    watch = Watch(
        inbox=files.absolute(inbox),
        out=files.absolute(out),
        models=tuple(files.absolute(one) for one in models),
        truth=files.absolute(truth) if truth else None,
        reference=files.absolute(reference) if reference else None,
        settle=settle,
        tries=tries,
        options=options or Options(),
    )
    if webhook:
        check_webhook(webhook)
    settings = settings_of(watch.models, watch.options)
    if watch.truth and not files.exists(watch.truth):
        raise ConfigError(f"{watch.truth}: expected a dataset or a folder of truth")
    if watch.reference:
        read_dataset(watch.reference)
    start = time.perf_counter()
    with locked(watch.out, "nightly") as check:
        last = _last_night(watch.out)
        if last and last > date:
            raise ConfigError(
                f"{watch.out}: its last night is {last}, {date} lies before it; "
                f"choose --night {last} or later"
            )
        if last and not _is_committed(watch.out, last):
            log.info("night %s was not finished; it is now", last)
            summary = _finish(watch, settings, last, check)
            send_summary(webhook, summary)
        elif last == date:
            log.info("night %s is committed; what is new is for the next", date)
            summary = files.read_json(_summary_uri(watch.out, date))
            return _result(watch.out, summary, start, committed_before=True)
        if last != date:
            plan = plan_night(watch, read_catalog(watch.out), date)
            check()
            files.write_json(files.join(_folder(watch.out, date), "night.json"), plan)
            summary = _finish(watch, settings, date, check)
            send_summary(webhook, summary)
    return _result(watch.out, summary, start)


def night_of(moment: datetime.datetime) -> str:
    """Return the date of a night: that of its evening, from noon to noon UTC.

    So a night that is taken up again after midnight is still the same.
    """
    utc = moment.astimezone(datetime.UTC)
    return (utc - datetime.timedelta(hours=12)).date().isoformat()


def _date(night: str | None) -> str:
    if night is None:
        return night_of(datetime.datetime.now(datetime.UTC))
    try:
        return datetime.datetime.strptime(night, "%Y-%m-%d").date().isoformat()
    except ValueError as error:
        raise ConfigError(f"night: expected YYYY-MM-DD, found {night!r}") from error


def _folder(out: str, night: str) -> str:
    return files.join(out, "nights", night)


def _summary_uri(out: str, night: str) -> str:
    return files.join(_folder(out, night), "summary.json")


def _is_committed(out: str, night: str) -> bool:
    return files.exists(_summary_uri(out, night))


def _last_night(out: str) -> str | None:
    """Return the last night that has begun."""
    for night in reversed(files.list_folder(files.join(out, "nights"))):
        if files.exists(files.join(_folder(out, night), "night.json")):
            return night
    return None


# --- infer, measure, commit -----------------------------------------------------------


def _finish(
    watch: Watch, settings: RunSettings, night: str, check: Callable[[], None]
) -> Row:
    """Do what the plan of a night says, and commit the night; give its summary."""
    folder = _folder(watch.out, night)
    plan = files.read_json(files.join(folder, "night.json"))
    run = files.join(folder, "run")
    rows: dict[str, Row] = {}
    evaluation = None
    if plan["slides"]:
        slides = [SlideFile(s["slide"], s["uri"]) for s in plan["slides"]]
        infer(slides, model=watch.models, out=run, options=watch.options)
        table = files.read_table(files.join(run, "slides.parquet"))
        rows = {row["slide"]: row for row in table.to_pylist()}
        if watch.truth:
            evaluation = _evaluated(run, watch.truth, files.join(folder, "report"))
    check()
    catalog = read_catalog(watch.out)
    late = _evaluated_late(watch, settings, catalog, night)
    found = [Found(**file) for file in plan["files"]]
    outcomes = _outcomes(plan, rows, settings, watch.out, catalog, found)
    training = _training(watch) if outcomes else []
    check()
    note_files(catalog, found, night)
    note_outcomes(catalog, outcomes.values(), night, watch.tries)
    write_catalog(watch.out, catalog)
    drift = _drift(catalog, outcomes, training, night)
    slides_said = [
        {
            "file": name,
            "slide": outcome.slide,
            "digest": outcome.digest,
            "scanner": outcome.scanner,
            "mask": outcome.mask,
            "values": dict(outcome.values),
            "retried": name in plan["retried"],
        }
        | {key: catalog[outcome.digest][key] for key in ("status", "reason", "tried")}
        for name, outcome in outcomes.items()
    ]
    summary = {
        "night": night,
        "inbox": watch.inbox,
        "in_inbox": plan["in_inbox"],
        "models": settings.names,
        "model_digest": settings.model_digest,
        "medray": importlib.metadata.version("medray"),
        "finished_at": datetime.datetime.now(datetime.UTC).isoformat(
            timespec="seconds"
        ),
        "slides": slides_said,
        "copies": plan["copies"],
        "replaced": plan["replaced"],
        "left_out": plan["left_out"],
        "evaluation": evaluation,
        "late": late,
        "drift": [asdict(one) for one in drift],
        "in_catalog": len(catalog),
    }
    write_summary(folder, summary)
    return summary


def _evaluated(
    run: str, truth: str, out: str, slides: Collection[str] | None = None
) -> Row:
    """Evaluate a night's run; why not, where that cannot be."""
    try:
        result = evaluate(run, truth=truth, out=out, slides=slides)
    except (ConfigError, FormatError, SlideError) as error:
        log.warning("no evaluation: %s", error)
        return {"message": f"{error}"}
    names = ("f1", "interval", "evaluated", "failed")
    return {name: getattr(result, name) for name in names}


def _evaluated_late(
    watch: Watch, settings: RunSettings, catalog: Catalog, night: str
) -> list[Row]:
    """Evaluate earlier nights of whose slides some have got a truth since."""
    if not watch.truth:
        return []
    # Written first: a night that is finished again evaluates, and tells of, the same.
    plan = files.join(_folder(watch.out, night), "late.json")
    if not files.exists(plan):
        try:
            late = _late(watch, watch.truth, settings, catalog, night)
        except (ConfigError, FormatError) as error:
            log.warning("no evaluation of earlier nights: %s", error)
            return []
        files.write_json(plan, late)
    found = []
    for earlier, slides in files.read_json(plan).items():
        folder = _folder(watch.out, earlier)
        out = files.join(folder, "report")
        wanted = evaluated_slides(out) | set(slides)
        result = _evaluated(files.join(folder, "run"), watch.truth, out, wanted)
        found.append({"night": earlier, "slides": slides} | result)
    return found


def _late(
    watch: Watch, truth: str, settings: RunSettings, catalog: Catalog, night: str
) -> dict[str, list[str]]:
    """Return by earlier night the slides that have a truth and are not in its report.

    What stands under its name no more is left out: the truth may be of its successor.
    """
    done: dict[str, set[str]] = {}
    slides: dict[str, SlideFile] = {}
    for row in catalog.values():
        names = zip(row["names"], row["fingerprints"], strict=True)
        standing = [
            name
            for name, fingerprint in names
            if fingerprint and slide_id(name) == row["slide"]
        ]
        if row["status"] == "done" and row["night"] < night and standing:
            done.setdefault(row["night"], set()).add(row["slide"])
            uri = files.join(files.absolute(watch.inbox), standing[0])
            slides[row["slide"]] = SlideFile(row["slide"], uri)
    missing = {
        earlier: done[earlier]
        - evaluated_slides(files.join(_folder(watch.out, earlier), "report"))
        for earlier in sorted(done)[-NIGHTS:]
    }
    # Looked for once: it may be a bucket with many.
    wanted = set().union(*missing.values())
    # All slides are matched, for what belongs to one is not free for another.
    known = with_truth(slides.values(), truth, settings.classes) & wanted
    return {
        earlier: sorted(ids & known) for earlier, ids in missing.items() if ids & known
    }


def _outcomes(
    plan: Row,
    rows: dict[str, Row],
    settings: RunSettings,
    out: str,
    catalog: Catalog,
    found: list[Found],
) -> dict[str, Outcome]:
    """Return what became of each file that was to be done, by its name.

    A file that was replaced after the plan was made is what it was when it was read:
    that is added to `found`.
    """
    done = [s for s in plan["slides"] if rows[s["slide"]]["status"] == "done"]
    measured = _measured(
        [s for s in done if not _is_noted(catalog, s, plan["night"])],
        settings.options.scene,
        settings.options.plane,
    )
    outcomes = {}
    for slide in plan["slides"]:
        name, row = slide["slide"], rows[slide["slide"]]
        if row["status"] != "done":
            why = row["message"] or "failed without a reason"
            outcomes[slide["file"]] = Outcome(slide["digest"], name, why)
            continue
        digest = _without_annotation(row["digest"])
        if digest != slide["digest"]:
            found.append(Found(slide["file"], "changed", digest))
        if name in measured:
            scanner, values = measured[name]
        else:
            before = catalog[slide["digest"]]
            scanner, values = before["scanner"], values_of(before)
        outcomes[slide["file"]] = Outcome(
            digest=digest,
            slide=name,
            mask=mask_uri(_folder(out, plan["night"]) + "/run", name)[len(out) + 1 :],
            model_digest=settings.model_digest,
            scanner=scanner,
            values=values | run_values(row, settings.classes.names),
        )
    return outcomes


def _without_annotation(digest: str) -> str:
    """Return what of a row's digest names the slide and what was said of it."""
    content, *others = digest.split("+")
    return "+".join([content, *(part for part in others if "=" in part)])


def _is_noted(catalog: Catalog, slide: Row, night: str) -> bool:
    """Tell whether the catalog has this slide of this night: it was written before."""
    row = catalog.get(slide["digest"])
    return row is not None and row["status"] == "done" and row["night"] == night


def _measured(
    slides: list[Row], scene: int | None = None, plane: int | None = None
) -> dict[str, tuple[str, dict[str, float]]]:
    """Return scanner and staining of slides, read in Ray tasks."""
    if not slides:
        return {}
    cluster.connect()
    measure = ray.remote(num_cpus=1, max_retries=1)(_measure)
    pending = {s["slide"]: measure.remote(s["uri"], scene, plane) for s in slides}
    measured = {}
    for slide, reference in pending.items():
        try:
            measured[slide] = ray.get(reference, timeout=_PATIENCE_S)
        except ray.exceptions.RayError as error:
            log.warning("%s: its staining cannot be measured (%s)", slide, error)
            ray.cancel(reference, force=True)
            measured[slide] = (UNKNOWN, {})
    return measured


def _measure(
    uri: str, scene: int | None, plane: int | None
) -> tuple[str, dict[str, float]]:
    try:
        return scanner_of(uri), stain_values(uri, scene, plane)
    except (MedrayError, OSError) as error:
        log.warning("%s: its staining cannot be measured (%s)", uri, error)
        return UNKNOWN, {}


def _training(watch: Watch) -> list[dict[str, float]]:
    """Return staining and classes of what was trained on; kept in OUT/reference.json.

    Raises:
        ConfigError: The reference is no dataset.
    """
    if watch.reference is None:
        return []
    table = files.join(watch.reference, "slides.parquet")
    kept = files.join(watch.out, "reference.json")
    digest = slide_digest(table)
    if files.exists(kept):
        before = files.read_json(kept)
        if before["slides"] == digest:
            return list(before["values"].values())
    slides = [
        {"slide": row["slide"], "uri": slide_uri(watch.reference, row["slide"])}
        for row in files.read_table(table).to_pylist()
        if row["status"] == "done" and row["split"] == "train"
    ]
    shares = class_shares(watch.reference)
    values = {
        slide: values | shares.get(slide, {})
        for slide, (_, values) in _measured(slides).items()
    }
    files.write_json(kept, {"slides": digest, "values": values})
    return list(values.values())


def _drift(
    catalog: Catalog,
    outcomes: dict[str, Outcome],
    training: list[dict[str, float]],
    night: str,
) -> list[Drift]:
    """Set what was done tonight beside the last nights, and the training slides."""
    before = [
        row
        for row in catalog.values()
        if row["status"] == "done" and row["night"] < night
    ]
    nights = sorted({row["night"] for row in before})[-NIGHTS:]
    tonight = [
        SlideValues(name, outcome.scanner, dict(outcome.values))
        for name, outcome in outcomes.items()
        if not outcome.reason
    ]
    last = [
        SlideValues(row["names"][0], row["scanner"], values_of(row))
        for row in before
        if row["night"] in nights
    ]
    # A model has seen all its training slides, whatever scanned them.
    trained = [
        SlideValues("", scanner, values)
        for scanner in {slide.scanner for slide in tonight}
        for values in training
    ]
    return watch_drift(tonight, last, against=f"the last {NIGHTS} nights") + (
        watch_drift(tonight, trained, against="the training slides")
    )


def _result(
    out: str, summary: Row, start: float, *, committed_before: bool = False
) -> Night:
    slides = summary["slides"]

    def reasons(status: str) -> dict[str, str]:
        return {s["file"]: s["reason"] for s in slides if s["status"] == status}

    flagged = [as_text(Drift(**one)) for one in summary["drift"] if one["flagged"]]
    return Night(
        out=out,
        night=summary["night"],
        summary=files.join(_folder(out, summary["night"]), "summary.html"),
        done=sum(slide["status"] == "done" for slide in slides),
        handed_on=reasons("failed"),
        given_up=reasons("given up"),
        left_out=summary["left_out"],
        copies=len(summary["copies"]),
        replaced=len(summary["replaced"]),
        flagged=flagged,
        committed_before=committed_before,
        seconds=time.perf_counter() - start,
    )
