"""Splits of a dataset: train, val and test, never two of one patient apart."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from medray.errors import ConfigError

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
"""Split by what people call it, in lower case."""


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
