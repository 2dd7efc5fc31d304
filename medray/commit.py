"""How a stage over slides keeps its promises: which slides to do, when one is done.

A stage's chain of Ray Data yields rows in any order: a header row a slide (its facts,
how many regions it has) and a row a region. The driver feeds them to `Commit`, which
notes regions and slides in the ledger.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from medray.errors import SlideError
from medray.progress import Progress
from medray.slides.digest import slide_stamp
from medray.slides.listing import SlideFile
from medray.store.ledger import Ledger, slide_key

log = logging.getLogger(__name__)
Row = dict[str, Any]

HEADER = -1
"""Index of the row that speaks for a slide, not for one of its regions."""


@dataclass(frozen=True)
class Summary:
    """What a stage did.

    Attributes:
        out: Where it is.
        done: Slides finished now.
        skipped: Slides that were finished before.
        failed: Reason of each slide that failed, by slide.
        regions: Regions computed now.
        seconds: Wall time of the stage, Ray's start apart.
    """

    out: str
    done: int
    skipped: int
    failed: dict[str, str]
    regions: int
    seconds: float


def changed_slides(
    wanted: Iterable[SlideFile],
    ledger: Ledger,
    annotations: Mapping[str, str] | None = None,
) -> list[Row]:
    """Give a row for each slide that is not done, or is not the file it was.

    Files with the sizes and times of a done slide are taken to be that slide. Otherwise
    the slide stops counting as done until its digest tells whether it changed; `before`
    then holds its earlier row.

    Args:
        wanted: The slides of the request.
        ledger: What earlier runs have finished.
        annotations: Address of the annotation, by slide.
    """
    rows = []
    for file in wanted:
        annotation = (annotations or {}).get(file.slide, "")
        stamp = _stamp(file.uri)
        if stamp and annotation:
            stamp += f" {_stamp(annotation)}"
        row: Row = {"slide": file.slide, "uri": file.uri, "stamp": stamp}
        row["annotation"] = annotation
        before = ledger.slides.get(file.slide)
        if before is not None and before["status"] != "done":
            before = None
        if before and stamp and before | row == before:
            continue
        if before:
            ledger.forget_slide(file.slide)
        # As text: the earlier rows of several slides need not have equal columns.
        rows.append(row | {"before": json.dumps(before)})
    ledger.flush()
    return rows


def _stamp(uri: str) -> str:
    try:
        return slide_stamp(uri)
    except (SlideError, OSError):
        return ""  # opening it will tell what is wrong


@dataclass
class _Slide:
    """What has arrived of one slide."""

    header: Row | None = None
    arrived: int = 0
    error: str | None = None


@dataclass
class Commit:
    """Takes the rows of a chain and notes in the ledger what is finished.

    Attributes:
        ledger: Of the stage's folder.
        finish_slide: Called in a Ray task with the slide's id when all regions of a
            slide of several regions are stored (one region: its writer did it); what it
            gives is added to the slide's header.
        slide_row: Sums up (header, region records) as columns of slides.parquet.
    """

    ledger: Ledger
    finish_slide: Callable[[str], Row | None]
    slide_row: Callable[[Row, list[Row]], Row]
    done: int = 0
    regions: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    _slides: dict[str, _Slide] = field(default_factory=dict)
    _finishing: dict[Any, Row] = field(default_factory=dict)

    def take(self, row: Row, progress: Progress) -> None:
        """Note one row of the chain."""
        slide = self._slides.setdefault(row["slide"], _Slide())
        if "todo" in row:  # of a header, or of a region that carries the slide's facts
            slide.header = slide.header or row
        if row["index"] != HEADER:
            slide.arrived += 1
        if "error" in row:
            slide.error = slide.error or row["error"]
        elif row["index"] != HEADER:
            self._note_region(row)
            progress.region(row["region"][2] * row["region"][3])
        if slide.header is not None and slide.arrived == slide.header["todo"]:
            self._complete(self._slides.pop(row["slide"]), progress)
        self._collect(progress, wait=False)

    def finish(self, progress: Progress) -> None:
        """Wait for what is under way, and make everything durable."""
        self._collect(progress, wait=True)
        for name, slide in sorted(self._slides.items()):
            header = slide.header or {"slide": name, "uri": "", "stamp": ""}
            self._fail(header, "not all of its regions came back; run again", progress)
        self.ledger.flush()

    def summary(self, out: str, skipped: int, seconds: float) -> Summary:
        """Sum up the stage."""
        return Summary(out, self.done, skipped, self.failed, self.regions, seconds)

    def _note_region(self, row: Row) -> None:
        key = slide_key(row["slide"], row["digest"])
        self.ledger.commit_region(key, row["index"], row["record"])
        self.regions += 1

    def _complete(self, slide: _Slide, progress: Progress) -> None:
        header = slide.header
        if header is None:
            raise RuntimeError("a slide is complete only with its header")
        if slide.error is not None:
            self._fail(header, slide.error, progress)
        elif "unchanged" in header:
            self.ledger.commit_slide(header["unchanged"])
            progress.slide(header["slide"], "unchanged")
        elif header["regions"] > 1:
            finish = ray.remote(_call).options(num_cpus=0)
            task = finish.remote(self.finish_slide, header["slide"])
            self._finishing[task] = header
        else:
            self._succeed(header, progress)

    def _collect(self, progress: Progress, *, wait: bool) -> None:
        while self._finishing:
            timeout = None if wait else 0
            ready, _ = ray.wait(list(self._finishing), timeout=timeout)
            if not ready:
                return
            header = self._finishing.pop(ready[0])
            try:
                header = header | (ray.get(ready[0]) or {})
            except Exception as error:  # whatever it is, it is this slide's alone
                cause = getattr(error, "cause", None) or error
                self._fail(header, f"pyramid: {cause}", progress)
            else:
                self._succeed(header, progress)

    def _succeed(self, header: Row, progress: Progress) -> None:
        key = slide_key(header["slide"], header["digest"])
        regions = list(self.ledger.regions.get(key, {}).values())
        try:
            row = _outcome(header, "done", "") | self.slide_row(header, regions)
        except SlideError as error:
            self._fail(header, f"{error}", progress)
            return
        self.ledger.commit_slide(row)
        self.done += 1
        note = row.get("note") or ""
        progress.slide(header["slide"], f"done {note}".strip())

    def _fail(self, header: Row, message: str, progress: Progress) -> None:
        self.ledger.commit_slide(_outcome(header, "failed", message))
        self.failed[header["slide"]] = message
        progress.slide(header["slide"], f"failed: {message}")


def _call(function: Callable[[str], Row | None], slide: str) -> Row | None:
    return function(slide)


def _outcome(header: Row, status: str, message: str) -> Row:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "slide": header["slide"],
        "status": status,
        "message": message,
        "uri": header["uri"],
        "digest": header.get("digest"),
        "stamp": header["stamp"],
        "annotation": header.get("annotation", ""),
        "finished_at": now,
        "committed_at": time.time(),
    }
