"""Which level of a slide to work on."""

from __future__ import annotations

import math

from medray.errors import SlideError
from medray.slides.slide import Slide

# Training augments sizes by more than this, so no resampling is worth its blur.
_TOLERANCE = 1.15


def choose_level(
    slide: Slide, target_mpp: float | None, given_mpp: float | None
) -> tuple[int, str]:
    """Choose the level whose microns per pixel are nearest to the model's.

    Args:
        slide: The slide.
        target_mpp: Microns per pixel of the model; None: level 0, whatever it is.
        given_mpp: Microns per pixel of level 0 to assume if the file does not say.

    Returns:
        The level, and what the user should know ("" if nothing).

    Raises:
        SlideError: No level is within 15 %.
    """
    if target_mpp is None:
        return 0, ""
    mpp = slide.mpp or given_mpp
    if mpp is None:
        note = f"no mpp in the file: level 0 taken as {target_mpp:g} um per pixel"
        return 0, f"{note}; give --mpp if it is not"
    each = [mpp * level.downsample for level in slide.levels]
    off = [abs(math.log(value / target_mpp)) for value in each]
    best = off.index(min(off))
    if off[best] > math.log(_TOLERANCE):
        found = ", ".join(f"{value:.3g}" for value in each)
        raise SlideError(
            f"{slide.uri}: the model works at {target_mpp:g} um per pixel, the slide's "
            f"levels have {found}; give --mpp if the file is wrong, or train a model "
            f"at one of these"
        )
    return best, ""
