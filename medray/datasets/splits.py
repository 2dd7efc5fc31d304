"""Splits of a dataset: train, val and test, never two of one patient apart."""

from __future__ import annotations

import csv
import io
import random
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from medray.errors import ConfigError
from medray.storage import files

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""The split that a name stands for, in lower case: in tables and of folders."""


def split_slides(
    slides: list[dict[str, Any]],
    *,
    fractions: tuple[float, float, float],
    seed: int,
    keep: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Assign each slide to train, val or test so that no group is in two of them.

    Groups (patients) are taken stratum by stratum (the set of classes that their
    slides hold) in an order fixed by the seed; each goes where most slides are still
    wanted. With three groups or more, no split with a fraction above 0 stays empty.

    Args:
        slides: Rows with `slide`, `group` and `stratum`.
        fractions: Wanted shares of slides in train, val and test.
        seed: Decides the order.
        keep: Split of groups that were assigned before; they stay where they are.

    Returns:
        Split by slide.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    strata: dict[str, set[str]] = defaultdict(set)
    for row in slides:
        groups[row["group"]].append(row["slide"])
        strata[row["group"]].add(row["stratum"])
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: "|".join(sorted(strata[group])))
    order.sort(key=lambda group: group not in (keep or {}))
    result: dict[str, str] = {}
    per_stratum: dict[tuple[str, int], int] = defaultdict(int)
    total = [0, 0, 0]
    for done, group in enumerate(order):
        stratum = "|".join(sorted(strata[group]))
        size = len(groups[group])
        here = sum(per_stratum[stratum, k] for k in range(3)) + size
        wanted = [
            (
                total[k] == 0
                and fractions[k] > 0
                and len(order) - done <= total.count(0),
                fractions[k] * here - per_stratum[stratum, k],
                fractions[k] * (sum(total) + size) - total[k],
                -k,
            )
            for k in range(3)
        ]
        best = max((k for k in range(3) if fractions[k] > 0), key=wanted.__getitem__)
        if keep and group in keep:
            best = SPLITS.index(keep[group])
        per_stratum[stratum, best] += size
        total[best] += size
        result |= dict.fromkeys(groups[group], SPLITS[best])
    return result


def read_groups(uri: str, column: str) -> dict[str, str]:
    """Read a CSV with the columns `slide` and `column` into a dictionary.

    Raises:
        ConfigError: The file or a column is missing, or a slide has two values.
    """
    try:
        text = files.read_bytes(uri).decode("utf-8-sig")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ConfigError(f"{uri}: expected a CSV file ({error})") from error
    # newline="": line ends of all systems are the reader's business.
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        names, rows = reader.fieldnames or [], list(reader)
    except csv.Error as error:
        raise ConfigError(f"{uri}: expected a CSV file ({error})") from error
    if "slide" not in names or column not in names:
        raise ConfigError(
            f"{uri}: expected the columns slide and {column}, found {list(names)}"
        )
    values: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        slide, value = row["slide"], row[column]
        if slide is None or value is None:
            raise ConfigError(
                f"{uri}: row {number} has fewer columns than the {len(names)} of the "
                f"first; expected slide and {column} in each"
            )
        if values.setdefault(slide, value) != value:
            raise ConfigError(
                f"{uri}: slide {slide} has two values of {column}: "
                f"{values[slide]} and {value}"
            )
    return values


def read_splits(uri: str) -> dict[str, str]:
    """Read a CSV (slide,split).

    Raises:
        ConfigError: The file or a column is missing, or a split is none.
    """
    splits = read_groups(uri, "split")
    wrong = sorted(set(splits.values()).difference(SPLITS))
    if wrong:
        raise ConfigError(f"{uri}: expected the splits {SPLITS}, found {wrong}")
    return splits


def check_fractions(fractions: tuple[float, float, float]) -> None:
    """Check the shares of train, val and test.

    Raises:
        ConfigError: They are no shares, or do not sum to 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(
            f"fractions: expected three shares of train, val and test that sum to 1, "
            f"found {list(fractions)}"
        )
