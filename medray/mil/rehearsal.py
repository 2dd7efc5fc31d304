"""The plan of a training on slides' labels, before it is started: `--dry-run`."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from medray.mil.settled import (
    SettledSlides,
    SlideRequest,
    SlideTraining,
    read_request,
    settle_slide_training,
)
from medray.types import Row

_TRIED, _EPOCHS = 8, 2  # slides of train and as many of val, and epochs over them


@dataclass(frozen=True, kw_only=True)
class SlideTrainPlan:
    """What a training on slides' labels would do.

    Attributes:
        out: Model folder; nothing is written there.
        state: `new`, or `was there already`, and nothing would be done.
        epochs: Of the longest training, or of the one that was done.
        splits: One row per split (`split`) with its `slides`, their `patients` and
            `tiles`, and of each label `slides_LABEL`.
        left_out: Why slides take no part, by slide.
        epoch_seconds: Time of an epoch, as measured on a few slides.
        seconds: Least and most time: if it stops as early as the recipe allows, and if
            it goes through all epochs.
        host_bytes: Most memory of the process that measured.
    """

    out: str
    state: str
    epochs: int
    splits: list[Row]
    left_out: dict[str, str]
    epoch_seconds: float
    seconds: tuple[float, float]
    host_bytes: int

    def __str__(self) -> str:
        lines = []
        for row in self.splits:
            values = (f"{key} {value}" for key, value in row.items() if key != "split")
            lines.append(f"{row['split']:<9} {', '.join(values)}")
        lines += [f"left out  {slide}: {why}" for slide, why in self.left_out.items()]
        if self.splits:
            least, most = self.seconds
            lines += [
                f"epoch     {self.epoch_seconds:.1f} s",
                f"time      {least:.0f} to {most:.0f} s",
                f"memory    {self.host_bytes / 2**30:.1f} GiB of a process",
            ]
        lines += [
            f"out       {self.out}: nothing was written",
            f"{self.state}, {self.epochs} epochs",
        ]
        return "\n".join(lines)


def dry_train_slides(
    recipe: str,
    *,
    data: str,
    labels: str,
    out: str,
    ignore_unknown: bool = False,
    overrides: Sequence[str] = (),
) -> SlideTrainPlan:
    """Return what `train_slides` would do by the same arguments, without doing it.

    Args:
        recipe: Name or path.
        data: Features.
        labels: CSV of labels.
        out: Model folder; it says what was done before.
        ignore_unknown: Leave out labels of slides without features.
        overrides: Keys of the recipe to change.

    Raises:
        ConfigError: As `train_slides`, before it starts.
        MedrayError: The loss is no number.
    """
    request = read_request(recipe, data, labels, out, overrides)
    settled = settle_slide_training(request, ignore_unknown)
    plan = SlideTrainPlan(
        out=request.out,
        state="was there already",
        epochs=0,
        splits=[],
        left_out={},
        epoch_seconds=0.0,
        seconds=(0.0, 0.0),
        host_bytes=0,
    )
    if isinstance(settled, SlideTraining):
        return replace(plan, epochs=settled.epochs)
    how = request.recipe
    epoch_s = _time_epoch(settled, request)
    earliest = min(how.epochs, how.patience + 1)
    return replace(
        plan,
        state="new",
        epochs=how.epochs,
        splits=_splits(settled),
        left_out=settled.left_out,
        epoch_seconds=epoch_s,
        seconds=(earliest * epoch_s, how.epochs * epoch_s),
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
    )


def _time_epoch(settled: SettledSlides, request: SlideRequest) -> float:
    """Return the seconds of an epoch, by the tiles of a few slides."""
    # Imported here: with it comes torch, and what is wrong is said sooner without.
    from medray.mil.network import fit

    few = {split: settled.of[split][:_TRIED] for split in ("train", "val")}
    short = replace(request.recipe, epochs=_EPOCHS, patience=_EPOCHS)
    for number in (*few["train"], *few["val"]):
        settled.bags(number)  # what is kept in memory is read once, not in each epoch
    start = time.perf_counter()
    fit(settled.model, short, settled.bags, settled.truth, few["train"], few["val"])
    seconds = (time.perf_counter() - start) / _EPOCHS

    def tiles(of: Sequence[int]) -> int:
        return sum(int(settled.slides[number]["tiles"]) for number in of)

    all_of_them = tiles(settled.of["train"]) + tiles(settled.of["val"])
    return seconds * all_of_them / (tiles(few["train"]) + tiles(few["val"]))


def _splits(settled: SettledSlides) -> list[Row]:
    """Return one row per split."""
    found = []
    for split, numbers in settled.of.items():
        slides = [settled.slides[number] for number in numbers]
        labels = Counter(row["label"] for row in slides)
        row: Row = {
            "split": split,
            "slides": len(slides),
            "patients": len({row["patient"] for row in slides}),
            "tiles": sum(int(row["tiles"]) for row in slides),
        }
        counts = {f"slides_{name}": labels[name] for name in settled.model.classes}
        found.append(row | counts)
    return found
