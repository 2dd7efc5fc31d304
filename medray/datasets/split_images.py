"""Splits of images: copies are left out, patients stay together."""

from __future__ import annotations

import logging
import re

from medray.datasets.splits import split_slides
from medray.errors import ConfigError
from medray.types import Row

log = logging.getLogger(__name__)


def leave_out_copies(images: list[Row]) -> None:
    """Mark copies; of equal images one of `test` stays, so that none leaks from it."""
    first: dict[str, Row] = {}
    across: dict[tuple[str, str], list[str]] = {}
    order = {"test": 0, "val": 1, "train": 2, "": 3}
    for row in sorted(images, key=lambda row: order[row["split"]]):
        if row["status"] != "done":
            continue
        kept = first.setdefault(row["digest"], row)
        if kept is row:
            continue
        row |= {"status": "copy", "message": f"the same bytes as {kept['image']}"}
        if row["split"] and kept["split"] != row["split"]:
            pair = f"{row['image']} and {kept['image']}"
            across.setdefault((row["split"], kept["split"]), []).append(pair)
        if kept["class"] != row["class"]:
            log.warning(
                "%s (%s) has the same bytes as %s (%s); the first is left out",
                row["image"],
                row["class"],
                kept["image"],
                kept["class"],
            )
    for (split, other), pairs in across.items():
        log.warning(
            "%d images of %s are copies of images of %s, such as %s; they are left "
            "out of %s",
            len(pairs),
            split,
            other,
            pairs[0],
            split,
        )


def set_patients(images: list[Row], patients: str, known: dict[str, str]) -> None:
    """Set the patient of each image: from the table, else from its name."""
    try:
        pattern = re.compile(patients)
    except re.error as error:
        raise ConfigError(
            f"patients: {patients!r} is no regular expression: {error}"
        ) from error
    for row in images:
        name = row["image"].rpartition("/")[2]
        found = pattern.search(name) if patients else None
        if patients and found is None:
            raise ConfigError(
                f"patients: {patients!r} finds nothing in the name {name}; it must "
                f"find the patient of every image"
            )
        patient = found[1 if pattern.groups else 0] if found else row["image"]
        row["patient"] = known.get(row["image"], patient)


def deal_out(
    images: list[Row],
    *,
    given: bool,
    fractions: tuple[float, float, float],
    seed: int,
) -> None:
    """Assign a split to every image without one; with `given` they stay without."""
    good = [row for row in images if row["status"] == "done"]
    if not given and not any(row["split"] for row in images):
        _deal(good, fractions, seed)
    elif not given and not any(row["split"] == "val" for row in images):
        train = fractions[0] / (fractions[0] + fractions[1])
        rest = [row for row in good if row["split"] == "train"]
        _deal(rest, (train, 1 - train, 0.0), seed)
    where: dict[str, set[str]] = {}
    for row in good:
        if row["split"]:
            where.setdefault(row["patient"], set()).add(row["split"])
    both = sorted(patient for patient, found in where.items() if len(found) > 1)
    if both:
        log.warning(
            "%d patients have images in several splits, such as %s in %s",
            len(both),
            both[0],
            sorted(where[both[0]]),
        )


def _deal(images: list[Row], fractions: tuple[float, float, float], seed: int) -> None:
    rows = [
        {"slide": row["image"], "group": row["patient"], "stratum": row["class"]}
        for row in images
    ]
    split_of = split_slides(rows, fractions=fractions, seed=seed)
    for row in images:
        row["split"] = split_of[row["image"]]
