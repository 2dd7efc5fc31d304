"""Two runs in numbers: their masks region by region, their scores, their settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medray.errors import ConfigError, FormatError
from medray.evaluation.metrics import Counts, class_scores, confusion, summary
from medray.geometry import plan_regions
from medray.inference import RunSettings, mask_uri, read_run
from medray.storage import Ledger, files, flat, ome_zarr, to_dict
from medray.types import Row


@dataclass(frozen=True)
class Difference:
    """How two runs differ.

    Attributes:
        out: The first run.
        other: The second.
        compared: How many slides were compared.
        changed: Of each slide that changed its regions: [y, x, height, width] in pixels
            of the mask, and how many pixels changed.
        agreement: Of each class: f1 (Dice) and iou between the two masks, and its
            pixels in each.
        not_compared: Why some slides cannot be compared: only one run has them, or in
            another size or of another image of the file, or a mask is damaged.
    """

    out: str
    other: str
    compared: int
    changed: dict[str, list[tuple[list[int], int]]]
    agreement: list[dict[str, Any]]
    not_compared: dict[str, str]

    def __str__(self) -> str:
        lines = [f"cannot   {slide}: {why}" for slide, why in self.not_compared.items()]
        for slide, regions in self.changed.items():
            for (y, x, height, width), pixels in regions:
                where = f"y={y} x={x} {height} x {width}"
                lines.append(f"changed  {slide} {where}: {pixels} pixels")
        for row in self.agreement:
            f1 = "none" if row["f1"] is None else f"{row['f1']:.5f}"
            pixels_of_both = f"{row['px']} and {row['other_px']} pixels"
            lines.append(f"class    {row['class']}: F1 {f1}, {pixels_of_both}")
        lines.append(f"{self.compared} slides compared, {len(self.changed)} differ")
        return "\n".join(lines)


def diff(out: str, other: str) -> Difference:
    """Compare the masks of two runs, region by region of the first.

    Args:
        out: Folder of a run, from `medray infer`.
        other: Folder of another of the same classes.

    Raises:
        ConfigError: One is no run, or their classes differ.
    """
    runs = [files.absolute(run) for run in (out, other)]
    settings = [read_run(run) for run in runs]
    classes = settings[0].classes
    if settings[1].classes.names != classes.names:
        raise ConfigError(
            f"{other}: has the classes {list(settings[1].classes.names)}, {out} has "
            f"{list(classes.names)}; only runs of the same classes can be compared"
        )
    ledgers = [Ledger(run) for run in runs]
    done = [
        {s: row for s, row in ledger.slides.items() if row["status"] == "done"}
        for ledger in ledgers
    ]
    not_compared = {
        slide: f"not done in {run}"
        for run, mine, other in zip(runs, done, done[::-1], strict=True)
        for slide in other.keys() - mine.keys()
    }
    counts = np.zeros((len(classes), len(classes)), np.int64)
    changed = {}
    compared = 0
    for slide in sorted(done[0].keys() & done[1].keys()):
        try:
            one, two = (ome_zarr.open_level(mask_uri(run, slide)) for run in runs)
            for what in ("scene", "plane"):
                ours, theirs = (of[slide].get(what) for of in done)
                if ours != theirs:
                    raise FormatError(f"{what} {ours} here, {theirs} there")
            if one.shape != two.shape:
                raise FormatError(f"{one.shape} pixels here, {two.shape} there")
            regions, confused = _compare(one, two, settings[0])
        except FormatError as error:
            not_compared[slide] = f"{error}"
            continue
        compared += 1
        counts += confused
        if regions:
            changed[slide] = regions
    agreement = [
        {
            "class": name,
            "f1": scores["f1"],
            "iou": scores["iou"],
            "px": int(counts[value].sum()),
            "other_px": int(counts[:, value].sum()),
        }
        for value, (name, scores) in enumerate(
            zip(classes.names, class_scores(counts, classes.names), strict=True)
        )
    ]
    return Difference(runs[0], runs[1], compared, changed, agreement, not_compared)


def _compare(
    one: ome_zarr.Pixels, two: ome_zarr.Pixels, settings: RunSettings
) -> tuple[list[tuple[list[int], int]], Counts]:
    """Return the regions that differ, how many pixels do, and the confusion of all."""
    classes = len(settings.classes)
    counts = np.zeros((classes, classes), np.int64)
    changed = []
    height, width = one.shape
    for region in plan_regions(height, width, settings.options.region):
        parts = one[region.slices()], two[region.slices()]
        counts += confusion(*parts, classes)
        if pixels := int((parts[0] != parts[1]).sum()):
            place = [region.y, region.x, region.height, region.width]
            changed.append((place, pixels))
    return changed, counts


def pair_counts(
    before: Mapping[str, Counts | None], after: Mapping[str, Counts | None]
) -> tuple[list[str], list[Counts]]:
    """Return the slides that both counted, and their counts: (N, C, C) of each run."""
    slides = []
    pairs = []
    for slide, ours in sorted(before.items()):
        theirs = after.get(slide)
        if ours is not None and theirs is not None:
            slides.append(slide)
            pairs.append((ours, theirs))
    if not pairs:
        return [], []
    return slides, [*np.array(pairs, np.int64).swapaxes(0, 1)]


def rows_of(
    settings: Sequence[RunSettings],
    masks: Difference,
    run: str,
    slides: Sequence[str],
    counts: Sequence[Counts],
) -> list[Row]:
    """Return one row per slide: the largest loss first, or else the largest change."""
    names = settings[0].classes.names
    table = files.read_table(files.join(run, "slides.parquet")).to_pylist()
    done = {row["slide"]: row for row in table if row["status"] == "done"}
    scores = {
        slide: [summary(side[k], names)["f1"] for side in counts]
        for k, slide in enumerate(slides)
    }
    rows = []
    for slide in sorted(done.keys() - masks.not_compared.keys()):
        pixels = done[slide]["height"] * done[slide]["width"]
        changed = sum(count for _, count in masks.changed.get(slide, []))
        ours, theirs = scores.get(slide, (None, None))
        moved = None if ours is None or theirs is None else theirs - ours
        rows.append(
            {
                "slide": slide,
                "f1": ours,
                "other_f1": theirs,
                "difference": moved,
                "changed_px": changed,
                "changed": changed / pixels,
            }
        )
    rows.sort(
        key=lambda row: (
            row["difference"] is None,
            row["difference"] or 0.0,
            -row["changed"],
            row["slide"],
        )
    )
    return rows


def changed_settings(before: RunSettings, after: RunSettings) -> list[Row]:
    """Return the settings that differ: key, and its value in A and in B."""
    sides = [flat(to_dict(settings)) for settings in (before, after)]
    keys = [*sides[0], *(key for key in sides[1] if key not in sides[0])]
    return [
        {"key": key, "a": values[0], "b": values[1]}
        for key in keys
        if (values := [side.get(key, "-") for side in sides])[0] != values[1]
    ]
