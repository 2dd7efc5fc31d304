"""Which image of a TIFF file is the slide, by the rules of its format.

Labels, macros, thumbnails, other focal planes and channels are not levels of the slide.
OpenSlide's rules count where it has any, else tifffile's series.
"""

from __future__ import annotations

import re
from typing import Any

from defusedxml import ElementTree

from medray.errors import SlideError
from medray.slides.base import NeedsOpenSlideError, mpp_of
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
from medray.slides.tiff_series import choose_generic, choose_ome

_XMP = 700
_NDPI_LENS, _NDPI_FOCUS = 65421, 65424


def choose_image(
    uri: str, tiff: Any, scene: int | None = None, plane: int | None = None
) -> ChosenImage:
    """Return the image that is the slide.

    Args:
        uri: Of the file, for messages.
        tiff: tifffile's TiffFile.
        scene: Which of several slides in the file, from 0 in the file's order; None:
            by the format's rules.
        plane: Which of several focal planes, from 0; None: the one in focus, or the
            first.

    Raises:
        NeedsOpenSlideError: tifffile reads the format's tiles, not the slide.
        SlideError: Nothing in it is a slide in colours or grey, or there is no such
            scene or plane.
    """
    if not len(tiff.pages):
        raise SlideError(f"{uri}: the TIFF holds no image")
    if tiff.is_bif or _has_iscan(tiff):
        raise NeedsOpenSlideError(
            f"{uri}: a Ventana BIF, whose tiles overlap and must be stitched",
            "ventana",
        )
    if tiff.is_trestle:
        raise NeedsOpenSlideError(
            f"{uri}: a Trestle TIFF, whose tiles overlap and must be stitched",
            "trestle",
        )
    if tiff.is_svs:
        check_choice(uri, "scene", scene, 1)
        return _choose_svs(uri, tiff, plane)
    if tiff.is_ndpi:
        check_choice(uri, "scene", scene, 1)
        return _choose_ndpi(uri, tiff, plane)
    if tiff.is_scn:
        return _choose_scn(uri, tiff, scene, plane)
    if tiff.is_philips:
        check_choice(uri, "scene", scene, 1)
        check_choice(uri, "plane", plane, 1)
        return _choose_philips(uri, tiff)
    if tiff.is_ome:
        return choose_ome(uri, tiff, scene, plane)
    return choose_generic(uri, tiff, scene, plane)


# --- vendors --------------------------------------------------------------------------


def _has_iscan(tiff: Any) -> bool:
    """Return whether a page's XMP is Ventana's, as OpenSlide does."""
    found = (page.tags.valueof(_XMP) for page in tiff.pages if hasattr(page, "tags"))
    return any(isinstance(xmp, bytes) and b"<iScan" in xmp for xmp in found)


def _choose_svs(uri: str, tiff: Any, plane: int | None) -> ChosenImage:
    """Return the first page, and as its levels the tiled pages of its proportions.

    The thumbnail, the label and the macro are stored as strips.
    """
    first, *others = tiff.pages
    pages = [first, *(page for page in others if page.is_tiled and fits(first, page))]
    by_size: dict[tuple[int, int], list[Any]] = {}
    for page in pages:
        by_size.setdefault(size_of(page.keyframe), []).append(page)
    count = len(by_size[size_of(first.keyframe)])
    check_choice(uri, "plane", plane, count)
    number = plane or 0
    # A level that lacks the plane would show another one.
    planes = [of for of in by_size.values() if len(of) > number]
    levels = largest_first([of_size[number] for of_size in planes])
    note = ""
    if count > 1:
        note = _focal_planes(count, "the first of each level", plane)
    description = first.description or ""
    values = dict(re.findall(r"\|\s*([^|=]+?)\s*=\s*([^|]*)", description))
    both = positive_number(values.get("MPP"))
    mpp = mpp_of(both, both, "Aperio MPP")
    return ChosenImage("svs", levels, mpp, positive_number(values.get("AppMag")), note)


def _focal_planes(count: int, read: str, chosen: int | None) -> str:
    """Return a note on which of several focal planes is read, and how to choose."""
    if chosen is not None:
        return f"{count} focal planes: --plane {chosen} is read"
    how = f"; --plane 0 to {count - 1} chooses" if count > 1 else ""
    return f"{count} focal planes: {read} is read{how}"


def _choose_ndpi(uri: str, tiff: Any, plane: int | None) -> ChosenImage:
    """Return the pages of an objective, in the focal plane nearest to offset 0.

    The macro and the map have a negative magnification.
    """
    pages = list(tiff.pages)
    if any(page.tags.valueof(_NDPI_LENS) is not None for page in pages):
        pages = [
            page for page in pages if positive_number(page.tags.valueof(_NDPI_LENS))
        ]
    if not pages:
        raise SlideError(
            f"{uri}: the NDPI holds a macro or a map only, expected an image of an "
            f"objective; scan it again"
        )
    first = max(pages, key=area_of)
    pages = [page for page in pages if fits(first, page)]
    focus = {id(page): _offset(page) for page in pages}
    of_first = [focus[id(page)] for page in pages if size_of(page) == size_of(first)]
    if len(set(of_first)) < len(of_first):
        raise SlideError(
            f"{uri}: the NDPI holds {len(of_first)} images of one size and focus, "
            f"channels of fluorescence; expected a slide in bright field"
        )
    offsets = sorted(of_first)
    check_choice(uri, "plane", plane, len(offsets))
    chosen = min(offsets, key=abs) if plane is None else offsets[plane]
    levels = largest_first([page for page in pages if focus[id(page)] == chosen])
    note = ""
    if len(offsets) > 1:
        read = f"that of offset {chosen / 1000:g} um"
        note = _focal_planes(len(offsets), read, plane)
    page = levels[0][0]
    mpp = resolution_mpp(page)[0]
    magnification = positive_number(page.tags.valueof(_NDPI_LENS))
    return ChosenImage("ndpi", levels, mpp, magnification, note)


def _offset(page: Any) -> float:
    """Return the height of the focal plane, in nm from the slide's."""
    try:
        return float(page.tags.valueof(_NDPI_FOCUS, 0) or 0)
    except (TypeError, ValueError):
        return 0.0


def _choose_scn(
    uri: str, tiff: Any, scene: int | None, plane: int | None
) -> ChosenImage:
    """Return the scan; the macro is the image whose view is the whole collection's."""
    series = list(tiff.series)
    views = _scn_views(tiff.scn_metadata or "")
    if len(views) != len(series) or series[0].kind != "scn":
        raise NeedsOpenSlideError(
            f"{uri}: its Leica XML does not go with its images", "leica"
        )
    scans = [
        (one, view)
        for one, (view, macro) in zip(series, views, strict=True)
        if not macro
    ]
    if len(scans) > 1 and scene is None:
        raise NeedsOpenSlideError(
            f"{uri}: holds {len(scans)} scans of one glass, to be put together",
            "leica",
        )
    if not scans:
        raise SlideError(
            f"{uri}: holds the macro of the glass only, expected a scan; scan it again"
        )
    check_choice(uri, "scene", scene, len(scans))
    (scan, view), others = scans[scene or 0], len(series) - 1
    levels, note = pages_of_planes(uri, scan, plane)
    page = levels[0][0].keyframe
    mpp, _ = resolution_mpp(page)
    if mpp is None and view:
        x, y = (
            nm / 1000 / px for nm, px in zip(view, size_of(page)[::-1], strict=True)
        )
        mpp = mpp_of(x, y, "Leica view")
    if others:
        note = join_notes(note, f"scan {scan.name!r} of {others + 1} images is read")
    return ChosenImage("scn", levels, mpp, note=note)


def _scn_views(xml: str) -> list[tuple[tuple[float, float] | None, bool]]:
    """Return of each image its (width, height) in nm, and whether it is the macro."""
    found: list[tuple[tuple[float, float] | None, bool]] = []
    for collection in ElementTree.fromstring(xml).iter():
        if tag_of(collection) != "collection":
            continue
        whole = (
            positive_number(collection.get("sizeX")),
            positive_number(collection.get("sizeY")),
        )
        for image in collection:
            if tag_of(image) != "image" or not any(
                tag_of(part) == "dimension" for part in image.iter()
            ):
                continue
            view = next((part for part in image if tag_of(part) == "view"), None)
            if view is None:
                found.append((None, False))
                continue
            size = (
                positive_number(view.get("sizeX")),
                positive_number(view.get("sizeY")),
            )
            at_origin = not any(
                positive_number(view.get(f"offset{axis}")) for axis in "XY"
            )
            known = size if None not in size else None
            found.append((known, at_origin and known == whole))  # type: ignore[arg-type]
    return found


def _choose_philips(uri: str, tiff: Any) -> ChosenImage:
    """Return the tiled pages; the XML states the sizes of levels without padding."""
    series = tiff.series[0]
    if series.kind != "philips":
        raise NeedsOpenSlideError(
            f"{uri}: its Philips XML does not go with its levels", "philips"
        )
    levels = tuple((level.pages[0],) for level in series.levels)
    x, y = series.mpp or (None, None)
    mpp = mpp_of(x, y, "Philips DICOM_PIXEL_SPACING")
    return ChosenImage("philips", levels, mpp)
