"""What travels between the driver and the processes: tasks and their results.

`Facts`, `Part`, `Record` and `Finished` are a stage's own values; see
`medray.execution.stage`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from medray.geometry import Rectangle
from medray.slides import SlideFile


@dataclass(frozen=True)
class SlideInput:
    """A slide as the driver found it when the stage began.

    Attributes:
        file: Its id, its address, and what the user says of it.
        annotation: Address of its annotation; "": it has none.
        fingerprint: Sizes and times of slide and annotation; "": storage has none.
    """

    file: SlideFile
    annotation: str = ""
    fingerprint: str = ""

    @property
    def slide(self) -> str:
        """The id of the slide."""
        return self.file.slide

    @property
    def uri(self) -> str:
        """The absolute path or address of the slide."""
        return self.file.uri


@dataclass(frozen=True)
class SlideTask:
    """A slide to plan.

    Attributes:
        input: The slide.
        done: Digest of the content that it was finished with before; "": it was not.
        committed: Digest of the content whose regions have been committed.
        shards: Files of each of these regions, by the region's index.
    """

    input: SlideInput
    done: str = ""
    committed: str = ""
    shards: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedRegion[Part]:
    """A region of a slide's plan.

    Attributes:
        index: Its number among the regions of the slide.
        region: Where it is, in the pixels that the stage works with.
        part: What else the stage knows of it.
    """

    index: int
    region: Rectangle
    part: Part


@dataclass(frozen=True)
class PlannedSlide[Facts]:
    """A slide with its plan, the regions apart.

    Attributes:
        input: The slide.
        digest: Of its content, its annotation's and what the user says of it.
        facts: What the stage found out about it.
        regions: How many regions it has.
        todo: How many of them are yet to be done.
        copied: Whether a copy of the file is read, which is fetched first.
    """

    input: SlideInput
    digest: str
    facts: Facts
    regions: int
    todo: int
    copied: bool = False

    @property
    def slide(self) -> str:
        """The id of the slide."""
        return self.input.slide

    @property
    def uri(self) -> str:
        """The absolute path or address of the slide."""
        return self.input.uri


@dataclass(frozen=True)
class RegionTask[Facts, Part]:
    """A region to do."""

    slide: PlannedSlide[Facts]
    planned: PlannedRegion[Part]

    @property
    def index(self) -> int:
        """Its number among the regions of the slide."""
        return self.planned.index

    @property
    def region(self) -> Rectangle:
        """Where it is, in the pixels that the stage works with."""
        return self.planned.region

    @property
    def part(self) -> Part:
        """What else the stage knows of it."""
        return self.planned.part

    @property
    def where(self) -> str:
        """The region in words, for messages."""
        place = self.region
        return f"region {[place.y, place.x, place.height, place.width]}"


@dataclass(frozen=True)
class FinishTask[Facts, Record]:
    """A slide to finish: all its regions are stored.

    Attributes:
        slide: The slide.
        records: The record of each region, by its index.
    """

    slide: PlannedSlide[Facts]
    records: Mapping[int, Record]


@dataclass(frozen=True)
class Failure:
    """Why a slide or a region failed.

    Attributes:
        why: In words, with the file.
        store: Which storage did not answer, if that was it: the slides' own, or that
            of the stage's folder.
        quarantined: It cost processes, or the model fails on it: no other region of
            the slide is begun.
    """

    why: str
    store: Literal["", "slides", "out"] = ""
    quarantined: bool = False


@dataclass(frozen=True)
class Plan[Facts, Part]:
    """A slide that was planned, and its regions that are yet to be done."""

    slide: PlannedSlide[Facts]
    todo: tuple[RegionTask[Facts, Part], ...]


@dataclass(frozen=True)
class Unchanged:
    """A slide whose files were touched but whose content is that which was finished."""


@dataclass(frozen=True)
class NotPlanned:
    """A slide that cannot be planned.

    Attributes:
        failure: Why.
        digest: Of its content; "": it was not read.
    """

    failure: Failure
    digest: str = ""


@dataclass(frozen=True)
class Stored[Record, Finished]:
    """A region that is stored.

    Attributes:
        record: What the ledger keeps of it.
        finish: What finishing the slide gave, where this was its only region.
    """

    record: Record
    finish: Finish[Finished] | None = None


@dataclass(frozen=True)
class HandedBack:
    """A region that was not begun, since its node is being drained."""


def as_row(record: Any) -> dict[str, Any]:
    """Return a record as JSON keeps it: without what is None."""
    return {key: value for key, value in asdict(record).items() if value is not None}


@dataclass(frozen=True)
class Finish[Finished]:
    """A slide that was finished as a whole, and what that adds to the row."""

    result: Finished
