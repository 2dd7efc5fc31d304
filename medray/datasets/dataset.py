"""A dataset: what ingest writes from slides and annotations, and train reads.

DATASET/
dataset.yaml              classes and how the slides were cut (DatasetSettings)
slides.parquet            one row per slide: size, mpp, digest, status, split
patches.parquet           one row per patch: where, tissue, classes, split
splits.json               what the splits were dealt by
slides/SLIDE.ome.zarr     pixels; labels/annotation if it is annotated

A dataset of images in class folders (medray.datasets.image_folder) has sheets of them
as slides, one patch per image (with `image`, `patient` and `digest` as well), and
images.parquet            one row per image: class, patient, split, status and why
morphology.parquet        one row per image: what its contours measure, if asked for
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from medray.classes import Classes
from medray.errors import ConfigError
from medray.storage import (
    files,
    ome_zarr,
    read_folder_settings,
    to_dict,
    write_settings,
)

LABELS = "annotation"


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """What decides the pixels and labels of a dataset; stored as `dataset.yaml`.

    Attributes:
        classes: Names by label value.
        mpp: What was first said of the slides' microns per pixel, over what their files
            say: a number, or a CSV; slides.parquet has each slide's.
        patch: Side of a patch (a chunk), pixels of level 0.
        region: Side of a region (a shard), pixels of level 0.
    """

    classes: Classes
    mpp: float | str | None = None
    patch: int = ome_zarr.PATCH
    region: int = ome_zarr.REGION


def open_dataset(out: str, settings: DatasetSettings) -> None:
    """Make a dataset's folder, or check that it was made with the same settings.

    Raises:
        ConfigError: It was made with others.
    """
    if not check_dataset(out, settings):
        write_settings(files.join(out, "dataset.yaml"), settings)


def check_dataset(out: str, settings: DatasetSettings) -> bool:
    """Return whether a dataset is there, made with the same settings.

    Raises:
        ConfigError: It was made with others.
    """
    if not files.exists(files.join(out, "dataset.yaml")):
        return False
    old, new = to_dict(read_dataset(out)), to_dict(settings)
    # Slides whose mpp is said to be another one than before are made again.
    old["mpp"] = new["mpp"]
    if old != new:
        changed = ", ".join(
            f"{key}: {old[key]} -> {new[key]}" for key in old if old[key] != new[key]
        )
        raise ConfigError(
            f"{out}: holds a dataset with other settings ({changed}); choose another "
            f"--out, or delete this one"
        )
    return True


def read_dataset(folder: str) -> DatasetSettings:
    """Read a dataset's settings.

    Raises:
        ConfigError: There is no dataset.
    """
    expected = ("a dataset", "medray ingest")
    return read_folder_settings(DatasetSettings, folder, "dataset.yaml", expected)


def images_uri(folder: str) -> str:
    """Return the place of the table of images."""
    return files.join(folder, "images.parquet")


def morphology_uri(folder: str) -> str:
    """Return the place of the table of what contours measure."""
    return files.join(folder, "morphology.parquet")


def write_morphology(
    folder: str, names: tuple[str, ...], measured: Iterable[tuple[str, Sequence[float]]]
) -> None:
    """Write morphology.parquet.

    Args:
        folder: The dataset.
        names: Of the features.
        measured: Each image's name and its features, a number a name.
    """
    rows = [
        {"image": image} | dict(zip(names, features, strict=True))
        for image, features in measured
    ]
    files.write_table(morphology_uri(folder), pa.Table.from_pylist(rows))


def read_morphology(
    folder: str, patches: list[dict[str, Any]]
) -> tuple[tuple[str, ...], npt.NDArray[np.float64]]:
    """Return the features of the images of some patches.

    Args:
        folder: The dataset.
        patches: N rows of `read_patches`.

    Returns:
        The names of the F features, and (N, F).

    Raises:
        ConfigError: The dataset has none.
    """
    uri = morphology_uri(folder)
    if not files.exists(uri):
        raise ConfigError(
            f"{folder}: has no measures of nucleus and cytoplasm, which "
            f"model.morphology takes; ingest images with contours by `medray ingest "
            f"--side PX --contours`, or set model.morphology=false"
        )
    table = files.read_table(uri)
    names = tuple(name for name in table.column_names if name != "image")
    of_image = {row["image"]: row for row in table.to_pylist()}
    found = [[of_image[row["image"]][name] for name in names] for row in patches]
    return names, np.array(found, np.float64).reshape(-1, len(names))


def holds_images(folder: str) -> bool:
    """Return whether a dataset holds images of one class each, and not slides."""
    return files.exists(images_uri(folder))


def slide_uri(folder: str, slide: str) -> str:
    """Return the place of a slide's pixels."""
    return files.join(folder, "slides", f"{slide}.ome.zarr")


def labels_uri(folder: str, slide: str) -> str:
    """Return the place of a slide's label image."""
    return files.join(slide_uri(folder, slide), "labels", LABELS)


def read_patches(folder: str, split: str) -> list[dict[str, Any]]:
    """Return the rows of patches.parquet that belong to a split.

    Raises:
        ConfigError: Ingest has not finished.

    Examples:
        >>> from medray.datasets import read_patches
        >>> patches = read_patches("dataset", "train")
        >>> sorted({patch["slide"] for patch in patches})
        ['slide_000', 'slide_001']
    """
    uri = files.join(folder, "patches.parquet")
    if not files.exists(uri):
        raise ConfigError(f"{uri} is missing; run `medray ingest` to its end")
    rows: list[dict[str, Any]] = files.read_table(uri).to_pylist()
    return [row for row in rows if row["split"] == split]


def read_slides(folder: str) -> list[dict[str, Any]]:
    """Return the rows of slides.parquet of the slides that are done."""
    rows = files.read_table(files.join(folder, "slides.parquet")).to_pylist()
    return [row for row in rows if row["status"] == "done"]


def write_patches(folder: str, patches: list[dict[str, Any]]) -> None:
    """Write patches.parquet."""
    table = pa.Table.from_pylist(patches) if patches else pa.table({"slide": []})
    files.write_table(files.join(folder, "patches.parquet"), table)
