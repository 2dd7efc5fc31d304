"""Splits of images: copies are left out, patients stay together."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from medray.datasets.images import CheckedImage, ImageFile
from medray.datasets.splits import split_slides
from medray.errors import ConfigError

log = logging.getLogger(__name__)


def leave_out_copies(images: Sequence[CheckedImage]) -> list[CheckedImage]:
    """Return the images, copies marked; of equal ones one of `test` is no copy.

    So none leaks from it.
    """
    first: dict[str, CheckedImage] = {}
    copies: dict[ImageFile, CheckedImage] = {}
    across: dict[tuple[str, str], list[str]] = {}
    order = {"test": 0, "val": 1, "train": 2, "": 3}
    for image in sorted(images, key=lambda image: order[image.split]):
        if not image.taken:
            continue
        kept = first.setdefault(image.digest, image)
        if kept is image:
            continue
        names = image.file.image, kept.file.image
        why = f"the same bytes as {kept.file.image}"
        copies[image.file] = replace(image, status="copy", message=why)
        if image.split and kept.split != image.split:
            pair = " and ".join(names)
            across.setdefault((image.split, kept.split), []).append(pair)
        if kept.file.class_name != image.file.class_name:
            log.warning(
                "%s (%s) has the same bytes as %s (%s); the first is left out",
                image.file.image,
                image.file.class_name,
                kept.file.image,
                kept.file.class_name,
            )
    for (split, other), pairs in across.items():
        log.warning(
            "%d images of %s are copies of images of %s, such as %s; they are left "
            "out of %s",
            len(pairs),
            split,
            other,
            pairs[0],
            split,
        )
    return [copies.get(image.file, image) for image in images]


def with_patients(
    images: Sequence[ImageFile], patients: str, known: Mapping[str, str]
) -> list[ImageFile]:
    """Return the images with their patients: from the table, else from their names."""
    try:
        pattern = re.compile(patients)
    except re.error as error:
        raise ConfigError(
            f"patients: {patients!r} is no regular expression: {error}"
        ) from error
    found = []
    for image in images:
        name = image.image.rpartition("/")[2]
        match = pattern.search(name) if patients else None
        if patients and match is None:
            raise ConfigError(
                f"patients: {patients!r} finds nothing in the name {name}; it must "
                f"find the patient of every image"
            )
        patient = match[1 if pattern.groups else 0] if match else image.patient
        # A blank of the table is no patient.
        found.append(replace(image, patient=known.get(image.image) or patient))
    return found


def deal_out(
    images: Sequence[CheckedImage],
    *,
    given: bool,
    fractions: tuple[float, float, float],
    seed: int,
) -> list[CheckedImage]:
    """Return the images, each in a split; with `given` those without stay without."""
    good = [image for image in images if image.taken]
    dealt: dict[str, str] = {}
    if not given and not any(image.split for image in images):
        dealt = _deal(good, fractions, seed)
    elif not given and not any(image.split == "val" for image in images):
        train = fractions[0] / (fractions[0] + fractions[1])
        rest = [image for image in good if image.split == "train"]
        dealt = _deal(rest, (train, 1 - train, 0.0), seed)
    images = [
        replace(image, split=dealt.get(image.file.image, image.split))
        if image.taken
        else image
        for image in images
    ]
    where: dict[str, set[str]] = {}
    for image in images:
        if image.taken and image.split:
            where.setdefault(image.file.patient, set()).add(image.split)
    both = sorted(patient for patient, found in where.items() if len(found) > 1)
    if both:
        log.warning(
            "%d patients have images in several splits, such as %s in %s",
            len(both),
            both[0],
            sorted(where[both[0]]),
        )
    return images


def _deal(
    images: Sequence[CheckedImage], fractions: tuple[float, float, float], seed: int
) -> dict[str, str]:
    """Return the split of each image by its name."""
    rows = [
        {
            "slide": image.file.image,
            "group": image.file.patient,
            "stratum": image.file.class_name,
        }
        for image in images
    ]
    return split_slides(rows, fractions=fractions, seed=seed)
