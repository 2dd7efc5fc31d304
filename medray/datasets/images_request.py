"""The request of an ingest of images in class folders, and how they are dealt out.

Checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from medray.annotations import feature_names
from medray.classes import Classes
from medray.datasets.check_images import check_images
from medray.datasets.contact_sheets import digest_of_values, plan_sheets
from medray.datasets.dataset import DatasetSettings
from medray.datasets.find_images import find_images
from medray.datasets.images import CheckedImage, Contours, ImageFile, Sheet
from medray.datasets.join_tables import join_divisions
from medray.datasets.names import names_of_images
from medray.datasets.split_images import deal_out, leave_out_copies, with_patients
from medray.datasets.splits import check_fractions
from medray.errors import ConfigError
from medray.storage import files

TIMEOUT_S = 300.0
"""For an image, or for a sheet of them."""
_SHEET_PX = 2048  # side of a sheet, at most


@dataclass(frozen=True, kw_only=True)
class ImagesRequest:
    """Which images to ingest, and how.

    Attributes:
        out: Folder of the dataset.
        settings: Of the dataset.
        images: As they were found, with their patients and splits.
        given: Whether a table says the splits.
        fractions: Shares of train, val and test.
        seed: Decides the splits.
        features: Names of what contours measure; none: that is not asked for.
        mpp: Microns per pixel, for these measures; None: in pixels.
        digest: Of all this: equal digests mean equal datasets.
    """

    out: str
    settings: DatasetSettings
    images: Sequence[ImageFile]
    given: bool
    fractions: tuple[float, float, float]
    seed: int
    features: tuple[str, ...]
    mpp: float | None
    digest: str


def settle_images(
    folder: str,
    *,
    out: str,
    side: int,
    classes: tuple[str, ...] = (),
    patients: str = "",
    groups: str | None = None,
    splits: str | None = None,
    ignore_unknown: bool = False,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
    contours: bool = False,
    mpp: float | None = None,
) -> ImagesRequest:
    """Return the request that `ingest_images` makes of the same arguments.

    Raises:
        ConfigError: The request is wrong, or a class has no image.
    """
    check_fractions(fractions)
    if side < 32 or side % 32 or side > _SHEET_PX:
        raise ConfigError(
            f"side: expected a multiple of 32 up to {_SHEET_PX}, found {side}"
        )
    if mpp is not None and not contours:
        raise ConfigError("--mpp: of images it is only for the measures of --contours")
    images = find_images(folder, classes, contours=contours)
    names = classes or tuple(sorted({image.class_name for image in images}))
    settings = DatasetSettings(
        classes=Classes(names), patch=side, region=side * (_SHEET_PX // side)
    )
    out = files.absolute(out)
    group_of, split_of = join_divisions(
        groups,
        splits,
        names_of_images(images),
        unknown="ignore" if ignore_unknown else "refuse",
        what="image",
    )
    images = with_patients(images, patients, group_of)
    if split_of is not None:
        images = [replace(one, split=split_of[one.image]) for one in images]
    said = {image.split for image in images}
    if splits is None and "train" in said and "val" not in said and not fractions[1]:
        raise ConfigError(
            f"{folder}: has no folder val; its share of train (the second of "
            f"fractions, {list(fractions)}) must be above 0"
        )
    given = splits is not None
    asked = [_asked_of(image, mpp) for image in images]
    return ImagesRequest(
        out=out,
        settings=settings,
        images=images,
        given=given,
        fractions=fractions,
        seed=seed,
        features=feature_names(mpp) if contours else (),
        mpp=mpp,
        digest=digest_of_values([asked, list(fractions), seed, given]),
    )


def deal_images(
    request: ImagesRequest,
    map_them: Callable[..., Iterator[tuple[ImageFile, Any]]],
) -> tuple[list[CheckedImage], list[Sheet]]:
    """Look at the images, leave out copies, and deal out the rest.

    Args:
        request: Which images.
        map_them: As `medray.execution.rows.map_rows`.

    Returns:
        All images, and the sheets that those have their places on which are taken.
    """
    settings = request.settings
    checked = check_images(request.images, settings.patch, request.mpp, map_them)
    images = deal_out(
        leave_out_copies(checked),
        given=request.given,
        fractions=request.fractions,
        seed=request.seed,
    )
    columns = settings.region // settings.patch
    return images, list(plan_sheets(images, columns, settings.patch))


def _asked_of(file: ImageFile, mpp: float | None) -> dict[str, Any]:
    """Return what is asked of an image, in JSON values.

    Under the names, and in the order, that medray 0.1 gave them: its datasets stay.
    """
    asked: dict[str, Any] = {
        "image": file.image,
        "uri": file.uri,
        "class": file.class_name,
        "split": file.split,
        "stamp": file.fingerprint,
    }
    if file.cut:
        asked["cut"] = True
    if isinstance(file.contours, Contours):
        asked["cytoplasm"] = file.contours.cytoplasm
        asked["nucleus"] = file.contours.nucleus
        asked["contour_stamps"] = list(file.contours.fingerprints)
    elif file.contours is not None:
        asked["trouble"] = file.contours.message
    if file.contours is not None:
        asked["mpp"] = mpp
    return asked | {"patient": file.patient}
