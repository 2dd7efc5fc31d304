"""The plan of `medray ingest` for slides, before any work: `--dry-run`.

    settle     the request is checked by ingest's own function
    compare    with what OUT has: what is new, changed, unchanged, not named any more
    plan       each slide that is to be done is opened, in a process that may die of it
    try        some regions of some slides are done in earnest, into a temporary folder
    deal       splits are dealt as they will be

Nothing is written into OUT, and no lock is taken there: the report is as of now.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, replace

from medray.apps.check_slides import check_found
from medray.apps.checked import Checked, SlideTables, balance_of
from medray.apps.cores import cores_of, span_of
from medray.datasets import (
    IngestRequest,
    assign_splits,
    check_dataset,
    check_stock,
    earlier_splits,
    ingest_stage,
    present_classes,
    warn_of_splits,
)
from medray.execution import (
    RehearsedSlide,
    rehearse_slides,
    settle_executor,
    try_regions,
)
from medray.storage import Ledger
from medray.types import Executor, Row

_TRIED_SLIDES, _TRIED_REGIONS = 3, 3


@dataclass(frozen=True, kw_only=True)
class IngestPlan:
    """What an ingest of slides would do.

    Attributes:
        out: Folder of the dataset; nothing is written there.
        checked: The slides, as `medray check` reports them. `split` is the one that
            each would get, and `balance` what the splits would hold of them.
        new: Slides that would be done for the first time.
        changed: Slides that were done before and would be done again, as they, their
            annotations, or what is said of them changed.
        unchanged: Slides that are done.
        missing: Slides of the dataset that the request does not name. They stay, or
            would be taken out with --remove-missing.
        moved: Slides of the dataset whose split would change, in words.
        failed: Why slides would fail, by slide.
        warnings: What ingest would warn of.
        regions: Regions to do.
        pixels: Of these regions, at level 0.
        output_bytes: At most, if nothing could be compressed.
        likely_bytes: As the regions that were tried compress; 0 if none were.
        tried: Regions that were done for this estimate.
        cores: That would work.
        seconds: Least and most time.
    """

    out: str
    checked: Checked
    new: list[str]
    changed: list[str]
    unchanged: list[str]
    missing: list[str]
    moved: list[str]
    failed: dict[str, str]
    warnings: list[str]
    regions: int
    pixels: int
    output_bytes: int
    likely_bytes: int
    tried: int
    cores: int
    seconds: tuple[float, float]

    def __str__(self) -> str:
        splits = {row["slide"]: row["split"] for row in self.checked.slides}
        states = (
            ("new", self.new),
            ("changed", self.changed),
            ("unchanged", self.unchanged),
        )
        lines = self.checked.lines()
        for state, slides in states:
            for slide in slides:
                to = f" -> {splits[slide]}" if splits[slide] else ""
                lines.append(f"{state:<9} {slide}{to}")
        lines += [f"missing   {slide}" for slide in self.missing]
        lines += [f"moved     {said}" for said in self.moved]
        lines += [f"failed    {slide}: {why}" for slide, why in self.failed.items()]
        lines += [f"warning   {said}" for said in self.warnings]
        least, most = self.seconds
        mib = 2**20
        lines += [
            f"work      {self.regions} regions, {self.pixels / 1e6:.1f} megapixels; "
            f"{self.tried} of them tried",
            f"time      {least:.0f} to {most:.0f} s on {self.cores} cores",
            f"output    at most {self.output_bytes / mib:.1f} MiB, "
            f"{self.likely_bytes / mib:.1f} as what was tried compresses",
            f"out       {self.out}: nothing was written",
            f"would do {len(self.new)} new and {len(self.changed)} changed slides, "
            f"{len(self.unchanged)} are done, {len(self.failed)} would fail",
        ]
        return "\n".join(lines)


def dry_ingest(request: IngestRequest, *, executor: Executor = "auto") -> IngestPlan:
    """Return what an ingest of slides would do, without doing it.

    Args:
        request: As `medray.datasets.settle_ingest` returns it.
        executor: Where it would run: on the cores of this machine, or in one process.

    Raises:
        ConfigError: OUT was made with other settings, a slide would take another one's
            place, or nothing would be left of the dataset.
    """
    out, asked = request.out, {file.slide: file for file in request.slides}
    check_dataset(out, request.settings)
    warnings = warn_of_splits(out, request.dealt_by)
    ledger = Ledger(out, keep_finished=True)
    stock = check_stock(
        request.slides, out, ledger.slides, remove=request.remove_missing
    )
    warnings += stock.warnings
    for slide in stock.lost:
        ledger.drop_slide(slide)
    before = {slide: dict(row) for slide, row in ledger.slides.items()}
    earlier = earlier_splits(before, out)
    stage = functools.partial(ingest_stage, request.settings)
    see = functools.partial(present_classes, settings=request.settings)
    slides = rehearse_slides(
        stage(out), request.slides, ledger, request.annotations, see
    )
    failed = {one.slide: one.why for one in slides if one.status == "failed"}
    todo = [one for one in slides if one.status == "todo"]
    able = [one for one in todo if one.todo]
    chance = random.Random(request.seed)
    chosen = chance.sample(able, min(_TRIED_SLIDES, len(able)))
    trials = try_regions(stage, chosen, regions=_TRIED_REGIONS, seed=request.seed)
    failed |= {trial.slide: trial.why for trial in trials if trial.why}
    todo = [one for one in todo if one.slide not in failed]
    done = {
        slide: row
        for slide, row in before.items()
        if row["status"] == "done" and slide not in failed
    }
    done |= {one.slide: _row(one, earlier) for one in todo}
    rows = [done[slide] for slide in sorted(done)]
    were = {row["slide"]: row.get("split") for row in rows}
    warnings += assign_splits(rows, request)
    splits = {row["slide"]: row["split"] for row in rows}
    checked, _ = check_found(
        request.slides,
        request.settings.classes,
        annotations=request.annotated_by,
        tables=SlideTables(groups=request.groups, splits=request.splits),
    )
    told = [row | {"split": splits.get(row["slide"], "")} for row in checked.slides]
    checked = replace(
        checked, slides=told, balance=balance_of(told, request.settings.classes)
    )
    pixels = sum(_pixels(one) for one in todo)
    tried = [trial for trial in trials if not trial.why and trial.pixels]
    rates = [trial.seconds / trial.pixels for trial in tried] or [0.0]
    planning = sum(one.seconds for one in slides)
    work = (planning + min(rates) * pixels, planning + max(rates) * pixels)
    executor = settle_executor(executor, [file.uri for file in request.slides])
    cores = cores_of(executor)
    sampled = sum(trial.pixels for trial in tried)
    stored = sum(trial.stored_bytes for trial in tried)
    redone = {one.slide for one in todo} | failed.keys()
    return IngestPlan(
        out=out,
        checked=checked,
        new=[one.slide for one in todo if not one.changed],
        changed=[one.slide for one in todo if one.changed],
        unchanged=[slide for slide in asked if slide not in redone],
        missing=stock.missing,
        moved=[
            f"{slide} from {were[slide]} to {split or 'no split'}"
            for slide, split in splits.items()
            if were[slide] not in (None, "", split)
        ],
        failed=failed,
        warnings=warnings,
        regions=sum(len(one.todo) for one in todo),
        pixels=pixels,
        output_bytes=sum(
            _pixels(one) * (3 + one.facts.annotated) * 4 // 3 for one in todo
        ),
        likely_bytes=round(stored / sampled * pixels) if sampled else 0,
        tried=sum(min(_TRIED_REGIONS, len(one.todo)) for one in chosen),
        cores=cores,
        seconds=span_of(work, cores, executor),
    )


def _row(slide: RehearsedSlide, earlier: dict[str, str | None]) -> Row:
    """Return of a slide's row in slides.parquet what splits are dealt by."""
    row: Row = {"slide": slide.slide, "digest": slide.digest}
    row |= {"annotated": slide.facts.annotated, "split": earlier.get(slide.slide)}
    return row | {f"px_{name}": 1 for name in slide.seen}


def _pixels(slide: RehearsedSlide) -> int:
    """Return the pixels of the regions that are yet to be done."""
    return sum(one.region.height * one.region.width for one in slide.todo)
