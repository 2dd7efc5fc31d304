"""How a stage over slides keeps its promises: which slides to do, when one is done.

A stage's rows come in any order: a header row a slide (its facts, how many regions it
has) and a row a region. The driver feeds them to `Commit`, which notes regions and
slides in the ledger and says when a slide needs finishing.

One file, because what is left to do follows from what `Commit` has noted.
"""

from __future__ import annotations

import datetime
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from medray.errors import ConfigError, MedrayError, SlideError, StoppedError, StoreError
from medray.execution.progress import Progress
from medray.execution.stage import HEADER, OVERRIDES
from medray.slides import SlideFile, fingerprint_of, slide_digest
from medray.storage import Ledger, files, slide_key
from medray.types import Row

log = logging.getLogger(__name__)

# So many slides or regions in succession that storage does not give are no accident.
_MOST_UNREACHED = 10


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

    def __str__(self) -> str:
        return (
            f"out     {self.out}\n"
            f"{self.done} slides done, {self.skipped} done before, "
            f"{len(self.failed)} failed, {self.seconds:.1f} s"
        )


def changed_slides(
    wanted: Iterable[SlideFile],
    ledger: Ledger,
    annotations: Mapping[str, str] | None = None,
) -> list[Row]:
    """Return a row for each slide that is not done, or is not the file it was.

    Files with the sizes and times of a done slide are taken to be that slide. Otherwise
    the slide stops counting as done until its digest tells whether it changed; `before`
    then holds its earlier row, and `committed` the shards of each committed region.

    Args:
        wanted: The slides of the request.
        ledger: What earlier runs have finished.
        annotations: Address of the annotation, by slide.

    Raises:
        ConfigError: A done slide of the same id was made of another file, which is
            still there, or a slide was done before under another id.
    """
    wanted = list(wanted)
    _check_known_once(wanted, ledger)
    for file in wanted:
        _check_same_slide(file, ledger.slides.get(file.slide))
    rows = []
    for file in wanted:
        annotation = (annotations or {}).get(file.slide, "")
        fingerprint = fingerprint_of(file.uri, annotation)
        row: Row = {"slide": file.slide, "uri": file.uri, "fingerprint": fingerprint}
        row["annotation"] = annotation
        row |= {"given_mpp": file.mpp, "scene": file.scene, "plane": file.plane}
        before = ledger.slides.get(file.slide)
        if before is not None and before["status"] != "done":
            before = None
        if before and fingerprint and all(before.get(k) == v for k, v in row.items()):
            continue
        if before:
            ledger.forget_slide(file.slide)
        # As text: the earlier rows of several slides need not have equal columns.
        row["before"] = json.dumps(before)
        digest, records = ledger.records_of(file.slide)
        shards = {index: [*record["files"]] for index, record in records.items()}
        rows.append(row | {"committed": {"digest": digest, "shards": shards}})
    ledger.flush()
    return rows


def _check_known_once(wanted: list[SlideFile], ledger: Ledger) -> None:
    """Refuse to do a slide a second time under another id.

    An id is made of the path below what was named, and of the whole address too if two
    of a request would be equal. So it changes when a request names more, or less. A
    DICOM series is its folder, or FOLDER/UID once another series is in that folder.
    """
    done: dict[str, list[Row]] = {}
    for row in ledger.slides.values():
        if row["status"] == "done":
            done.setdefault(row["uri"], []).append(row)
            done.setdefault(f"{_above(row['uri'])}/", []).append(row)
    for file in wanted:
        near = [*done.get(_above(file.uri), ()), *done.get(f"{file.uri}/", ())]
        others = [
            *(row for row in done.get(file.uri, ()) if row["slide"] != file.slide),
            *(row for row in near if _is_of(file, row)),
        ]
        if others:
            raise ConfigError(
                f"{file.uri}: is done there as {others[0]['slide']!r} "
                f"({others[0]['uri']}) and would be there twice, now as "
                f"{file.slide!r}: ids are made of the paths below what is named. Name "
                f"what was named before, with no DICOM series added to a folder of "
                f"one; or give another --out, and name the folder that holds all"
            )


def _above(uri: str) -> str:
    return uri.rpartition("/")[0]


def _is_of(file: SlideFile, before: Row) -> bool:
    """Tell whether a slide is that of a row with another id."""
    try:
        digest = slide_digest(file.uri)
    except (MedrayError, OSError):
        return False  # planning it will tell what is wrong
    same = digest == str(before["digest"]).partition("+")[0]
    return same and before["slide"] != file.slide


def _check_same_slide(file: SlideFile, before: Row | None) -> None:
    """Refuse to put a slide in the place of another one that has the same id.

    A slide that was moved, copied or replaced is the same slide.
    """
    if before is None or before["status"] != "done" or before["uri"] == file.uri:
        return
    try:
        if not files.exists(before["uri"]):
            return
        same = slide_digest(file.uri) == str(before["digest"]).partition("+")[0]
    except (MedrayError, OSError):
        return  # planning it will tell what is wrong
    if not same:
        raise ConfigError(
            f"{file.uri}: gets the id {file.slide!r}, which is taken there by "
            f"{before['uri']}, another slide; give another --out, or name the folder "
            f"that holds both, so that their ids differ"
        )


@dataclass
class _Slide:
    """What has arrived of one slide."""

    header: Row | None = None
    arrived: int = 0
    error: str | None = None


@dataclass
class Commit:
    """Takes the rows of a stage and notes in the ledger what is finished.

    Attributes:
        ledger: Of the stage's folder.
        slide_row: Sums up (header, region records) as columns of slides.parquet.
        done: How many slides were finished.
        unchanged: How many were finished before, as only their digest told.
        regions: How many regions were committed.
        failed: Reason of each slide that failed.
        lost: Of those, the ones that cost processes, or made the model fail.
    """

    ledger: Ledger
    slide_row: Callable[[Row, list[Row]], Row]
    done: int = 0
    unchanged: int = 0
    regions: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    _unreached: int = 0
    _slides: dict[str, _Slide] = field(default_factory=dict)

    def take(self, row: Row, progress: Progress) -> Row | None:
        """Note one row.

        Returns:
            The header of a slide whose regions are now all stored and that is to be
            finished as a whole; what comes of that goes to `finished`. A slide of one
            region was finished by its writer.
        """
        slide = self._slides.setdefault(row["slide"], _Slide())
        if "todo" in row:  # of a header, or of a region that carries the slide's facts
            slide.header = slide.header or row
        if row["index"] != HEADER:
            slide.arrived += 1
        if "error" in row:
            slide.error = slide.error or row["error"]
            if "lost" in row:
                self.lost[row["slide"]] = row["error"]
            self._check_storage(row)
        elif row["index"] != HEADER:
            self._note_region(row)
            progress.region(row["region"][2] * row["region"][3])
        header = slide.header
        if header is None or slide.arrived < header["todo"]:
            return None
        del self._slides[row["slide"]]
        if slide.error is not None:
            self._fail(header, slide.error, progress)
        elif "unchanged" in header:
            self.ledger.commit_slide(header["unchanged"])
            self.unchanged += 1
            progress.slide(header["slide"], "unchanged")
        elif header["regions"] > 1 or not header["todo"]:
            return header
        else:
            self.finished(header, {}, progress)
        return None

    def finished(self, header: Row, result: Any, progress: Progress) -> None:
        """Note a slide that was finished as a whole.

        Args:
            header: Of the slide, as `take` gave it.
            result: What finishing adds to it, with an `error` if it could not be done;
                or the exception that ended it.
            progress: To show it.
        """
        if isinstance(result, Exception):
            result = {"error": f"{result}"}
        if "error" in result:
            self._check_storage(result)
            self._fail(header, f"finishing: {result['error']}", progress)
            return
        header = header | result
        regions = list(self.records(header).values())
        try:
            row = _outcome(header, "done", "") | self.slide_row(header, regions)
        except SlideError as error:
            self._fail(header, f"{error}", progress)
            return
        self.ledger.commit_slide(row)
        self.done += 1
        note = row.get("note") or ""
        progress.slide(header["slide"], f"done {note}".strip())

    def records(self, header: Row) -> dict[int, Row]:
        """Return the records of a slide's regions."""
        digest, records = self.ledger.records_of(header["slide"])
        return records if digest == header["digest"] else {}

    def _check_storage(self, row: Row) -> None:
        """Stop where storage fails: that is no slide's fault.

        Raises:
            StoreError: What is made cannot be stored, or one slide after the other
                could not be read from its store.
        """
        self._unreached += row.get("storage") == "slides"
        if row.get("storage") == "run" or self._unreached == _MOST_UNREACHED:
            raise StoreError(row["error"])

    def stopped(self, signal: int) -> StoppedError:
        """Return what says that a signal ended the stage, and what is kept."""
        under_way = sum(slide.arrived > 0 for slide in self._slides.values())
        return StoppedError(
            signal,
            f"{self.done} slides are finished and {self.regions} regions computed by "
            f"this command are kept, {under_way} slides are under way",
        )

    def close(self, progress: Progress) -> None:
        """Fail what did not come back, and make everything durable."""
        for name, slide in sorted(self._slides.items()):
            header = slide.header or {"slide": name, "uri": "", "fingerprint": ""}
            self._fail(header, "not all of its regions came back; run again", progress)
        self.ledger.flush()

    def summary(self, out: str, skipped: int, seconds: float) -> Summary:
        """Sum up the stage."""
        skipped += self.unchanged
        return Summary(out, self.done, skipped, self.failed, self.regions, seconds)

    def _note_region(self, row: Row) -> None:
        key = slide_key(row["slide"], row["digest"])
        self.ledger.commit_region(key, row["index"], row["record"])
        self.regions += 1
        self._unreached = 0

    def _fail(self, header: Row, message: str, progress: Progress) -> None:
        self.ledger.commit_slide(_outcome(header, "failed", message))
        self.failed[header["slide"]] = message
        progress.slide(header["slide"], f"failed: {message}")


def _outcome(header: Row, status: str, message: str) -> Row:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "slide": header["slide"],
        "status": status,
        "message": message,
        "uri": header["uri"],
        "digest": header.get("digest"),
        "fingerprint": header["fingerprint"],
        "annotation": header.get("annotation", ""),
        **{name: header.get(name) for name in OVERRIDES},
        "finished_at": now,
        "committed_at": time.time(),
    }
