"""Splits of a dataset: train, val and test; each patient is in one split only."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from medray.errors import ConfigError
from medray.slides import scan_digest

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


def joined_groups(slides: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return slides with one group for all groups that share a scan.

    Args:
        slides: Rows with `group` and `digest`.

    Returns:
        The rows; the `group` of those that are joined is the first one by its name.
    """
    joined: dict[str, str] = {}

    def root(group: str) -> str:
        while joined.get(group, group) != group:
            group = joined[group]
        return group

    first: dict[str, str] = {}
    for row in slides:
        known = first.setdefault(scan_digest(row["digest"]), row["group"])
        low, high = sorted((root(known), root(row["group"])))
        joined[high] = low
    return [{**row, "group": root(row["group"])} for row in slides]


def kept_splits(slides: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the split that each group had before.

    Of a group with slides in several splits it is the first of train, val and test:
    what was learned from once never becomes a test.

    Args:
        slides: Rows with `group` and `split`; "" or None: it had none.
    """
    known = [row for row in slides if row.get("split")]
    known.sort(key=lambda row: -SPLITS.index(row["split"]))
    return {row["group"]: row["split"] for row in known}


def copies_apart(slides: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return a warning if the same scan is in two splits; else nothing.

    Args:
        slides: Rows with `slide`, `digest` and `split`; "" or None: it has none.
    """
    scans: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in slides:
        if row.get("split"):
            scans[scan_digest(row["digest"])].append(row)
    apart = [rows for rows in scans.values() if len({r["split"] for r in rows}) > 1]
    if not apart:
        return []
    named = " and ".join(f"{row['slide']} ({row['split']})" for row in apart[0])
    return [
        f"{len(apart)} scans are in more than one split, the same bytes under several "
        f"names, such as {named}: scores would be of what was learned from; put them "
        f"in one split, or remove all but one"
    ]


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
