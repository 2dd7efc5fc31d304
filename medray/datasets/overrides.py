"""What the user says of how slides are read, over what their files say."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from medray.annotations import match_names, slide_names
from medray.datasets.splits import read_groups
from medray.errors import ConfigError
from medray.slides import SANE_MPP, SlideFile

log = logging.getLogger(__name__)


def with_overrides(
    slides: Sequence[SlideFile],
    *,
    mpp: float | str | None,
    scene: int | None,
    plane: int | None,
) -> list[SlideFile]:
    """Return the slides with what the user says of each.

    Args:
        slides: All slides of the request.
        mpp: Microns per pixel of level 0 of all slides; or a CSV (slide,mpp) with those
            of some, each named by its id, its path or its file name.
        scene: Which of several slides in a file is meant, from 0.
        plane: Which of several focal planes, from 0.

    Raises:
        ConfigError: A value is no number of microns, or the CSV is missing or names a
            slide twice.
    """
    given: dict[str, float] = {}
    if isinstance(mpp, str):
        given = _by_slide(slides, mpp)
    elif mpp is not None:
        _check(mpp, "--mpp")
        given = {file.slide: mpp for file in slides}
    for what, number in (("scene", scene), ("plane", plane)):
        if number is not None and number < 0:
            raise ConfigError(f"--{what}: expected 0 or more, found {number}")
    return [
        replace(file, mpp=given.get(file.slide), scene=scene, plane=plane)
        for file in slides
    ]


def _by_slide(slides: Sequence[SlideFile], uri: str) -> dict[str, float]:
    values: dict[str, float] = {}
    for said, text in read_groups(uri, "mpp").items():
        name = unicodedata.normalize("NFC", said.strip())
        try:
            values[name] = float(text)
        except ValueError as error:
            raise ConfigError(
                f"{uri}: expected microns per pixel of slide {name}, such as 0.25, "
                f"found {text!r}"
            ) from error
        _check(values[name], f"{uri}: slide {name}")
    names = {f"{uri}: {name}": [name] for name in values}
    matched = {
        slide: found.removeprefix(f"{uri}: ")
        for slide, found in match_names(slides, names).items()
    }
    taken, named = set(matched.values()), set()
    for file in slides:
        own = slide_names(file)
        named.update(own)
        first = matched.get(file.slide)
        for name in own:
            free = name in values and name not in taken
            if first is not None and free and values[name] != values[first]:
                raise ConfigError(
                    f"{uri}: says of {file.uri} both {first},{values[first]:g} and "
                    f"{name},{values[name]:g}; expected one row a slide"
                )
    idle = sorted(name for name in values if name not in named)
    if idle:
        shown = ", ".join(idle[:5]) + (" ..." if len(idle) > 5 else "")
        log.warning("%s: %d rows belong to no slide: %s", uri, len(idle), shown)
    return {slide: values[name] for slide, name in matched.items()}


def _check(mpp: float, where: str) -> None:
    if not SANE_MPP[0] <= mpp <= SANE_MPP[1]:
        raise ConfigError(
            f"{where}: expected {SANE_MPP[0]:g} to {SANE_MPP[1]:g} um per pixel, found "
            f"{mpp:g}"
        )
