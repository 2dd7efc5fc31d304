"""Limits of slide quality control: what is flagged, and what is quarantined."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from medray.errors import ConfigError
from medray.slides.quality import BLURRED
from medray.storage import from_dict, read_yaml, to_dict

LEAST = ("tissue_share", "tissue_mm2", "focus")
"""Of these a lower value is worse, of all others a higher one."""


@dataclass(frozen=True)
class Limit:
    """Limits of one value; None: there is none.

    Attributes:
        flag: A slide that is worse is predicted and named on the night's page.
        quarantine: A slide that is worse is not predicted.
    """

    flag: float | None = None
    quarantine: float | None = None


@dataclass(frozen=True, kw_only=True)
class QualityLimits:
    """Limits of the values of `Quality`; by default slides are flagged only.

    Attributes:
        tissue_share: Least tissue, of the slide's pixels.
        tissue_mm2: Least tissue, square millimetres.
        focus: Least median focus.
        blurred_share: Most fields that are blurred.
        pen_share: Most ink of marker pens, of tissue and ink.
        fold_share: Most folds, of the tissue.
        bubble_share: Most air bubbles, of tissue and bubbles.
        stain_distance: Furthest staining from that of the training slides, in spreads.
    """

    tissue_share: Limit = Limit(flag=0.002)
    tissue_mm2: Limit = Limit(flag=0.05)
    focus: Limit = Limit(flag=BLURRED)
    blurred_share: Limit = Limit(flag=0.25)
    pen_share: Limit = Limit(flag=0.01)
    fold_share: Limit = Limit(flag=0.003)
    bubble_share: Limit = Limit(flag=0.01)
    stain_distance: Limit = Limit(flag=4.0)

    def __post_init__(self) -> None:
        """Check that limits are numbers, and that the worse of two quarantines."""
        for name, limit in self.by_name().items():
            for kind in ("flag", "quarantine"):
                value = getattr(limit, kind)
                if value is not None and not (math.isfinite(value) and value >= 0):
                    raise ConfigError(
                        f"{name}.{kind}: expected a number of 0 or more, found {value}"
                    )
            if limit.flag is None or limit.quarantine is None:
                continue
            if _is_worse(name, limit.flag, limit.quarantine):
                side = "at most" if name in LEAST else "at least"
                raise ConfigError(
                    f"{name}.quarantine: expected {side} {name}.flag, "
                    f"{limit.flag:g}, found {limit.quarantine:g}: what is quarantined "
                    f"is worse than what is flagged"
                )

    def by_name(self) -> dict[str, Limit]:
        """Return the limits by the name of their value."""
        return {one.name: getattr(self, one.name) for one in fields(self)}


def read_limits(qc: str) -> QualityLimits:
    """Return the limits of a YAML file; what it leaves out is as by default.

    Args:
        qc: The file, such as `focus: {quarantine: 0.3}`; or `default`.

    Raises:
        ConfigError: There is no such file, an unknown key or a wrong value.
    """
    if qc == "default":
        return QualityLimits()
    values = to_dict(QualityLimits())
    for name, given in read_yaml(qc).items():
        known = values.get(name)
        if isinstance(known, dict) and isinstance(given, dict):
            given = known | given
        values[name] = given
    return from_dict(QualityLimits, values, qc)


@dataclass(frozen=True)
class Verdict:
    """What quality control says of a slide.

    Attributes:
        quarantined: Why it is not predicted, in words; "" if it is.
        flagged: What is flagged besides, in words; "" if nothing.
    """

    quarantined: str = ""
    flagged: str = ""


def judge(values: Mapping[str, float | None], limits: QualityLimits) -> Verdict:
    """Compare a slide's values with the limits; what was not measured breaks none."""
    said: dict[str, list[str]] = {"quarantine": [], "flag": []}
    for name, limit in limits.by_name().items():
        value = values.get(name)
        if value is None or math.isnan(value):
            continue
        for kind, words in said.items():
            bound = getattr(limit, kind)
            if bound is not None and _is_worse(name, value, bound):
                side = "below" if name in LEAST else "above"
                words.append(f"{name} {value:.3g} is {side} {bound:g}")
                break
    return Verdict("; ".join(said["quarantine"]), "; ".join(said["flag"]))


def _is_worse(name: str, value: float, bound: float) -> bool:
    return value < bound if name in LEAST else value > bound
