"""The plan of `medray train`, before any work: `--dry-run`.

The recipe and the dataset are checked by train's own function; the times are those of a
few real steps on the real patches, in this process. Nothing is written into OUT.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from medray.datasets import holds_images, read_slides
from medray.storage import files
from medray.training import RehearsedTraining, Training, rehearse_training
from medray.types import Row

# Of the time of a worker the share in which it learns, at least: reading crops, Ray and
# writing take the rest, on a machine without GPUs from the same cores.
_EFFICIENCY, _EFFICIENCY_CPU = 0.7, 0.4
_START_S = 60.0  # of Ray and its workers, and of what is written at the end; at most


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """What a training would do.

    Attributes:
        out: Model folder; nothing is written there.
        state: `new`; `goes on`, from a checkpoint of the same training; or `was there
            already`, and nothing would be done.
        epoch: Epochs that are done.
        epochs: Of the longest training.
        splits: One row each for `train` and `val` (`split`) with the `patches` that
            count (of a dataset of class folders these are images), their `slides` and
            `patients`, and of each class `px_NAME`, the pixels annotated, or
            `images_NAME`.
        warnings: What train would warn of.
        steps: Of an epoch.
        crops: Of a step.
        trainings: That are left to do, with those of `--repeats`.
        workers: Processes that train together, fewest and most.
        device: Where steps were measured, or "".
        crops_per_second: That one process learned from there, at the largest
            `data.crop`, in the phase in which all learns.
        epoch_seconds: Least and most time of an epoch, its validation included.
        seconds: Least and most time of all: if it stops as early as the recipe allows,
            and if it goes through all epochs.
        host_bytes: Most memory of the process that measured.
        device_bytes: Most of a GPU's memory; 0 without.
    """

    out: str
    state: str
    epoch: int
    epochs: int
    splits: list[Row]
    warnings: list[str]
    steps: int
    crops: int
    trainings: int
    workers: tuple[int, int]
    device: str
    crops_per_second: float
    epoch_seconds: tuple[float, float]
    seconds: tuple[float, float]
    host_bytes: int
    device_bytes: int

    def __str__(self) -> str:
        lines = []
        for row in self.splits:
            values = (f"{key} {value}" for key, value in row.items() if key != "split")
            lines.append(f"{row['split']:<9} {', '.join(values)}")
        lines += [f"warning   {said}" for said in self.warnings]
        if self.device:
            fewest, most = self.workers
            workers = f"{fewest}" if fewest == most else f"{fewest} to {most}"
            lines += [
                f"work      {self.epochs} epochs of {self.steps} steps of {self.crops} "
                f"crops; workers {workers}, trainings {self.trainings}",
                f"speed     {self.crops_per_second:.1f} crops/s by one process on "
                f"{self.device}",
                f"epoch     {_span(self.epoch_seconds)}",
                f"time      {_span(self.seconds)}",
                f"memory    {self.host_bytes / 2**30:.1f} GiB of a process"
                + (f", {self.device_bytes / 2**30:.1f} GiB of the GPU")
                * bool(self.device_bytes),
            ]
        lines += [
            f"out       {self.out}: nothing was written",
            f"{self.state}, {self.epoch} of {self.epochs} epochs done",
        ]
        return "\n".join(lines)


def _span(seconds: tuple[float, float]) -> str:
    return f"{seconds[0]:.0f} to {seconds[1]:.0f} s"


def dry_train(
    recipe: str,
    *,
    data: str,
    out: str,
    overrides: Sequence[str] = (),
    repeats: int = 1,
) -> TrainPlan:
    """Return what `train` would do by the same arguments, without doing it.

    Args:
        recipe: Name or path.
        data: Dataset.
        out: Model folder; it says what was done before.
        overrides: Keys of the recipe to change.
        repeats: Trainings with other seeds.

    Raises:
        ConfigError: As `train`, before it starts.
        TrainingError: A step fails, for example for want of memory.
    """
    found = rehearse_training(
        recipe, data=data, out=out, overrides=overrides, repeats=repeats
    )
    plan = TrainPlan(
        out=files.absolute(out),
        state="was there already",
        epoch=0,
        epochs=0,
        splits=[],
        warnings=[],
        steps=0,
        crops=0,
        trainings=0,
        workers=(1, 1),
        device="",
        crops_per_second=0.0,
        epoch_seconds=(0.0, 0.0),
        seconds=(0.0, 0.0),
        host_bytes=0,
        device_bytes=0,
    )
    if isinstance(found, Training):
        return replace(plan, epoch=found.epochs, epochs=found.epochs)
    settings, times = found.recipe, found.times
    step_s = statistics.median(times.step_s)
    epoch_s = _epoch_span(found)
    begun = bool(found.epoch or found.step)
    return replace(
        plan,
        state="goes on" if begun else "new",
        epoch=found.epoch,
        epochs=settings.schedule.epochs,
        splits=_splits(found, files.absolute(data)),
        warnings=found.warnings,
        steps=found.steps,
        crops=settings.batch,
        trainings=1 + found.others,
        workers=(settings.fewest, settings.most),
        device=times.device,
        crops_per_second=settings.batch / step_s,
        epoch_seconds=epoch_s,
        seconds=_span_of_all(found, epoch_s),
        host_bytes=times.host_bytes,
        device_bytes=times.device_bytes,
    )


def _epoch_span(found: RehearsedTraining) -> tuple[float, float]:
    """Return least and most seconds of an epoch; crops that grow are averaged.

    At least, workers share steps without loss and crops are read meanwhile; at most
    each step waits for its crops, and workers without GPUs share one machine.
    """
    times, settings = found.times, found.recipe
    sides = found.sides or [times.crop]
    scale = float(np.mean([(side / times.crop) ** 2 for side in sides]))
    checking = found.val_batches * times.val_s
    least = found.steps * min(times.step_s) * scale + checking
    waiting = statistics.median(times.step_s) + times.read_s
    most = found.steps * waiting * scale + checking
    slow = _EFFICIENCY_CPU
    if times.device_bytes:
        slow = _EFFICIENCY * settings.fewest
    return least / settings.most, most / slow


def _span_of_all(
    found: RehearsedTraining, epoch_s: tuple[float, float]
) -> tuple[float, float]:
    """Return least and most seconds of what is left of all trainings."""
    schedule = found.recipe.schedule
    earliest = min(schedule.epochs, schedule.first_epochs[-1] + schedule.patience)
    left = len(found.sides) - found.step / found.steps if found.sides else 0.0
    fewest = min(left, max(0, earliest - found.epoch))
    least = (fewest + found.others * earliest) * epoch_s[0]
    most = (left + found.others * schedule.epochs) * epoch_s[1]
    return least, most + _START_S * (1 + found.others)


def _splits(found: RehearsedTraining, data: str) -> list[Row]:
    """Return one row each for train and val."""
    of_images = holds_images(data)
    groups = {row["slide"]: row.get("group") for row in read_slides(data)}
    rows = []
    for split, patches in found.patches.items():
        slides = {patch["slide"] for patch in patches}
        patients = {groups[slide] or ("", slide) for slide in slides}
        pixels = np.sum([patch["class_px"] for patch in patches], axis=0).tolist()
        row: Row = {"split": split, "patches": len(patches), "slides": len(slides)}
        if of_images:
            patients = {patch["patient"] for patch in patches}
            counts = np.sum([np.array(p["class_px"]) > 0 for p in patches], axis=0)
            pixels = counts.tolist()
        row["patients"] = len(patients)
        kind = "images" if of_images else "px"
        named = zip(found.classes, pixels, strict=True)
        rows.append(row | {f"{kind}_{name}": count for name, count in named})
    return rows
