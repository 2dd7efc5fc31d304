"""How a stage over slides keeps its promises: which slides to do, when one is done.

The driver feeds what comes of a stage's tasks to `Commit`, in any order, which notes
regions and slides in the ledger and says when a slide needs finishing.

One file, because what is left to do follows from what `Commit` has noted.
"""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from medray.errors import ConfigError, MedrayError, SlideError, StoppedError, StoreError
from medray.execution.progress import Progress
from medray.execution.stage import AnyPlan, AnyRegion, AnyStage, Outcome
from medray.execution.tasks import (
    Failure,
    Finish,
    FinishTask,
    NotPlanned,
    Plan,
    PlannedSlide,
    SlideInput,
    SlideTask,
    Stored,
    Unchanged,
    as_row,
)
from medray.slides import SlideFile, fingerprint_of, slide_digest
from medray.storage import Ledger, files, slide_key
from medray.types import Columns

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
        warnings: What the user should know of the slides together.
    """

    out: str
    done: int
    skipped: int
    failed: dict[str, str]
    regions: int
    seconds: float
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        warned = "".join(f"warning {said}\n" for said in self.warnings)
        return (
            f"out     {self.out}\n"
            f"{warned}"
            f"{self.done} slides done, {self.skipped} done before, "
            f"{len(self.failed)} failed, {self.seconds:.1f} s"
        )


def changed_slides(
    wanted: Iterable[SlideFile],
    ledger: Ledger,
    annotations: Mapping[str, str] | None = None,
) -> list[SlideTask]:
    """Return a task for each slide that is not done, or is not the file it was.

    Files with the sizes and times of a done slide are taken to be that slide. Otherwise
    the slide stops counting as done until its digest shows whether it changed; durable
    with the ledger's next flush.

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
        _check_same_slide(file, ledger.slides.get(file.slide), ledger.folder)
    tasks = []
    for file in wanted:
        annotation = (annotations or {}).get(file.slide, "")
        slide = SlideInput(file, annotation, fingerprint_of(file.uri, annotation))
        before = ledger.slides.get(file.slide)
        if before is not None and before["status"] != "done":
            before = None
        # Tables of medray 0.1 lack some columns.
        same = before is not None and all(
            before.get(column) == value
            for column, value in _input_columns(slide).items()
        )
        if same and slide.fingerprint:
            continue
        if before:
            ledger.forget_slide(file.slide)
        digest, records = ledger.records_of(file.slide)
        shards = {index: (*record["files"],) for index, record in records.items()}
        done = str(before["digest"]) if before else ""
        tasks.append(SlideTask(slide, done, digest, shards))
    return tasks


def _input_columns(slide: SlideInput) -> Columns:
    """Return the columns of a row that identify its file, and what the user said."""
    file = slide.file
    return {
        "slide": file.slide,
        "uri": file.uri,
        "fingerprint": slide.fingerprint,
        "annotation": slide.annotation,
        "given_mpp": file.mpp,
        "scene": file.scene,
        "plane": file.plane,
    }


def _check_known_once(wanted: list[SlideFile], ledger: Ledger) -> None:
    """Raise an error for a slide that was done before under another id.

    An id is made of the path below what was named, and of the whole address too if two
    of a request would be equal. So it changes when a request names more, or less. A
    DICOM series is its folder, or FOLDER/UID once another series is in that folder.
    """
    done: dict[str, list[Mapping[str, Any]]] = {}
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


def _is_of(file: SlideFile, before: Mapping[str, Any]) -> bool:
    """Return whether a slide is that of a row with another id."""
    try:
        digest = slide_digest(file.uri)
    except (MedrayError, OSError):
        return False  # planning it will report what is wrong
    same = digest == str(before["digest"]).partition("+")[0]
    return same and before["slide"] != file.slide


def _check_same_slide(
    file: SlideFile, before: Mapping[str, Any] | None, out: str
) -> None:
    """Raise an error if a slide would replace another one that has the same id.

    A slide that was moved, copied or replaced is the same slide, as is one of a folder
    that was copied with OUT in it, and replaced there.
    """
    if before is None or before["status"] != "done" or before["uri"] == file.uri:
        return
    try:
        if not files.exists(before["uri"]):
            return
        if _copied_with(out, before["uri"], file.uri):
            return
        same = slide_digest(file.uri) == str(before["digest"]).partition("+")[0]
    except (MedrayError, OSError):
        return  # planning it will report what is wrong
    if not same:
        raise ConfigError(
            f"{file.uri}: gets the id {file.slide!r}, which is taken there by "
            f"{before['uri']}, another slide; give another --out, or name the folder "
            f"that holds both, so that their ids differ"
        )


def _copied_with(out: str, before: str, now: str) -> bool:
    """Return whether OUT was copied together with a slide.

    Then what the two addresses of the slide do not share at their ends are two folders,
    and each has an OUT at the same place in it.
    """
    old, new = before.split("/"), now.split("/")
    while old and new and old[-1] == new[-1]:
        old.pop()
        new.pop()
    place = out.split("/")
    if not old or len(place) <= len(new) or place[: len(new)] != new:
        return False
    return files.exists(files.join("/".join(old), *place[len(new) :]))


@dataclass
class _Slide:
    """What has arrived of one slide."""

    input: SlideInput
    planned: PlannedSlide[Any] | None = None
    arrived: int = 0
    failure: Failure | None = None
    finish: Finish[Any] | None = None


@dataclass
class Commit:
    """Takes the results of a stage's tasks and records in the ledger what is finished.

    Attributes:
        ledger: Of the stage's folder.
        stage: What is done.
        progress: Shows it.
        done: How many slides were finished.
        unchanged: How many were finished before, as only their digest showed.
        regions: How many regions were committed.
        failed: Reason of each slide that failed.
        quarantined: Failure of each slide of which no other region is begun.
    """

    ledger: Ledger
    stage: AnyStage
    progress: Progress
    done: int = 0
    unchanged: int = 0
    regions: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    quarantined: dict[str, Failure] = field(default_factory=dict)
    _unreached: int = 0
    _adapter: TypeAdapter[Any] = field(init=False)
    _slides: dict[str, _Slide] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Prepare to read records back."""
        self._adapter = TypeAdapter(self.stage.record)

    def plan(self, task: SlideTask, plan: AnyPlan) -> FinishTask[Any, Any] | None:
        """Record the result of planning a slide.

        Returns:
            The slide, if it is to be finished: no region is left to do.
        """
        match plan:
            case Unchanged():
                self.ledger.restore_slide(task.input.slide, _input_columns(task.input))
                self.unchanged += 1
                self.progress.slide(task.input.slide, "unchanged")
                return None
            case NotPlanned():
                self._check_storage(plan.failure)
                self._fail(task.input, plan.digest, plan.failure.why)
                return None
            case Plan():
                slide = _Slide(task.input, plan.slide)
                self._slides[task.input.slide] = slide
                return self._finish_if_complete(slide)

    def region(self, task: AnyRegion, outcome: Outcome) -> FinishTask[Any, Any] | None:
        """Record the result of a region.

        Returns:
            Its slide, if all its regions are stored now and it is to be finished as a
            whole; what comes of that goes to `finished`.
        """
        slide = self._slides[task.slide.slide]
        slide.arrived += 1
        match outcome:
            case Stored():
                self._note_region(task, outcome.record)
                slide.finish = outcome.finish
            case Failure():
                slide.failure = slide.failure or outcome
                if outcome.quarantined:
                    self.quarantined[task.slide.slide] = outcome
                self._check_storage(outcome)
        return self._finish_if_complete(slide)

    def _finish_if_complete(self, slide: _Slide) -> FinishTask[Any, Any] | None:
        planned = slide.planned
        if planned is None or slide.arrived < planned.todo:
            return None
        del self._slides[planned.slide]
        if slide.failure is not None:
            self._fail(planned.input, planned.digest, slide.failure.why)
            return None
        task = FinishTask(planned, self._records(planned))
        if slide.finish is None:
            return task
        self.finished(task, slide.finish)
        return None

    def finished(
        self, task: FinishTask[Any, Any], result: Finish[Any] | Failure
    ) -> None:
        """Record a slide that was finished as a whole, or could not be."""
        slide = task.slide
        if isinstance(result, Failure):
            self._check_storage(result)
            self._fail(slide.input, slide.digest, f"finishing: {result.why}")
            return
        records = list(task.records.values())
        try:
            columns = self.stage.slide_row(slide, records, result.result)
        except SlideError as error:
            self._fail(slide.input, slide.digest, f"{error}")
            return
        self.ledger.commit_slide(
            outcome_columns(slide.input, slide.digest, "done", "") | columns
        )
        self.done += 1
        self.progress.slide(slide.slide, f"done {columns.get('note') or ''}".strip())

    def _records(self, slide: PlannedSlide[Any]) -> dict[int, Any]:
        """Return the records of a slide's regions, by index."""
        digest, rows = self.ledger.records_of(slide.slide)
        if digest != slide.digest:
            return {}
        return {
            index: self._adapter.validate_python(rows[index]) for index in sorted(rows)
        }

    def _check_storage(self, failure: Failure) -> None:
        """Stop where storage fails: that is no slide's fault.

        Raises:
            StoreError: What is made cannot be stored, or one slide after the other
                could not be read from its store.
        """
        self._unreached += failure.store == "slides"
        if failure.store == "out" or self._unreached == _MOST_UNREACHED:
            raise StoreError(failure.why)

    def stopped(self, signal: int) -> StoppedError:
        """Return the message that a signal ended the stage, and what is kept."""
        under_way = sum(slide.arrived > 0 for slide in self._slides.values())
        return StoppedError(
            signal,
            f"{self.done} slides are finished and {self.regions} regions computed by "
            f"this command are kept, {under_way} slides are under way",
        )

    def close(self) -> None:
        """Fail slides whose results are missing, and make everything durable."""
        for _, slide in sorted(self._slides.items()):
            digest = slide.planned.digest if slide.planned else ""
            why = "not all of its regions came back; run again"
            self._fail(slide.input, digest, why)
        self.ledger.flush()

    def summary(self, skipped: int, seconds: float) -> Summary:
        """Sum up the stage."""
        return Summary(
            self.stage.out,
            self.done,
            skipped + self.unchanged,
            self.failed,
            self.regions,
            seconds,
        )

    def _note_region(self, task: AnyRegion, record: Any) -> None:
        key = slide_key(task.slide.slide, task.slide.digest)
        self.ledger.commit_region(key, task.index, as_row(record))
        self.regions += 1
        self._unreached = 0
        self.progress.region(task.region.height * task.region.width)

    def _fail(self, slide: SlideInput, digest: str, message: str) -> None:
        self.ledger.commit_slide(outcome_columns(slide, digest, "failed", message))
        self.failed[slide.slide] = message
        self.progress.slide(slide.slide, f"failed: {message}")


def outcome_columns(
    slide: SlideInput, digest: str, status: str, message: str
) -> Columns:
    """Return the columns of slides.parquet with the outcome of a slide."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "slide": slide.slide,
        "status": status,
        "message": message,
        "uri": slide.uri,
        "digest": digest or None,
        **_input_columns(slide),
        "finished_at": now,
        "committed_at": time.time(),
    }
