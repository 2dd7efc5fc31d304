"""A dataset: what ingest makes of slides and annotations, and train reads.

DATASET/
dataset.yaml              classes and how the slides were cut (DatasetSettings)
slides.parquet            a row a slide: size, mpp, digest, status, split
patches.parquet           a row a patch: where, tissue, classes, split
slides/SLIDE.ome.zarr     pixels; labels/annotation if it is annotated

A dataset of images in class folders (medray.datasets.image_folder) has sheets of them
as slides, a patch an image (`image`, `patient` and `digest` besides), and
images.parquet            a row an image: class, patient, split, status and why
morphology.parquet        a row an image: what its contours measure, if asked for
"""

from __future__ import annotations

import csv
import io
import random
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from medray.classes import Classes
from medray.errors import ConfigError
from medray.storage import files, ome_zarr
from medray.storage.yaml_config import read_folder_settings, to_dict, write_settings

SPLITS = ("train", "val", "test")
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
    uri = files.join(out, "dataset.yaml")
    if not files.exists(uri):
        write_settings(uri, settings)
        return
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
    folder: str, names: tuple[str, ...], images: list[dict[str, Any]]
) -> None:
    """Write morphology.parquet.

    Args:
        folder: The dataset.
        names: Of the features.
        images: With `image` and `features`, a number a name.
    """
    rows = [
        {"image": row["image"]} | dict(zip(names, row["features"], strict=True))
        for row in images
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
    """Tell whether a dataset is of images, each of one class, rather than of slides."""
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
    """
    uri = files.join(folder, "patches.parquet")
    if not files.exists(uri):
        raise ConfigError(f"{uri} is missing; run `medray ingest` to its end")
    rows: list[dict[str, Any]] = files.read_table(uri).to_pylist()
    return [row for row in rows if row["split"] == split]


def write_patches(folder: str, patches: list[dict[str, Any]]) -> None:
    """Write patches.parquet."""
    table = pa.Table.from_pylist(patches) if patches else pa.table({"slide": []})
    files.write_table(files.join(folder, "patches.parquet"), table)


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
