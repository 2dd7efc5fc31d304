"""A stage: what a command does with slides, told apart from where it is done.

A stage is plain functions of one slide or one of its regions, without Ray, which can be
called in any process and repeated. An executor (`medray.execution.run`) says where they
run. In the order of a slide's way:

    plan      an open slide -> its facts, and its regions (a few numbers each)
    create    makes the empty stores that regions are written into
    read      a region -> its pixels
    device    what a GPU worker makes of them; without one `write` gets what was read
    write     stores the region as whole shards -> its record for the ledger
    finish    once all regions are stored: what needs the whole slide
    slide_row sums the slide up for slides.parquet
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from medray.errors import MedrayError, StoreError
from medray.slides import Slide, SlideFile, StagedSlide, opened, slide_digest, too_large
from medray.storage import files
from medray.types import Layers, Row

OVERRIDES = ("given_mpp", "scene", "plane")
"""What a slide's row tells of what the user said of it; see `SlideFile`."""

HEADER = -1
"""Index of the row that speaks for a slide, not for one of its regions."""


@dataclass(frozen=True)
class Device:
    """What is done with a region's pixels on a device.

    Attributes:
        load: Gives, of a number of threads, what predicts: it has `warm_up()`, and
            `predict` gives a result with `finite` for each of a stream of sources, in
            their order.
        source: Gives of a row and its pixels what is predicted, and may add to the row.
        layers: Gives the arrays of a result that are written.
        read_bytes: How many bytes of pixels a region has.
    """

    load: Callable[[int], Any]
    source: Callable[[Row, Any], Any]
    layers: Callable[[Any], Layers]
    read_bytes: Callable[[Row], int]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is done with slides, by functions of modules, which Ray can send.

    What they raise is the slide's failure, if it is a MedrayError or OSError. Of a
    StoreError that `plan` and `read` raise the slides' store is guilty; of `create`,
    `write` and `finish` that of the stage, which then stops.

    Attributes:
        name: Of the command, for progress and logs.
        out: Folder of the stage.
        plan: Gives facts and all regions of a slide, of its header and the open slide.
            Each region has an `index`; the facts have `regions`, their number.
        read: Gives a region's row and what was read; None where nothing is left to do.
        write: Writes a region, of its row and the arrays: what `device` made, or what
            was read. Gives its record.
        finish: Gives what finishing adds to a slide's row, of its header with the
            `records` of its regions.
        slide_row: Sums up (header, region records) as columns of slides.parquet; may
            raise SlideError.
        create: Makes a slide's empty stores, of its header with its facts.
        device: What is done on a device between reading and writing.
        timeout: Seconds that reading or writing a region may take, or planning a slide.
        batch: How many regions a worker without a device is given at once.
    """

    name: str
    out: str
    plan: Callable[[Row, Slide], tuple[Row, list[Row]]]
    read: Callable[[Row], tuple[Row, Any]]
    write: Callable[[Row, Layers], Row]
    finish: Callable[[Row], Row]
    slide_row: Callable[[Row, list[Row]], Row]
    create: Callable[[Row], None] = lambda _: None
    device: Device | None = None
    timeout: float = 300.0
    batch: int = 4


def plan_slide(stage: Stage, row: Row) -> tuple[Row, list[Row]]:
    """Plan a slide: its header, and the regions that are yet to be done.

    Args:
        stage: What is done.
        row: Of the slide, from `medray.execution.commit.changed_slides`.

    Returns:
        The header has an `error` where the slide cannot be planned, and `unchanged`,
        its finished row, where it is what it was though somebody touched it.
    """
    names = ("slide", "uri", "annotation", "fingerprint", *OVERRIDES)
    header: Row = {name: row[name] for name in names} | {"index": HEADER, "todo": 0}
    try:
        digest = slide_digest(row["uri"])
        digest += SlideFile("", "", *(row[name] for name in OVERRIDES)).given
        if row["annotation"]:
            digest += f"+{slide_digest(row['annotation'])}"
        header["digest"] = digest
        before = json.loads(row["before"])
        if before and before["digest"] == digest:
            unchanged = before | {name: row[name] for name in names}
            return header | {"unchanged": unchanged}, []
        slide = opened(row)
        facts, regions = stage.plan(header, slide)
        if isinstance(slide, StagedSlide):  # who reads it has its copy made first
            facts = facts | {"copied": True}
            regions = [region | {"copied": True} for region in regions]
        try:
            stage.create(header | facts)
            regions = _missing(row, digest, regions, stage.out)
        except StoreError as error:
            return header | _failure(error, "run"), []
    except (MedrayError, OSError) as error:
        return header | _failure(error, "slides"), []
    except MemoryError as error:
        return header | {"error": too_large(row, error)}, []
    return header | facts | {"todo": len(regions)}, regions


def _missing(row: Row, digest: str, regions: list[Row], out: str) -> list[Row]:
    """Return the regions of a slide that are yet to be done.

    What is committed is believed only as far as its shards are there: somebody may
    have removed them, or the slide was another one in between.
    """
    committed = row["committed"]
    if committed["digest"] != digest:
        return regions
    shards: dict[int, list[str]] = committed["shards"]
    folders = {_folder_of(path) for paths in shards.values() for path in paths}
    stored = {
        f"{folder}/{name}"
        for folder in folders
        for name in files.list_files(files.join(out, folder))
    }
    done = {index for index, paths in shards.items() if stored.issuperset(paths)}
    return [region for region in regions if region["index"] not in done]


def _folder_of(path: str) -> str:
    """Return the store that a file is part of, or else its folder."""
    store, inside, _ = path.partition(".zarr/")
    return f"{store}.zarr" if inside else path.rpartition("/")[0]


def read_region(stage: Stage, row: Row) -> tuple[Row, Any]:
    """Read a region: its row, with an `error` if it cannot be, and what was read."""
    try:
        return stage.read(row)
    except (MedrayError, OSError) as error:
        return row | _failure(error, "slides"), None
    except MemoryError as error:
        return row | {"error": too_large(row, error)}, None


def write_region(stage: Stage, row: Row, layers: Layers) -> Row:
    """Write a region: its row, with a `record` or an `error`.

    The only region of a slide finishes it at once.
    """
    try:
        record = stage.write(row, layers)
        if row["regions"] == 1:
            record |= stage.finish(row | {"records": {row["index"]: record}})
    except (MedrayError, OSError) as error:
        return row | _failure(error, "run")
    return row | {"record": record}


def do_region(stage: Stage, row: Row) -> Row:
    """Read and write a region of a stage that needs no device."""
    row, found = read_region(stage, row)
    if "error" in row:
        return row
    return write_region(stage, row, found or {})


def finish_slide(stage: Stage, header: Row) -> Row:
    """Finish a slide: what that adds to its row, or an `error`."""
    try:
        return stage.finish(header)
    except Exception as error:  # whatever it is, it is this slide's alone
        return _failure(error, "run")


def not_finite(row: Row) -> Row:
    """Return the error of a region for which the model gives NaN or infinity."""
    why = (
        f"{row['uri']}: quarantined: the model gives NaN or infinity in region "
        f"{row['region']}; try --precision float32, or look at what is special there"
    )
    return {"error": why, "lost": True}


OUTCOME = ("record", "error", "storage", "lost")
"""What of a region's row the driver needs to know."""


def outcome(row: Row) -> Row:
    """Return what came of a region."""
    return {name: row[name] for name in OUTCOME if name in row}


def _failure(error: Exception, storage: Literal["slides", "run"]) -> Row:
    """Say what went wrong, and if storage did not answer, which: `slides` or `run`."""
    said = {"storage": storage} if isinstance(error, StoreError) else {}
    return {"error": f"{error}"} | said
