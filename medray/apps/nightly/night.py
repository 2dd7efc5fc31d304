"""A night: what is new in an inbox becomes masks, a report and a summary.

The way of a file, top to bottom:

    look     what is new or touched since the last night, and no longer being written
    plan     by digest: new content, copies, replacements, retries (inbox)
    check    quality of each slide, if that is asked for (quality)
    infer    the night's run (finish); with annotations an evaluation (evaluations)
    measure  scanner and staining of each finished slide (measure, drift)
    commit   the catalog, then the night's summary (catalog, summary)

OUT/
catalog.parquet             one row per content, of everything ever seen
reference.json              staining of the slides that were trained on
nights/YYYY-MM-DD/night.json    the plan; with it a night has begun
                  quality.parquet   quality control of what is planned
                  run/          what `medray infer` makes
                  report/       what `medray evaluate` makes
                  summary.html
                  summary.json  with it the night is committed
lock.json                   who works here, while somebody does

A night that was killed is finished first, by its plan, when the command runs again.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from medray.apps.nightly.catalog import read_catalog
from medray.apps.nightly.drift import Drift, as_text
from medray.apps.nightly.finish import finish_night
from medray.apps.nightly.folder import (
    is_committed,
    last_night,
    night_folder,
    summary_uri,
)
from medray.apps.nightly.inbox import Watch, plan_night
from medray.apps.nightly.summary import check_webhook, send_summary
from medray.datasets import read_dataset
from medray.errors import ConfigError
from medray.inference import Options, settings_of
from medray.slides import read_limits
from medray.storage import files, locked
from medray.types import Row

log = logging.getLogger(__name__)


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
        quarantined: Why slides were not predicted, by slide quality control, by name.
        poor: What slide quality control flags of other slides, by name.
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
    quarantined: dict[str, str] = field(default_factory=dict)
    poor: dict[str, str] = field(default_factory=dict)
    committed_before: bool = False
    seconds: float = 0.0

    def __str__(self) -> str:
        lines = [f"left out  {name}: {why}" for name, why in self.left_out.items()]
        lines += [f"failed    {name}: {why}" for name, why in self.handed_on.items()]
        lines += [f"given up  {name}: {why}" for name, why in self.given_up.items()]
        lines += [f"kept out  {name}: {why}" for name, why in self.quarantined.items()]
        lines += [f"quality   {name}: {what}" for name, what in self.poor.items()]
        lines += [f"drift     {words}" for words in self.flagged]
        lines.append(f"summary   {self.summary}")
        before = ", committed before" if self.committed_before else ""
        lines.append(
            f"night {self.night}{before}: {self.done} slides done, "
            f"{len(self.handed_on)} failed and handed on, {len(self.given_up)} given "
            f"up, {len(self.left_out)} left out, {self.copies} copies, "
            f"{self.replaced} replaced, {len(self.quarantined)} quarantined"
        )
        return "\n".join(lines)


def nightly(
    inbox: str,
    *,
    model: str | Sequence[str],
    out: str,
    truth: str | None = None,
    reference: str | None = None,
    qc: str | None = None,
    webhook: str | None = None,
    settle: float = 60.0,
    night: str | None = None,
    tries: int = 3,
    options: Options | None = None,
) -> Night:
    """Predict what is new in an inbox, and summarise the results.

    The night is committed even if single slides fail: they are in its summary, and the
    next night tries them again. The same command again does nothing new.

    Args:
        inbox: Folder or address where slides arrive. Searched in depth.
        model: Model folder, or several: an ensemble.
        out: Where all nights are; made if needed.
        truth: Dataset, or folder of annotations named like the slides.
        reference: Dataset that the model was trained on, to watch drift from it. The
            night's staining is compared with that of its training slides.
        qc: Limits of slide quality control: a YAML file, or `default`. None: no such
            control. With it slides are measured before they are predicted, and what is
            worse than a limit is flagged on the page or not predicted.
        webhook: http:// or https:// address that gets the summary as JSON. That it
            cannot be sent is only a warning.
        settle: Seconds for which a new file must not change. One that does is left to
            the next night.
        night: Date of the night, YYYY-MM-DD. None: that of this night (`night_of`).
        tries: Nights after which a slide that fails is given up.
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
        limits=read_limits(qc) if qc else None,
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
        last = last_night(watch.out)
        if last and last > date:
            raise ConfigError(
                f"{watch.out}: its last night is {last}, {date} lies before it; "
                f"choose --night {last} or later"
            )
        if last and not is_committed(watch.out, last):
            log.info("night %s was not finished; it is now", last)
            summary = finish_night(watch, settings, last, check)
            send_summary(webhook, summary)
        elif last == date:
            log.info("night %s is committed; what is new is for the next", date)
            summary = files.read_json(summary_uri(watch.out, date))
            return _result(watch.out, summary, start, committed_before=True)
        if last != date:
            plan = plan_night(watch, read_catalog(watch.out), date)
            check()
            files.write_json(
                files.join(night_folder(watch.out, date), "night.json"), plan
            )
            summary = finish_night(watch, settings, date, check)
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
        summary=files.join(night_folder(out, summary["night"]), "summary.html"),
        done=sum(slide["status"] == "done" for slide in slides),
        handed_on=reasons("failed"),
        given_up=reasons("given up"),
        left_out=summary["left_out"],
        copies=len(summary["copies"]),
        replaced=len(summary["replaced"]),
        flagged=flagged,
        quarantined=reasons("quarantined"),
        poor={s["file"]: s["flagged"] for s in slides if s.get("flagged")},
        committed_before=committed_before,
        seconds=time.perf_counter() - start,
    )
