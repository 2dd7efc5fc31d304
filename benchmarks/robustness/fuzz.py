"""Coverage-guided fuzzing of the readers of untrusted files.

Needs atheris (pip install atheris). An input that ends in anything but a success or an
error of medray's is a finding; it is written to the working directory as crash-DIGEST,
and belongs into tests/networks/slides/test_hostile.py.

Run: python -m benchmarks.robustness.fuzz --target annotations --seconds 600
     python -m benchmarks.robustness.fuzz --target tiff --seconds 600
"""

import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Literal

from benchmarks import harness
from medray.classes import Classes
from medray.errors import MedrayError
from medray.slides.limits import bound_memory
from medray.storage import files

CLASSES = Classes()


def read_annotation(data: bytes) -> None:
    from medray import annotations

    files.write_bytes("memory://a.any", data)
    try:
        areas = annotations.read_annotation(
            "memory://a.any", height=260, width=300, classes=CLASSES
        )
        place = {"y": 0, "x": 0, "height": 260, "width": 300}
        annotations.rasterise(areas, CLASSES, **place)
    except (MedrayError, MemoryError):
        pass


def read_tiff(data: bytes) -> None:
    from medray import slides

    files.write_bytes("memory://a.tif", data)
    try:
        with slides.open_slide("memory://a.tif", reader="tifffile") as slide:
            for level, size in enumerate(slide.levels[:3]):
                height, width = min(300, size.height), min(300, size.width)
                slide.read(0, 0, height, width, level)
    except (MedrayError, MemoryError):
        pass


TARGETS = {"annotations": read_annotation, "tiff": read_tiff}


def main(target: Literal["annotations", "tiff"], seconds: int = 600) -> None:
    """Search for inputs that end in anything but a success or an error of medray's.

    Args:
        target: What reads the inputs.
        seconds: How long to search.
    """
    import atheris

    with atheris.instrument_imports(
        include=["medray.annotations", "medray.slides", "tifffile", "svgelements"]
    ):
        import tifffile  # noqa: F401

        from medray import annotations, slides  # noqa: F401
    sys.path.insert(0, str(harness.ROOT / "tests"))
    import hostile

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    bound_memory()
    with tempfile.TemporaryDirectory() as corpus:
        texts = (hostile.SVG, json.dumps(hostile.GEOJSON), hostile.ASAP)
        seeds = hostile.tiff_seeds()
        if target == "annotations":
            seeds = [text.encode() for text in texts] + seeds[-2:]
        for index, seed in enumerate(seeds):
            (Path(corpus) / f"{index}").write_bytes(seed)
        options = [f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=0"]
        options += ["-max_len=200000", "-print_final_stats=1", "-seed=1"]
        atheris.Setup([sys.argv[0], *options, corpus], TARGETS[target])
        atheris.Fuzz()


if __name__ == "__main__":
    harness.run(main)
