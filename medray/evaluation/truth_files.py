"""Where the truth of each slide lies: a dataset's labels, or annotations by name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence

from medray.annotations import (
    list_annotations,
    match_names,
    slide_names,
)
from medray.classes import Classes
from medray.datasets import labels_uri, read_dataset
from medray.errors import ConfigError
from medray.slides import SlideFile
from medray.storage import files
from medray.types import Row

log = logging.getLogger(__name__)


def find_ground_truth(
    slides: Sequence[SlideFile], truth: str, classes: Classes, split: str | None = None
) -> tuple[dict[str, str], str]:
    """Return the address of each slide's truth by its id, and what they all are.

    Args:
        slides: All of a run.
        truth: Dataset, or folder of annotations named like the slides.
        classes: Of the model.
        split: With a dataset: only its slides of this split.

    Returns:
        The addresses, and `labels` (of a dataset) or `annotation`.

    Raises:
        ConfigError: The dataset has other classes, there is a split but no dataset, or
            one truth could be that of several slides.
    """
    names, kind = list_ground_truth(truth, classes, split)
    matched = match_names(slides, names)
    if kind == "labels":
        _check_same_images(slides, matched, truth)
    return matched, kind


def _check_same_images(
    slides: Sequence[SlideFile], matched: Mapping[str, str], truth: str
) -> None:
    """Raise an error for a truth made of another image of a slide's file."""
    rows = files.read_table(files.join(truth, "slides.parquet")).to_pylist()
    chosen_of = {labels_uri(truth, row["slide"]): row for row in rows}
    for file in slides:
        row = chosen_of.get(matched.get(file.slide, ""), {})
        for what, ours in (("scene", file.scene), ("plane", file.plane)):
            if row and row.get(what) != ours:
                raise ConfigError(
                    f"{truth}: {row['slide']} was made with {_said(what, row[what])}, "
                    f"the run of {file.uri} with {_said(what, ours)}; expected the "
                    f"same image of the file: make one of them again as the other"
                )


def _said(what: str, number: int | None) -> str:
    return f"no --{what}" if number is None else f"--{what} {number}"


def list_ground_truth(
    truth: str, classes: Classes, split: str | None = None
) -> tuple[dict[str, list[str]], str]:
    """Return the names of each truth by its address, and what they all are.

    Args, kinds and errors are those of `find_ground_truth`; the names are what
    `medray.annotations.matching.match_names` takes.
    """
    if files.exists(files.join(truth, "dataset.yaml")):
        return _dataset_truth(truth, classes, split), "labels"
    if split is not None:
        raise ConfigError(f"{truth}: --split needs a dataset, this is none")
    return list_annotations(truth), "annotation"


def name_in(slide: str, places: Mapping[str, str]) -> str | None:
    """Return the name by which `places` has a slide, with or without its folder."""
    names = (slide, slide.rpartition("__")[2])
    return next((name for name in names if name in places), None)


def _dataset_truth(
    truth: str, classes: Classes, split: str | None
) -> dict[str, list[str]]:
    settings = read_dataset(truth)
    if settings.classes != classes:
        raise ConfigError(
            f"{truth}: its classes {list(settings.classes.names)} are not the model's "
            f"{list(classes.names)}"
        )
    rows = [
        row
        for row in files.read_table(files.join(truth, "slides.parquet")).to_pylist()
        if row["status"] == "done" and row["annotated"]
        if split is None or row["split"] == split
    ]
    partly = [row["slide"] for row in rows if row.get("partly")]
    if partly:
        log.warning(
            "%s: %d slides are annotated only in part (%s ...); as the truth give "
            "their annotations instead of the dataset",
            truth,
            len(partly),
            partly[0],
        )
    return {
        labels_uri(truth, row["slide"]): slide_names(
            SlideFile(row["slide"], row["uri"])
        )[:-2]
        for row in rows
        if not row.get("partly")
    }


def match_ground_truth(
    rows: list[Row], truth: str, classes: Classes, split: str | None = None
) -> list[Row]:
    """Return the run's rows that have a truth, with `truth` and `kind` added.

    Args:
        rows: Of the run's slides.parquet, all of them: what belongs to one slide is
            not free for another.
        truth: Dataset, or folder of annotations named like the slides.
        classes: Of the run.
        split: With a dataset: only its slides of this split.

    Raises:
        ConfigError: The request is wrong, no row has a truth, or one truth could be
            that of several.
    """
    slides = [
        SlideFile(row["slide"], row["uri"], None, row.get("scene"), row.get("plane"))
        for row in rows
    ]
    places, kind = find_ground_truth(slides, truth, classes, split)
    matched = [
        row | {"truth": places[row["slide"]], "kind": kind}
        for row in rows
        if row["slide"] in places
    ]
    if not matched:
        raise ConfigError(
            f"none of the {len(rows)} slides of the run has a truth in {truth}; "
            f"expected files named like the slides, such as {rows[0]['slide']}.svg"
            if rows
            else "the run holds no slides"
        )
    if len(matched) < len(rows):
        log.warning("%d slides have no truth", len(rows) - len(matched))
    return matched


def with_truth(slides: Iterable[SlideFile], truth: str, classes: Classes) -> set[str]:
    """Return the ids of the slides that have a truth.

    Args:
        slides: All that may have one, as in a run.
        truth: Dataset, or folder of annotations named like the slides.
        classes: Of the model.

    Raises:
        ConfigError: The dataset has other classes, or one truth could be that of
            several slides.
    """
    places, _ = find_ground_truth(list(slides), truth, classes)
    return set(places)
