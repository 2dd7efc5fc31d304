"""The truth of a slide: where it lies, and its labels in any rectangle."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from medray.annotations import (
    Annotation,
    list_annotations,
    match_names,
    rasterise,
    read_marks,
    slide_names,
)
from medray.classes import AnyClass, Classes
from medray.datasets import labels_uri, read_dataset
from medray.errors import ConfigError, SlideError
from medray.geometry import Rectangle
from medray.slides import SlideFile
from medray.storage import files, ome_zarr
from medray.types import Row, UInt8

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
    """Refuse a truth that was made of another image of a slide's file."""
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


def read_truth(
    row: Mapping[str, Any], region: Rectangle, classes: Classes, factor: int = 1
) -> UInt8:
    """Return the true labels of a region.

    Args:
        row: The slide's row in the run, with its `uri`, and `truth` and `kind`.
        region: Pixels of the mask's level 0, divided by `factor`.
        classes: Names by label value.
        factor: Power of two by which the mask's level 0 is reduced.

    Raises:
        SlideError: The truth is damaged, or of another slide.
    """
    downsample = row["downsample"] * factor
    size = (row["level0_height"], row["level0_width"])
    if row["kind"] == "annotation":
        return rasterise(
            _marks(row["truth"], row.get("uri", ""), *size, classes).areas,
            classes,
            y=region.y,
            x=region.x,
            height=region.height,
            width=region.width,
            downsample=downsample,
        )
    full = ome_zarr.open_level(row["truth"])
    if full.shape != size:
        raise SlideError(
            f"{row['truth']}: labels of {full.shape} pixels do not fit the slide of "
            f"{size}"
        )
    return nearest_labels(row["truth"], region, downsample, full.shape)


def read_known(
    row: Mapping[str, Any], region: Rectangle, classes: Classes, factor: int = 1
) -> npt.NDArray[np.bool_] | None:
    """Return where in a region there is a truth; None: everywhere.

    Args and errors are those of `read_truth`.
    """
    if row["kind"] != "annotation":
        return None
    size = (row["level0_height"], row["level0_width"])
    extent = _marks(row["truth"], row.get("uri", ""), *size, classes).extent
    if not extent:
        return None
    drawn = rasterise(
        extent,
        AnyClass(),
        y=region.y,
        x=region.x,
        height=region.height,
        width=region.width,
        downsample=row["downsample"] * factor,
    )
    known: npt.NDArray[np.bool_] = drawn > 0
    return known


def truth_note(row: Mapping[str, Any], classes: Classes) -> str:
    """Return what the user should know of a slide's truth; empty if there is nothing.

    Args and errors are those of `read_truth`.
    """
    if row["kind"] != "annotation":
        return ""
    size = (row["level0_height"], row["level0_width"])
    return "; ".join(_marks(row["truth"], row.get("uri", ""), *size, classes).notes)


def nearest_labels(
    uri: str,
    region: Rectangle,
    step: float,
    shape: tuple[int, ...],
    coarsest: int = 99,
    opened: Callable[[str, int], ome_zarr.Pixels] = ome_zarr.open_level,
) -> UInt8:
    """Return the nearest pixel of the next finer level, where no level fits.

    Args:
        uri: OME-Zarr of labels, or of any layers of one pixel each.
        region: In pixels that span `step` pixels of level 0, a side.
        step: As said; less than 1 enlarges.
        shape: (height, width) of level 0.
        coarsest: The coarsest level that is filled.
        opened: Opens a level.

    Returns:
        (..., height, width) uint8; beyond the image its last row and column.

    Raises:
        FormatError: What is stored is damaged.
    """
    last = min(coarsest, len(ome_zarr.level_shapes(shape[0], shape[1])) - 1)
    level = int(np.clip(np.floor(np.log2(step) + 0.01), 0, last))
    labels = opened(uri, level)
    rows, columns = (
        np.minimum((np.arange(first, end) + 0.5) * step / 2**level, length - 1)
        for first, end, length in zip(
            (region.y, region.x),
            (region.bottom, region.right),
            labels.shape[-2:],
            strict=True,
        )
    )
    y, x = rows.astype(int), columns.astype(int)
    part = np.asarray(labels[..., y[0] : y[-1] + 1, x[0] : x[-1] + 1])
    found: UInt8 = part[..., (y - y[0])[:, None], x - x[0]]
    return found


@functools.lru_cache(maxsize=4)
def _marks(
    uri: str, slide: str, height: int, width: int, classes: Classes
) -> Annotation:
    return read_marks(uri, height=height, width=width, classes=classes, slide=slide)


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
