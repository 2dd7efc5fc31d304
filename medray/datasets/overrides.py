"""User overrides of what slides' files say, such as the resolution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from medray.datasets.join_tables import Unknown, join_table
from medray.datasets.names import names_of_slides
from medray.datasets.slide_tables import read_mpp
from medray.errors import ConfigError
from medray.slides import SANE_MPP, SlideFile


def with_overrides(
    slides: Sequence[SlideFile],
    *,
    mpp: float | str | None,
    scene: int | None,
    plane: int | None,
    unknown: Unknown = "warn",
    known: Sequence[SlideFile] = (),
) -> list[SlideFile]:
    """Return the slides with the user's overrides of each.

    Args:
        slides: All slides of the request.
        mpp: Microns per pixel of level 0 of all slides; or a CSV (slide,mpp) with those
            of some, each named by its id, its path or its file name.
        scene: Which of several slides in a file is meant, from 0.
        plane: Which of several focal planes, from 0.
        unknown: What to do with rows of the CSV that name no slide.
        known: Others that the CSV may name, such as those of an earlier request.

    Raises:
        ConfigError: A value is no number of microns; or the CSV is missing, says two
            things of a slide, or names what is not there and must not.
    """
    given: dict[str, float] = {}
    if isinstance(mpp, str):
        joined = join_table(
            read_mpp(mpp),
            names_of_slides(slides),
            unknown=unknown,
            known=names_of_slides(known),
            every=False,
        )
        given = {slide: float(text) for slide, text in joined.column("mpp").items()}
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


def _check(mpp: float, where: str) -> None:
    if not SANE_MPP[0] <= mpp <= SANE_MPP[1]:
        raise ConfigError(
            f"{where}: expected {SANE_MPP[0]:g} to {SANE_MPP[1]:g} um per pixel, found "
            f"{mpp:g}"
        )
