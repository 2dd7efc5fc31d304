"""Whether tonight's slides look like those before them, scanner by scanner.

A value of a slide is compared with the median of the same value over a reference, in
units of the reference's spread: 1.4826 times the median absolute deviation, which is
the standard deviation where values are normal, and does not follow outliers (Hampel
1974, doi:10.1080/01621459.1974.10482962).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.apps.nightly.catalog import QC
from medray.datasets import read_dataset, read_patches
from medray.slides import HED, Slide, find_tissue, open_slide, read_thumbnail

NIGHTS = 30
"""How many nights before tonight are the reference."""
LEAST = 20
"""A reference of fewer slides is not used."""
MOST_Z = 5.0
"""A distance of more spreads than this from the median is flagged."""

# All values lie near 0 to 1 (shares, optical densities). Where they hardly vary, less
# than this is no visible change.
_LEAST_SPREAD = 0.01
_THUMBNAIL = 1024
_LEAST_TISSUE_PX = 100
_STAINS = HED / np.linalg.norm(HED, axis=1, keepdims=True)


def run_values(row: dict[str, Any], classes: Sequence[str]) -> dict[str, float]:
    """Return what a run says of a finished slide.

    Args:
        row: Of the run's slides.parquet.
        classes: Names by label value.

    Returns:
        `share_CLASS` of what was predicted, but for class 0; and with `--quality`
        `uncertainty` and `disagreement` (of windows where they overlap). Each 0 to 1;
        empty where nothing was predicted.
    """
    looked_at = row["predicted_px"]
    if not looked_at:
        return {}
    shares = {f"share_{name}": row[f"px_{name}"] / looked_at for name in classes[1:]}
    layers = ("uncertainty", "disagreement")
    return shares | {name: row[name] for name in layers if row.get(name) is not None}


def class_shares(dataset: str) -> dict[str, dict[str, float]]:
    """Return `share_CLASS` of what is annotated in training slides, by slide.

    As of a run's slides: of the pixels of patches with tissue; but by people.

    Raises:
        ConfigError: It is no dataset, or not complete.
    """
    names = read_dataset(dataset).classes.names[1:]
    counts: dict[str, npt.NDArray[np.int64]] = {}
    for patch in read_patches(dataset, "train"):
        if patch["tissue"] > 0:
            of_classes = np.asarray(patch["class_px"], np.int64)
            counts[patch["slide"]] = counts.get(patch["slide"], 0) + of_classes
    return {
        slide: {
            f"share_{name}": float(share)
            for name, share in zip(names, count[1:] / count.sum(), strict=True)
        }
        for slide, count in counts.items()
    }


def stain_values(
    uri: str, scene: int | None = None, plane: int | None = None
) -> dict[str, float]:
    """Measure a slide's staining on its tissue, at a coarse level.

    Args:
        uri: The slide.
        scene: Which of several slides in the file; see `open_slide`.
        plane: Which of several focal planes.

    Returns:
        Mean and standard deviation over the pixels of the optical densities of
        haematoxylin and eosin (Ruifrok and Johnston 2001): `haematoxylin_mean`,
        `haematoxylin_sd`, `eosin_mean`, `eosin_sd`. Empty on a slide without tissue.

    Raises:
        SlideError: The slide cannot be read.
    """
    with open_slide(uri, scene=scene, plane=plane) as slide:
        return staining_of(slide)


def staining_of(slide: Slide) -> dict[str, float]:
    """Measure the staining of an open slide; see `stain_values`."""
    rgb, _, damaged = read_thumbnail(slide, _THUMBNAIL)
    pixels = rgb[find_tissue(rgb) & ~damaged].astype(np.float64)
    if len(pixels) < _LEAST_TISSUE_PX:
        return {}
    density = -np.log(np.maximum(pixels, 1) / 255)
    amounts = density @ np.linalg.inv(_STAINS)
    values = {}
    for i, stain in enumerate(("haematoxylin", "eosin")):
        values[f"{stain}_mean"] = float(amounts[:, i].mean())
        values[f"{stain}_sd"] = float(amounts[:, i].std())
    return values


@dataclass(frozen=True)
class SlideValues:
    """What is known of one slide.

    Attributes:
        slide: Its name.
        scanner: That made it.
        values: By name.
    """

    slide: str
    scanner: str
    values: dict[str, float]


@dataclass(frozen=True)
class Drift:
    """One value of one scanner's slides tonight, compared with a reference.

    Attributes:
        scanner: Whose slides.
        value: Which value.
        against: What the reference is.
        slides: How many slides of tonight have the value.
        median: Of tonight.
        reference_slides: How many slides the reference has.
        reference_median: Of the reference.
        spread: Of the reference: 1.4826 median absolute deviations, at least 0.01.
        z: How many spreads tonight's median lies from the reference's.
        flagged: That is more than `MOST_Z`.
        outliers: Slides that each lie further than that.
    """

    scanner: str
    value: str
    against: str
    slides: int
    median: float
    reference_slides: int
    reference_median: float
    spread: float
    z: float
    flagged: bool
    outliers: tuple[str, ...]


def watched(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values that are watched for drift.

    Those of quality control have limits of their own; of them only focus is watched.
    """
    return {
        name: value
        for name, value in values.items()
        if not name.startswith(QC) or name == f"{QC}focus"
    }


def stain_distance(
    values: Mapping[str, float], training: Sequence[Mapping[str, float]]
) -> float | None:
    """Return how far a slide's staining lies from that of the training slides.

    Returns:
        Of the values of `stain_values` the one that lies furthest from the median, in
        spreads; None if fewer than `LEAST` training slides have it.
    """
    distances = []
    for name, value in values.items():
        known = [slide[name] for slide in training if name in slide]
        if len(known) >= LEAST:
            center, spread = _center_and_spread(known)
            distances.append(abs(value - center) / spread)
    return max(distances, default=None)


def _center_and_spread(known: Sequence[float]) -> tuple[float, float]:
    center = float(np.median(known))
    spread = 1.4826 * float(np.median(np.abs(np.array(known) - center)))
    return center, max(spread, _LEAST_SPREAD)


def watch(
    tonight: Iterable[SlideValues], before: Iterable[SlideValues], *, against: str
) -> list[Drift]:
    """Compare tonight's slides with those before, each scanner with itself.

    Args:
        tonight: The slides of one night.
        before: The reference.
        against: What the reference is called.

    Returns:
        One row per scanner and value with at least `LEAST` slides in the reference.
    """
    reference = _by_scanner_and_value(before)
    found = []
    for (scanner, name), values in sorted(_by_scanner_and_value(tonight).items()):
        known = [value for _, value in reference.get((scanner, name), [])]
        if len(known) < LEAST:
            continue
        center, spread = _center_and_spread(known)
        median = float(np.median([value for _, value in values]))
        z = (median - center) / spread
        outliers = (s for s, value in values if abs(value - center) / spread > MOST_Z)
        found.append(
            Drift(
                scanner=scanner,
                value=name,
                against=against,
                slides=len(values),
                median=median,
                reference_slides=len(known),
                reference_median=center,
                spread=spread,
                z=z,
                flagged=abs(z) > MOST_Z,
                outliers=tuple(outliers),
            )
        )
    return found


def _by_scanner_and_value(
    slides: Iterable[SlideValues],
) -> dict[tuple[str, str], list[tuple[str, float]]]:
    found: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for slide in slides:
        for name, value in slide.values.items():
            if np.isfinite(value):
                key = slide.scanner, name
                found.setdefault(key, []).append((slide.slide, value))
    return found


def as_text(drift: Drift) -> str:
    """Return what drifted, and how far, in words."""
    return (
        f"{drift.scanner}: {drift.value} {drift.median:.3f} tonight "
        f"({drift.slides} slides), {drift.reference_median:.3f} in {drift.against} "
        f"({drift.reference_slides} slides): {abs(drift.z):.1f} spreads "
        f"{'above' if drift.z > 0 else 'below'}"
    )
