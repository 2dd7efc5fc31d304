"""Execute the plan of a night and commit it.

Check the quality of what is planned, infer and evaluate what passes, measure what is
finished, then write the catalog and last the summary.
"""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Callable
from dataclasses import asdict

from medray.apps.nightly.catalog import (
    Catalog,
    Found,
    Outcome,
    note_files,
    note_outcomes,
    read_catalog,
    read_found,
    values_of,
    write_catalog,
)
from medray.apps.nightly.drift import run_values
from medray.apps.nightly.evaluations import evaluate_late, evaluate_run
from medray.apps.nightly.folder import night_folder
from medray.apps.nightly.inbox import Watch
from medray.apps.nightly.measure import find_drift, measure_slides, training_values
from medray.apps.nightly.quality import Checked, check_quality
from medray.apps.nightly.summary import write_summary
from medray.inference import RunSettings, infer, mask_uri
from medray.slides import SlideFile, Verdict
from medray.storage import files
from medray.types import Row


def finish_night(
    watch: Watch, settings: RunSettings, night: str, check: Callable[[], None]
) -> Row:
    """Execute the plan of a night, commit the night and return its summary."""
    folder = night_folder(watch.out, night)
    plan = files.read_json(files.join(folder, "night.json"))
    quality = check_quality(watch, plan, check)
    passed = [s for s in plan["slides"] if not _reason(quality, s)]
    run = files.join(folder, "run")
    rows: dict[str, Row] = {}
    evaluation = None
    if passed:
        slides = [SlideFile(s["slide"], s["uri"]) for s in passed]
        infer(slides, model=watch.models, out=run, options=watch.options)
        table = files.read_table(files.join(run, "slides.parquet"))
        rows = {row["slide"]: row for row in table.to_pylist()}
        if watch.truth:
            evaluation = evaluate_run(run, watch.truth, files.join(folder, "report"))
    check()
    catalog = read_catalog(watch.out)
    late = evaluate_late(watch, settings, catalog, night)
    found = [read_found(file) for file in plan["files"]]
    outcomes = _outcomes(plan, quality, rows, settings, watch.out, catalog, found)
    training = training_values(watch) if outcomes else []
    check()
    note_files(catalog, found, night)
    note_outcomes(catalog, outcomes.values(), night, watch.tries)
    write_catalog(watch.out, catalog)
    drift = find_drift(catalog, outcomes, training, night)
    slides_said = [
        {
            "file": name,
            "slide": outcome.slide,
            "digest": outcome.digest,
            "scanner": outcome.scanner,
            "mask": outcome.mask,
            "values": dict(outcome.values),
            "flagged": _checked(quality, outcome.slide).verdict.flagged,
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


def _outcomes(
    plan: Row,
    quality: dict[str, Checked],
    rows: dict[str, Row],
    settings: RunSettings,
    out: str,
    catalog: Catalog,
    found: list[Found],
) -> dict[str, Outcome]:
    """Return the outcome of each file that was planned, by its name.

    A file that was replaced after the plan was made is what it was when it was read:
    that is added to `found`.
    """
    passed = [s for s in plan["slides"] if not _reason(quality, s)]
    done = [s for s in passed if rows[s["slide"]]["status"] == "done"]
    new = [s for s in done if not _is_noted(catalog, s, plan["night"])]
    measured = measure_slides(
        {s["slide"]: s["uri"] for s in new},
        settings.options.scene,
        settings.options.plane,
    )
    outcomes = {}
    for slide in plan["slides"]:
        name, row = slide["slide"], rows.get(slide["slide"])
        qualities = _checked(quality, name).values
        poor = _reason(quality, slide)
        if poor or row is None or row["status"] != "done":
            why = (row and row["message"]) or "failed without a reason"
            outcomes[slide["file"]] = Outcome(
                digest=slide["digest"],
                slide=name,
                reason=poor or why,
                quarantined=bool(poor),
                values=qualities,
            )
            continue
        digest = _without_annotation(row["digest"])
        if digest != slide["digest"]:
            found.append(Found(slide["file"], "changed", digest))
        if name in measured:
            scanner, values = measured[name].scanner, measured[name].values
        else:
            before = catalog[slide["digest"]]
            scanner, values = before["scanner"], values_of(before)
        outcomes[slide["file"]] = Outcome(
            digest=digest,
            slide=name,
            mask=mask_uri(night_folder(out, plan["night"]) + "/run", name)[
                len(out) + 1 :
            ],
            model_digest=settings.model_digest,
            scanner=scanner,
            values=values | qualities | run_values(row, settings.classes.names),
        )
    return outcomes


def _checked(quality: dict[str, Checked], slide: str) -> Checked:
    return quality.get(slide, Checked({}, Verdict()))


def _reason(quality: dict[str, Checked], slide: Row) -> str:
    """Return why a planned slide is not predicted; "" if it is."""
    why = _checked(quality, slide["slide"]).verdict.quarantined
    return f"slide quality: {why}" if why else ""


def _without_annotation(digest: str) -> str:
    """Return what of a row's digest names the slide and what was said of it."""
    content, *others = digest.split("+")
    return "+".join([content, *(part for part in others if "=" in part)])


def _is_noted(catalog: Catalog, slide: Row, night: str) -> bool:
    """Return whether the catalog was written before with this slide of this night."""
    row = catalog.get(slide["digest"])
    return row is not None and row["status"] == "done" and row["night"] == night
