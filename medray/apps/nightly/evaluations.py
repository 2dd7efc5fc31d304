"""Evaluation of a night's run, and of earlier ones whose ground truth came later."""

from __future__ import annotations

import logging
from collections.abc import Collection

from medray.apps.nightly.catalog import Catalog
from medray.apps.nightly.drift import NIGHTS
from medray.apps.nightly.folder import night_folder
from medray.apps.nightly.inbox import Watch
from medray.errors import ConfigError, FormatError, SlideError
from medray.evaluation import evaluate, evaluated_slides, with_truth
from medray.inference import RunSettings
from medray.slides import SlideFile, slide_id
from medray.storage import files
from medray.types import Row

log = logging.getLogger(__name__)


def evaluate_run(
    run: str, truth: str, out: str, slides: Collection[str] | None = None
) -> Row:
    """Evaluate a night's run; where that fails, return the reason as `message`."""
    try:
        result = evaluate(run, truth=truth, out=out, slides=slides)
    except (ConfigError, FormatError, SlideError) as error:
        log.warning("no evaluation: %s", error)
        return {"message": f"{error}"}
    names = ("f1", "interval", "evaluated", "failed")
    return {name: getattr(result, name) for name in names}


def evaluate_late(
    watch: Watch, settings: RunSettings, catalog: Catalog, night: str
) -> list[Row]:
    """Evaluate earlier nights again whose slides have got a ground truth since."""
    if not watch.truth:
        return []
    # Written first: a night that is finished again evaluates and reports the same.
    plan = files.join(night_folder(watch.out, night), "late.json")
    if not files.exists(plan):
        try:
            late = _late(watch, watch.truth, settings, catalog, night)
        except (ConfigError, FormatError) as error:
            log.warning("no evaluation of earlier nights: %s", error)
            return []
        files.write_json(plan, late)
    found = []
    for earlier, slides in files.read_json(plan).items():
        folder = night_folder(watch.out, earlier)
        out = files.join(folder, "report")
        wanted = evaluated_slides(out) | set(slides)
        result = evaluate_run(files.join(folder, "run"), watch.truth, out, wanted)
        found.append({"night": earlier, "slides": slides} | result)
    return found


def _late(
    watch: Watch, truth: str, settings: RunSettings, catalog: Catalog, night: str
) -> dict[str, list[str]]:
    """Return, by earlier night, slides with a ground truth not in its report yet.

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
        - evaluated_slides(files.join(night_folder(watch.out, earlier), "report"))
        for earlier in sorted(done)[-NIGHTS:]
    }
    # Looked for once: it may be a bucket with many.
    wanted = set().union(*missing.values())
    # All slides are matched, for what belongs to one is not free for another.
    known = with_truth(slides.values(), truth, settings.classes) & wanted
    return {
        earlier: sorted(ids & known) for earlier, ids in missing.items() if ids & known
    }
