"""The row of a finished slide in slides.parquet, summed up from its regions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medray.errors import SlideError
from medray.slides import MPP_COLUMNS
from medray.storage import (
    add_note,
)
from medray.types import Row

# What a slide's row tells of how it was read.
WORKING = (
    "level",
    "scale",
    "downsample",
    "mpp",
    *MPP_COLUMNS,
    "height",
    "width",
    "level0_height",
    "level0_width",
    "regions",
    "note",
)


def start_row(header: Row, regions: list[Row]) -> Row:
    """Begin the row of a slide that a model has looked at.

    Args:
        header: The slide's facts.
        regions: Records of its regions.

    Returns:
        `WORKING`, how long its regions took, and when the first was read and the last
        written; seconds.
    """
    row = {key: header[key] for key in WORKING}
    for part in ("read_s", "predict_s", "waited_s", "write_s"):
        row[part] = sum(region.get(part, 0.0) for region in regions)
    row["first_read_at"] = min((r["read_at"] for r in regions), default=None)
    row["last_write_at"] = max((r["written_at"] for r in regions), default=None)
    return row


def slide_row(header: Row, regions: list[Row]) -> Row:
    """Sum up a finished slide for slides.parquet.

    Raises:
        SlideError: Nothing of the slide could be read.
    """
    row = start_row(header, regions)
    total = header["height"] * header["width"]
    unreadable = sum(region.get("unreadable_px", 0) for region in regions)
    if unreadable and unreadable >= sum(sum(region["class_px"]) for region in regions):
        raise SlideError(next(r["why"] for r in regions if "why" in r))
    if unreadable:
        why = next(r["why"] for r in regions if r.get("unreadable_px"))
        add_note(row, f"{unreadable / total:.2%} of its pixels cannot be read: {why}")
    row["unreadable_px"] = unreadable
    classes = header["classes"]
    counts = np.zeros(len(classes), np.int64)
    for region in regions:
        counts += np.asarray(region["class_px"])
    counts[0] += total - counts.sum()
    for one in (header, *regions):  # what finishing added
        counts = np.asarray(one.get("cleaned_px", counts))
        row["merkle_root"] = one.get("merkle_root", row.get("merkle_root"))
    row |= {f"px_{name}": int(n) for name, n in zip(classes, counts, strict=True)}
    looked_at = sum(region["predicted_px"] for region in regions)
    row["predicted_px"] = looked_at
    counts[0] = max(0, looked_at - int(counts[1:].sum()))
    row["label"] = classes[int(counts.argmax())] if looked_at else classes[0]
    for layer, most in (("uncertainty", 255), ("disagreement", 1)):
        if looked_at and regions[0].get(f"{layer}_sum") is not None:
            total = sum(region[f"{layer}_sum"] for region in regions)
            row[layer] = total / most / looked_at
    if looked_at and all("p_sum" in region for region in regions):
        row |= _probabilities(regions, classes, looked_at)
    row["windows"] = sum(region.get("windows", 0) for region in regions)
    return row


def _probabilities(
    regions: list[Row], classes: Sequence[str], looked_at: int
) -> dict[str, float]:
    """Return the mean and highest probability of each class, where it was looked."""
    sums = np.sum([region["p_sum"] for region in regions], axis=0) / 255 / looked_at
    most = np.max([region["p_max"] for region in regions], axis=0) / 255
    row: dict[str, float] = {}
    for name, mean, highest in zip(classes, sums, most, strict=True):
        row |= {f"mean_p_{name}": float(mean), f"max_p_{name}": float(highest)}
    return row
