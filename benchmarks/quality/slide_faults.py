"""How well slide quality control finds faults that a script has made.

Slides of four generated sections (2 mm a side at 0.5 um per pixel), and real fields of
H&E where there are some, each once as it is and once with each fault of
medray.datasets.synthetic_faults. A flag is right if the slide has a fault of its kind.
Limits were set on generated slides of other seeds (1000 to 1007, 5000 to 5011); faults
were first drawn on the same four real slides.

    python -m benchmarks.quality.slide_faults --record faults.json
    python -m benchmarks.quality.slide_faults --real SLIDE.svs FIELD.tiff

Faults were drawn by the authors of the measures, so the figures say that the measures
do what they should and where their limits lie, not how good they are in a laboratory.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy import ndimage

from benchmarks import harness
from medray.apps.nightly.drift import stain_distance, staining_of
from medray.datasets.synthetic_faults import FAULTS
from medray.datasets.synthetic_scene import draw_scene
from medray.slides import ArraySlide, open_slide
from medray.slides.base import Mpp
from medray.slides.quality import measure_quality
from medray.slides.quality_limits import QualityLimits, judge
from medray.types import UInt8

KINDS = {  # values by the kind of fault that they look for
    "blur": ("focus", "blurred_share"),
    "pen": ("pen_share",),
    "fold": ("fold_share",),
    "bubble": ("bubble_share",),
    "tissue": ("tissue_share", "tissue_mm2"),
    "stain": ("stain_distance",),
}
_TRAINING = 24
WHOLE = ("blur 1 um", "blur 1.5 um", "blur 3 um")


def main(
    slides: int = 20,
    first: int = 9000,
    faults: tuple[str, ...] = (),
    real: tuple[Path, ...] = (),
) -> Iterator[harness.Result]:
    """Measure precision and recall of each flag at the default limits.

    Args:
        slides: Number of generated slides.
        first: Seed of the first.
        faults: Only these; none: all.
        real: Slides and fields to draw faults on, too, each three times.
    """
    names = [*(faults or FAULTS)]
    generated = list(_generated(slides, first, names))
    yield {"slides": "generated", **_scores(generated)}
    fields = list(_real(real, first, names))
    if fields:
        yield {"slides": "real", **_scores(fields)}
    yield {
        "what": "ROC AUC of blur of the whole slide against slides without blur",
        **{
            name: _auc(
                [row for row in generated + fields if row[1][name] is not None], name
            )
            for name in ("focus", "laplacian")
        },
    }


Measured = tuple[str, dict[str, float | None], float]
"""Name of the fault ("" if none), values, seconds."""


def _auc(found: list[Measured], name: str) -> float:
    """Return how often a blurred slide has the lower value of two."""
    blurred = [v[name] for f, v, _ in found if f in WHOLE]
    sharp = [v[name] for f, v, _ in found if f in ("", "stain")]
    pairs = np.subtract.outer(np.array(sharp, float), np.array(blurred, float))
    return float(np.mean((pairs > 0) + (pairs == 0) / 2))


def _generated(slides: int, first: int, faults: list[str]) -> Iterator[Measured]:
    scenes = (draw_scene(first + 500 + i, artefacts=False) for i in range(_TRAINING))
    training = [staining_of(ArraySlide(scene.pixels)) for scene in scenes]
    for seed in range(first, first + slides):
        quarter = draw_scene(seed, artefacts=False, tumour=seed % 3 > 0).pixels
        half = np.concatenate([quarter, quarter[:, ::-1]], axis=1)
        pixels = np.concatenate([half, half[::-1]])
        yield from _with_faults(pixels, seed, faults, training)


def _real(paths: tuple[Path, ...], first: int, faults: list[str]) -> Iterator[Measured]:
    for path in paths:
        with open_slide(str(path)) as slide:
            level = slide.levels[0]
            pixels = slide.read(0, 0, level.height, level.width)
        for seed in range(first, first + 3):
            yield from _with_faults(pixels, seed, faults, [])


def _with_faults(
    pixels: UInt8, seed: int, faults: list[str], training: list[dict[str, float]]
) -> Iterator[Measured]:
    for number, name in enumerate(["", *faults]):
        rng = np.random.default_rng([seed, number])
        slide = ArraySlide(FAULTS[name][1](pixels, rng) if name else pixels)
        slide.resolution = Mpp(0.5, 0.5, "drawn")
        start = time.perf_counter()
        values = dict(vars(measure_quality(slide)))
        seconds = time.perf_counter() - start
        values["stain_distance"] = stain_distance(staining_of(slide), training)
        values["laplacian"] = None
        if name in ("", "stain", *WHOLE):
            values["laplacian"] = _laplacian(slide.read(0, 0, *pixels.shape[:2]))
        yield name, values, seconds


def _laplacian(rgb: UInt8) -> float:
    """Return the variance of the Laplacian of the grey image where there is tissue."""
    tissue = rgb.max(axis=2) - rgb.min(axis=2) > 20
    return float(ndimage.laplace(rgb.mean(axis=2, dtype=np.float32))[tissue].var())


def _scores(found: list[Measured]) -> Mapping[str, object]:
    """Return precision and recall by kind, recall by fault, and who was flagged."""
    limits = QualityLimits()
    flagged = [judge(values, limits).flagged for _, values, _ in found]
    kind_of = [FAULTS[name][0] if name else "" for name, _, _ in found]
    rows: dict[str, object] = {}
    for kind, names in KINDS.items():
        if all(values[name] is None for _, values, _ in found for name in names):
            continue  # staining without training slides
        said = np.array(
            [any(f"{name} " in words for name in names) for words in flagged]
        )
        has = np.array([kind == other for other in kind_of])
        right = int((said & has).sum())
        rows[kind] = {
            "slides_with": int(has.sum()),
            "flagged": int(said.sum()),
            "right": right,
            "precision": right / max(1, int(said.sum())),
            "recall": right / max(1, int(has.sum())),
            "wrong": sorted(
                {
                    name or "none"
                    for (name, *_), s, h in zip(found, said, has, strict=True)
                    if s and not h
                }
            ),
        }
    by_fault = {
        fault: {
            name: [
                round(float(q), 4) for q in np.quantile(seen, (0, 0.25, 0.5, 0.75, 1))
            ]
            for name in sum(KINDS.values(), ())
            if (
                seen := [
                    v[name] for f, v, _ in found if f == fault and v[name] is not None
                ]
            )
        }
        for fault in dict.fromkeys(name for name, *_ in found)
    }
    recalls = {
        fault: float(
            np.mean(
                [
                    any(f"{name} " in words for name in KINDS[FAULTS[fault][0]])
                    for (other, *_), words in zip(found, flagged, strict=True)
                    if other == fault
                ]
            )
        )
        for fault in by_fault
        if fault and FAULTS[fault][0] in rows
    }
    clean = [
        words for (name, *_), words in zip(found, flagged, strict=True) if not name
    ]
    return {
        "measured": len(found),
        "kinds": rows,
        "recall_by_fault": recalls,
        "clean_slides": len(clean),
        "clean_slides_flagged": sum(map(bool, clean)),
        "seconds_per_slide": float(np.median([s for *_, s in found])),
        "quantiles": by_fault,
    }


if __name__ == "__main__":
    harness.run(main)
