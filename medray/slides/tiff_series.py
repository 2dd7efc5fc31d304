"""Which series of an OME-TIFF, or of a TIFF of no known vendor, is the slide."""

from __future__ import annotations

import re
from typing import Any

from defusedxml import ElementTree

from medray.errors import SlideError
from medray.slides.base import mpp_of
from medray.slides.tiff_pages import (
    ChosenImage,
    area_of,
    check_choice,
    fits,
    join_notes,
    largest_first,
    pages_of_planes,
    positive_number,
    resolution_mpp,
    size_of,
    tag_of,
)

_MICRONS = {
    "m": 1e6,
    "cm": 1e4,
    "mm": 1e3,
    "µm": 1.0,
    "um": 1.0,
    "nm": 1e-3,
    "pm": 1e-6,
    "Å": 1e-4,
    "in": 25400.0,
}

_OTHER_IMAGE = re.compile(r"\b(label|macro|overview|thumbnail|map)\b", re.IGNORECASE)


def _companion(xml: str | None) -> str:
    """Return the name of the file that holds the OME-XML; "" if that is this one."""
    for element in ElementTree.fromstring(xml or "<OME/>"):
        if tag_of(element) == "BinaryOnly":
            return element.get("MetadataFile") or "BinaryOnly"
    return ""


def choose_ome(
    uri: str, tiff: Any, scene: int | None, plane: int | None
) -> ChosenImage:
    """Return the image of the finest resolution that is no label or macro by name."""
    if companion := _companion(tiff.ome_metadata):
        raise SlideError(
            f"{uri}: its OME-XML, with its resolution and channels, lies in another "
            f"file ({companion}), expected it in the TIFF; save it as one OME-TIFF"
        )
    # The XML of a set names the images of its other files too.
    own = [
        one
        for one in tiff.series
        if one.keyframe is not None and one.keyframe.parent is tiff
    ]
    if not own:
        raise SlideError(f"{uri}: the OME-TIFF's image lies in other files; give these")
    check_choice(uri, "scene", scene, len(own))
    slides = [one for one in own if not _OTHER_IMAGE.search(one.name)] or own
    candidates = len(slides)
    if scene is not None:
        slides = [own[scene]]
    elif all(one.mpp for one in slides):
        finest = min(min(one.mpp) for one in slides)
        slides = [one for one in slides if min(one.mpp) < finest * 1.01]
    series = max(slides, key=lambda one: area_of(one.keyframe))
    if series.is_multifile:
        raise SlideError(
            f"{uri}: the OME-TIFF's image lies in several files, expected one; save it "
            f"as one file"
        )
    levels, note = pages_of_planes(uri, series, plane)
    if candidates > 1:
        number = own.index(series)
        read = f"image {series.name!r} is read, of {len(own)} (--scene {number})"
        note = join_notes(read, note)
    x, y = _ome_mpp(tiff, series)
    mpp = mpp_of(x, y, "OME PhysicalSizeX")
    magnification = positive_number(series.attrs.get("magnification"))
    return ChosenImage("ome-tiff", levels, mpp, magnification, note)


def _ome_mpp(tiff: Any, series: Any) -> tuple[float | None, float | None]:
    """Read PhysicalSizeX and Y (OME schema 2016-06) of an image, in microns."""
    pixels = [
        element
        for element in ElementTree.fromstring(tiff.ome_metadata or "<OME/>").iter()
        if tag_of(element) == "Pixels"
    ]
    if len(pixels) != len(tiff.series):  # which is whose is not known
        x, y = series.mpp or (None, None)
        return x, y
    own = pixels[[id(one) for one in tiff.series].index(id(series))]
    found: list[float | None] = []
    for axis in "XY":
        size = positive_number(own.get(f"PhysicalSize{axis}"))
        unit = _MICRONS.get(own.get(f"PhysicalSize{axis}Unit", "µm"))
        found.append(size * unit if size and unit else None)
    return found[0], found[1]


def choose_generic(
    uri: str, tiff: Any, scene: int | None, plane: int | None
) -> ChosenImage:
    """Return the first image in full resolution, with its levels.

    As OpenSlide does; where it opens nothing, for the first image is of strips, the
    largest.
    """
    kinds = ("qpi", "huron", "indica", "avs", "mikroscan", "motic")
    name = next((kind for kind in kinds if getattr(tiff, f"is_{kind}", False)), "tiff")
    series = list(tiff.series)
    full = [
        one for one in series if not (one.keyframe.is_reduced or one.keyframe.is_mask)
    ] or series
    if not full:
        raise SlideError(f"{uri}: the TIFF holds no image")
    chosen = full[0]
    largest = max(full, key=lambda one: area_of(one.keyframe))
    check_choice(uri, "scene", scene, len(full))
    if scene is not None:
        chosen = full[scene]
    elif name == "tiff" and not chosen.keyframe.is_tiled:
        chosen = largest
    levels, note = pages_of_planes(uri, chosen, plane)
    if len(levels[0]) == 1:
        first = levels[0][0].keyframe
        reduced = [
            one.keyframe
            for one in series
            if one.keyframe.is_tiled
            and one.keyframe.is_reduced
            and fits(first, one.keyframe)
        ]
        pages = [level[0] for level in levels]
        levels = largest_first([*pages, *reduced])
    if area_of(largest.keyframe) > area_of(chosen.keyframe) or chosen is not full[0]:
        size = "{} x {}".format(*size_of(chosen.keyframe))
        number = full.index(chosen)
        read = f"of {len(full)} images that of {size} pixels is read (--scene {number})"
        note = join_notes(note, read)
    mpp, said = resolution_mpp(levels[0][0].keyframe)
    return ChosenImage(name, levels, mpp, note=join_notes(note, said))
