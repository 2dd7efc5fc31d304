"""A stage: what a command does with slides, independent of where it runs.

A stage is plain functions of one slide or one of its regions, without Ray, which can be
called in any process and repeated. An executor (`medray.execution.run`) says where they
run. In the order of a slide's way:

    plan      an open slide -> its facts, and its regions (a few numbers each)
    create    makes the empty stores that regions are written into
    read      a region -> its arrays
    device    what a GPU worker makes of them; without one `write` gets what was read
    write     stores the region as whole shards -> its record for the ledger
    finish    once all regions are stored: what needs the whole slide
    slide_row sums the slide up for slides.parquet
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from medray.errors import MedrayError, StoreError
from medray.execution.tasks import (
    Failure,
    Finish,
    FinishTask,
    NotPlanned,
    Plan,
    PlannedRegion,
    PlannedSlide,
    RegionTask,
    SlideInput,
    SlideTask,
    Stored,
    Unchanged,
)
from medray.slides import Slide, StagedSlide, opened, slide_digest, too_large
from medray.storage import files
from medray.types import Columns, Layers


@dataclass(frozen=True)
class Timing:
    """How long a device took for a region, in seconds.

    Attributes:
        waited_s: Until its pixels were there.
        predict_s: Until what is made of them was there.
    """

    waited_s: float
    predict_s: float


@dataclass(frozen=True)
class Device:
    """What is done with a region's pixels on a device.

    Attributes:
        load: Returns the predictor for a number of threads: it has `warm_up()`, and
            `predict` yields a result with `finite` for each of a stream of sources, in
            their order.
        source: Returns the predictor's input for a task, what `read` saw of it and its
            arrays.
        layers: Returns the arrays of a result that are written.
        read_bytes: How many bytes of pixels a region has.
    """

    load: Callable[[int], Any]
    source: Callable[[RegionTask[Any, Any], Any, Layers], Any]
    layers: Callable[[Any], Layers]
    read_bytes: Callable[[RegionTask[Any, Any]], int]


def make_nothing(_: object) -> None:
    """Make no stores: the stage's regions are written into none."""


@dataclass(frozen=True, kw_only=True)
class Stage[Facts, Part, Seen, Record, Finished]:
    """What is done with slides, by functions of modules, which Ray can send.

    What they raise is the slide's failure, if it is a MedrayError or OSError. A
    StoreError that `plan` and `read` raise is the fault of the slides' store; one of
    `create`, `write` and `finish` that of the stage's store; the stage then stops.

    Attributes:
        name: Of the command, for progress and logs.
        out: Folder of the stage.
        record: Class of the records: a dataclass with `files`, the digest of each file
            of a region by its path below `out`.
        plan: Returns a slide's facts and all its regions, from the slide as the driver
            found it, its digest, and the open slide.
        read: Returns what was seen of a region, and its arrays; None where nothing is
            left to do.
        write: Writes a region and returns its record, from its task, what was seen, and
            the arrays that `device` made or that were read (none where nothing was
            left to do); the timing is None without a device.
        finish: Finishes a slide whose regions are all stored.
        slide_row: Sums up (slide, records, result of `finish`) as columns of
            slides.parquet; may raise SlideError.
        create: Makes a slide's empty stores.
        device: What is done on a device between reading and writing.
        timeout: Seconds that reading or writing a region may take, or planning a slide.
    """

    name: str
    out: str
    record: type[Record]
    plan: Callable[
        [SlideInput, str, Slide], tuple[Facts, Sequence[PlannedRegion[Part]]]
    ]
    read: Callable[[RegionTask[Facts, Part]], tuple[Seen, Layers | None]]
    write: Callable[[RegionTask[Facts, Part], Seen, Layers, Timing | None], Record]
    finish: Callable[[PlannedSlide[Facts], Mapping[int, Record]], Finished]
    slide_row: Callable[[PlannedSlide[Facts], Sequence[Record], Finished], Columns]
    create: Callable[[PlannedSlide[Facts]], None] = make_nothing
    device: Device | None = None
    timeout: float = 300.0


type AnyStage = Stage[Any, Any, Any, Any, Any]
type AnyRegion = RegionTask[Any, Any]
type AnyPlan = Plan[Any, Any] | Unchanged | NotPlanned
type Outcome = Stored[Any, Any] | Failure
"""The result of a region."""


def plan_slide(stage: AnyStage, task: SlideTask) -> AnyPlan:
    """Plan a slide: its facts, and the regions that are yet to be done."""
    slide, digest = task.input, ""
    try:
        digest = slide_digest(slide.uri) + slide.file.given
        if slide.annotation:
            digest += f"+{slide_digest(slide.annotation)}"
        if task.done == digest:
            return Unchanged()
        pixels = opened(slide.file, slide.fingerprint)
        facts, regions = stage.plan(slide, digest, pixels)
        # Who reads it has its copy made first.
        copied = isinstance(pixels, StagedSlide)
        try:
            planned = PlannedSlide(slide, digest, facts, len(regions), 0, copied)
            stage.create(planned)
            missing = missing_regions(task, digest, regions, stage.out)
        except StoreError as error:
            return NotPlanned(_failure(error, "out"), digest)
    except (MedrayError, OSError) as error:
        return NotPlanned(_failure(error, "slides"), digest)
    except MemoryError as error:
        return NotPlanned(Failure(too_large(slide.uri, error)), digest)
    planned = PlannedSlide(slide, digest, facts, len(regions), len(missing), copied)
    return Plan(planned, tuple(RegionTask(planned, region) for region in missing))


def missing_regions(
    task: SlideTask, digest: str, regions: Sequence[PlannedRegion[Any]], out: str
) -> Sequence[PlannedRegion[Any]]:
    """Return the regions of a slide that are yet to be done.

    What is committed is believed only as far as its shards are there: somebody may
    have removed them, or the slide was another one in between.
    """
    if task.committed != digest:
        return regions
    shards = task.shards
    folders = {_folder_of(path) for paths in shards.values() for path in paths}
    stored = {
        f"{folder}/{name}"
        for folder in folders
        for name in files.list_files(files.join(out, folder))
    }
    done = {index for index, paths in shards.items() if stored.issuperset(paths)}
    return [region for region in regions if region.index not in done]


def _folder_of(path: str) -> str:
    """Return the store that a file is part of, or else its folder."""
    store, inside, _ = path.partition(".zarr/")
    return f"{store}.zarr" if inside else path.rpartition("/")[0]


def read_region(
    stage: AnyStage, task: AnyRegion
) -> tuple[Any, Layers | None] | Failure:
    """Return what was seen of a region, and its arrays; or why it cannot be read."""
    try:
        return stage.read(task)
    except (MedrayError, OSError) as error:
        return _failure(error, "slides")
    except MemoryError as error:
        return Failure(too_large(task.slide.uri, error))


def write_region(
    stage: AnyStage, task: AnyRegion, seen: Any, layers: Layers, timing: Timing | None
) -> Outcome:
    """Write a region; the only region of a slide finishes it at once."""
    try:
        record = stage.write(task, seen, layers, timing)
    except (MedrayError, OSError) as error:
        return _failure(error, "out")
    if task.slide.regions > 1:
        return Stored(record)
    finish = finish_slide(stage, FinishTask(task.slide, {task.index: record}))
    return finish if isinstance(finish, Failure) else Stored(record, finish)


def do_region(stage: AnyStage, task: AnyRegion) -> Outcome:
    """Read and write a region of a stage that needs no device."""
    read = read_region(stage, task)
    if isinstance(read, Failure):
        return read
    seen, arrays = read
    return write_region(stage, task, seen, arrays or {}, None)


def finish_slide(stage: AnyStage, task: FinishTask[Any, Any]) -> Finish[Any] | Failure:
    """Finish a slide whose regions are all stored."""
    try:
        return Finish(stage.finish(task.slide, task.records))
    except Exception as error:  # whatever it is, it is this slide's alone
        return _failure(error, "out")


def not_finite(task: AnyRegion) -> Failure:
    """Return the failure of a region for which the model returns NaN or infinity."""
    return Failure(
        f"{task.slide.uri}: quarantined: the model gives NaN or infinity in "
        f"{task.where}; try --precision float32, or look at what is special there",
        quarantined=True,
    )


def _failure(error: Exception, store: Literal["slides", "out"]) -> Failure:
    """Return an error as a failure, with the name of the store that did not answer."""
    return Failure(f"{error}", store if isinstance(error, StoreError) else "")
