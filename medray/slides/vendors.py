"""Which image of a TIFF file is the slide, by the rules of its format.

Labels, macros, thumbnails, other focal planes and channels are not levels of the slide.
OpenSlide's rules count where it has any, else tifffile's series.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from defusedxml import ElementTree

from medray.errors import SlideError
from medray.slides.base import Mpp, NeedsOpenSlideError, mpp_of

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
# What ImageJ writes for its units (TIFF's ResolutionUnit is then none).
_IMAGEJ_MICRONS = {
    "micron": 1.0,
    "microns": 1.0,
    "um": 1.0,
    "µm": 1.0,
    "\\u00B5m": 1.0,
    "nm": 1e-3,
    "mm": 1e3,
    "cm": 1e4,
    "inch": 25400.0,
}
_AXES = {"I": "pages", "Q": "pages"}  # tifffile's letters for images of one size
_XMP = 700
_NDPI_LENS, _NDPI_FOCUS = 65421, 65424
_OTHER_IMAGE = re.compile(r"\b(label|macro|overview|thumbnail|map)\b", re.IGNORECASE)
_RGB_NAMES = (("red", "green", "blue"), ("r", "g", "b"))
# 1200 dots per inch and fewer are a screen's, a printer's or an office scanner's.
_COARSEST_TAGGED = 25400 / 1200 * 0.99
# 1 dot per inch and the like mean nothing to anyone and need no note.
_COARSEST_NOTED = 25400 / 71


@dataclass(frozen=True)
class ChosenImage:
    """The image of a TIFF file that is the slide.

    Attributes:
        format: Such as `svs`, `ome-tiff`, `tiff`.
        levels: Of each level, largest first, its page; three pages where red, green and
            blue are grey planes of their own. tifffile's TiffPage or TiffFrame.
        mpp: Microns per pixel; None when the file does not say.
        magnification: Of the objective; None when the file does not say.
        note: What the user should know ("" if nothing).
    """

    format: str
    levels: tuple[tuple[Any, ...], ...]
    mpp: Mpp | None
    magnification: float | None = None
    note: str = ""


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
        return _choose_ome(uri, tiff, scene, plane)
    return _choose_generic(uri, tiff, scene, plane)


def check_choice(uri: str, what: str, asked: int | None, count: int) -> None:
    """Refuse a scene or plane that a file does not have.

    Args:
        uri: Of the file, for the message.
        what: `scene` or `plane`.
        asked: Its number, from 0; None: not asked for.
        count: How many there are.

    Raises:
        SlideError: There are not so many.
    """
    if asked is not None and not 0 <= asked < count:
        there = f"{what}s 0 to {count - 1}" if count > 1 else f"one {what} only"
        raise SlideError(
            f"{uri}: has {there}, found --{what} {asked}; give another or leave it away"
        )


# --- vendors --------------------------------------------------------------------------


def _has_iscan(tiff: Any) -> bool:
    """Tell whether a page's XMP is Ventana's, as OpenSlide does."""
    found = (page.tags.valueof(_XMP) for page in tiff.pages if hasattr(page, "tags"))
    return any(isinstance(xmp, bytes) and b"<iScan" in xmp for xmp in found)


def _choose_svs(uri: str, tiff: Any, plane: int | None) -> ChosenImage:
    """Take the first page, and as its levels the tiled pages of its proportions.

    The thumbnail, the label and the macro are stored as strips.
    """
    first, *others = tiff.pages
    pages = [first, *(page for page in others if page.is_tiled and _fits(first, page))]
    by_size: dict[tuple[int, int], list[Any]] = {}
    for page in pages:
        by_size.setdefault(_size(page.keyframe), []).append(page)
    count = len(by_size[_size(first.keyframe)])
    check_choice(uri, "plane", plane, count)
    number = plane or 0
    # A level that lacks the plane would show another one.
    planes = [of for of in by_size.values() if len(of) > number]
    levels = _largest_first([of_size[number] for of_size in planes])
    note = ""
    if count > 1:
        note = _focal_planes(count, "the first of each level", plane)
    description = first.description or ""
    values = dict(re.findall(r"\|\s*([^|=]+?)\s*=\s*([^|]*)", description))
    both = _number(values.get("MPP"))
    mpp = mpp_of(both, both, "Aperio MPP")
    return ChosenImage("svs", levels, mpp, _number(values.get("AppMag")), note)


def _focal_planes(count: int, read: str, chosen: int | None) -> str:
    """Say which of several focal planes is read, and how to choose."""
    if chosen is not None:
        return f"{count} focal planes: --plane {chosen} is read"
    how = f"; --plane 0 to {count - 1} chooses" if count > 1 else ""
    return f"{count} focal planes: {read} is read{how}"


def _choose_ndpi(uri: str, tiff: Any, plane: int | None) -> ChosenImage:
    """Take the pages of an objective, in the focal plane nearest to offset 0.

    The macro and the map have a negative magnification.
    """
    pages = list(tiff.pages)
    if any(page.tags.valueof(_NDPI_LENS) is not None for page in pages):
        pages = [page for page in pages if _number(page.tags.valueof(_NDPI_LENS))]
    if not pages:
        raise SlideError(
            f"{uri}: the NDPI holds a macro or a map only, expected an image of an "
            f"objective; scan it again"
        )
    first = max(pages, key=_area)
    pages = [page for page in pages if _fits(first, page)]
    focus = {id(page): _offset(page) for page in pages}
    of_first = [focus[id(page)] for page in pages if _size(page) == _size(first)]
    if len(set(of_first)) < len(of_first):
        raise SlideError(
            f"{uri}: the NDPI holds {len(of_first)} images of one size and focus, "
            f"channels of fluorescence; expected a slide in bright field"
        )
    offsets = sorted(of_first)
    check_choice(uri, "plane", plane, len(offsets))
    chosen = min(offsets, key=abs) if plane is None else offsets[plane]
    levels = _largest_first([page for page in pages if focus[id(page)] == chosen])
    note = ""
    if len(offsets) > 1:
        read = f"that of offset {chosen / 1000:g} um"
        note = _focal_planes(len(offsets), read, plane)
    page = levels[0][0]
    mpp = _resolution_mpp(page)[0]
    magnification = _number(page.tags.valueof(_NDPI_LENS))
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
    """Take the scan; the macro is the image whose view is the whole collection's."""
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
    levels, note = _planes(uri, scan, plane)
    page = levels[0][0].keyframe
    mpp, _ = _resolution_mpp(page)
    if mpp is None and view:
        x, y = (nm / 1000 / px for nm, px in zip(view, _size(page)[::-1], strict=True))
        mpp = mpp_of(x, y, "Leica view")
    if others:
        note = _joined(note, f"scan {scan.name!r} of {others + 1} images is read")
    return ChosenImage("scn", levels, mpp, note=note)


def _scn_views(xml: str) -> list[tuple[tuple[float, float] | None, bool]]:
    """Return of each image its (width, height) in nm, and whether it is the macro."""
    found: list[tuple[tuple[float, float] | None, bool]] = []
    for collection in ElementTree.fromstring(xml).iter():
        if _tag(collection) != "collection":
            continue
        whole = (_number(collection.get("sizeX")), _number(collection.get("sizeY")))
        for image in collection:
            if _tag(image) != "image" or not any(
                _tag(part) == "dimension" for part in image.iter()
            ):
                continue
            view = next((part for part in image if _tag(part) == "view"), None)
            if view is None:
                found.append((None, False))
                continue
            size = (_number(view.get("sizeX")), _number(view.get("sizeY")))
            at_origin = not any(_number(view.get(f"offset{axis}")) for axis in "XY")
            known = size if None not in size else None
            found.append((known, at_origin and known == whole))  # type: ignore[arg-type]
    return found


def _choose_philips(uri: str, tiff: Any) -> ChosenImage:
    """Take the tiled pages; the XML says the sizes of levels without their padding."""
    series = tiff.series[0]
    if series.kind != "philips":
        raise NeedsOpenSlideError(
            f"{uri}: its Philips XML does not go with its levels", "philips"
        )
    levels = tuple((level.pages[0],) for level in series.levels)
    x, y = series.mpp or (None, None)
    mpp = mpp_of(x, y, "Philips DICOM_PIXEL_SPACING")
    return ChosenImage("philips", levels, mpp)


def _companion(xml: str | None) -> str:
    """Return the name of the file that holds the OME-XML; "" if that is this one."""
    for element in ElementTree.fromstring(xml or "<OME/>"):
        if _tag(element) == "BinaryOnly":
            return element.get("MetadataFile") or "BinaryOnly"
    return ""


def _choose_ome(
    uri: str, tiff: Any, scene: int | None, plane: int | None
) -> ChosenImage:
    """Take the image of the finest resolution that no name makes a label or macro."""
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
    series = max(slides, key=lambda one: _area(one.keyframe))
    if series.is_multifile:
        raise SlideError(
            f"{uri}: the OME-TIFF's image lies in several files, expected one; save it "
            f"as one file"
        )
    levels, note = _planes(uri, series, plane)
    if candidates > 1:
        number = own.index(series)
        read = f"image {series.name!r} is read, of {len(own)} (--scene {number})"
        note = _joined(read, note)
    x, y = _ome_mpp(tiff, series)
    mpp = mpp_of(x, y, "OME PhysicalSizeX")
    magnification = _number(series.attrs.get("magnification"))
    return ChosenImage("ome-tiff", levels, mpp, magnification, note)


def _ome_mpp(tiff: Any, series: Any) -> tuple[float | None, float | None]:
    """Read PhysicalSizeX and Y (OME schema 2016-06) of an image, in microns."""
    pixels = [
        element
        for element in ElementTree.fromstring(tiff.ome_metadata or "<OME/>").iter()
        if _tag(element) == "Pixels"
    ]
    if len(pixels) != len(tiff.series):  # which is whose cannot be told
        x, y = series.mpp or (None, None)
        return x, y
    own = pixels[[id(one) for one in tiff.series].index(id(series))]
    found: list[float | None] = []
    for axis in "XY":
        size = _number(own.get(f"PhysicalSize{axis}"))
        unit = _MICRONS.get(own.get(f"PhysicalSize{axis}Unit", "µm"))
        found.append(size * unit if size and unit else None)
    return found[0], found[1]


def _choose_generic(
    uri: str, tiff: Any, scene: int | None, plane: int | None
) -> ChosenImage:
    """Take the first image in full resolution, and what is a level of it.

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
    largest = max(full, key=lambda one: _area(one.keyframe))
    check_choice(uri, "scene", scene, len(full))
    if scene is not None:
        chosen = full[scene]
    elif name == "tiff" and not chosen.keyframe.is_tiled:
        chosen = largest
    levels, note = _planes(uri, chosen, plane)
    if len(levels[0]) == 1:
        first = levels[0][0].keyframe
        reduced = [
            one.keyframe
            for one in series
            if one.keyframe.is_tiled
            and one.keyframe.is_reduced
            and _fits(first, one.keyframe)
        ]
        pages = [level[0] for level in levels]
        levels = _largest_first([*pages, *reduced])
    if _area(largest.keyframe) > _area(chosen.keyframe) or chosen is not full[0]:
        size = "{} x {}".format(*_size(chosen.keyframe))
        number = full.index(chosen)
        read = f"of {len(full)} images that of {size} pixels is read (--scene {number})"
        note = _joined(note, read)
    mpp, said = _resolution_mpp(levels[0][0].keyframe)
    return ChosenImage(name, levels, mpp, note=_joined(note, said))


# --- pages ----------------------------------------------------------------------------


def _planes(
    uri: str, series: Any, plane: int | None
) -> tuple[tuple[tuple[Any, ...], ...], str]:
    """Return the pages of each level, and a note if others are left out.

    Raises:
        SlideError: Its planes are channels, of which nobody can tell the colours; or
            there is no such plane.
    """
    sizes = {
        axis: size
        for axis, size in zip(series.axes, series.shape, strict=True)
        if axis not in "YXS" and size > 1
    }
    said = " x ".join(f"{_AXES.get(axis, axis)}={n}" for axis, n in sizes.items())
    count, order = math.prod(sizes.values()), [plane or 0]
    if sizes == {"C": 3} and "S" not in series.axes:
        count = 1
        names = [str(value).lower() for value in series.coords.get("C", ())]
        if sorted(names) not in [sorted(colors) for colors in _RGB_NAMES]:
            raise SlideError(_channels(uri, said))
        order = [next(i for i, n in enumerate(names) if n[0] == c) for c in "rgb"]
    elif not (set(sizes) <= {"Z", "T"} or ("C" not in sizes and "S" in series.axes)):
        raise SlideError(_channels(uri, said))
    check_choice(uri, "plane", plane, count)
    levels = tuple(tuple(level.pages[i] for i in order) for level in series.levels)
    if any(page is None for page in levels[0]):
        raise SlideError(f"{uri}: the image of the plane to read is missing")
    if any(page is None for level in levels for page in level):
        raise SlideError(f"{uri}: a level of the pyramid is missing")
    if count == 1:
        return levels, ""
    if plane is not None:
        return levels, f"several planes ({said}): --plane {plane} is read"
    read = f"several planes ({said}): the first is read"
    return levels, f"{read}; --plane 0 to {count - 1} chooses"


def _channels(uri: str, said: str) -> str:
    return (
        f"{uri}: holds several channels or planes of grey ({said}), expected RGB; save "
        f"it as RGB, or name its channels Red, Green and Blue if they are"
    )


def _largest_first(pages: list[Any]) -> tuple[tuple[Any, ...], ...]:
    """Return one page of each size, the first that has it."""
    sizes: dict[tuple[int, int], Any] = {}
    for page in pages:
        sizes.setdefault(_size(page.keyframe), page)
    by_size = sorted(sizes.values(), key=lambda page: -_area(page.keyframe))
    return tuple((page,) for page in by_size)


def _fits(first: Any, page: Any) -> bool:
    """Tell whether a page has the proportions of a level of `first`."""
    (height, width), (h, w) = _size(first), _size(page)
    if not (0 < h <= height and 0 < w <= width):
        return False
    return abs(width * h / height - w) <= max(2.0, 0.02 * w)


def _size(page: Any) -> tuple[int, int]:
    return page.imagelength, page.imagewidth


def _area(page: Any) -> int:
    return int(page.imagelength) * int(page.imagewidth)


def _tag(element: Any) -> str:
    return str(element.tag).rpartition("}")[2]


def _joined(*notes: str) -> str:
    return "; ".join(note for note in notes if note)


def _number(value: Any) -> float | None:
    """Return a positive number, also one with a decimal comma; else None."""
    try:
        number = float(value.replace(",", ".") if isinstance(value, str) else value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def _resolution_mpp(page: Any) -> tuple[Mpp | None, str]:
    """Read X- and YResolution and ResolutionUnit (TIFF 6.0, section 8).

    Returns:
        Microns per pixel, and a note if the tags mean something else.
    """
    unit = page.tags.get("ResolutionUnit")
    microns = {2: 25400.0, 3: 1e4}.get(int(unit.value) if unit else 2)
    source, found = "XResolution", page.description or ""
    if microns is None and found.startswith("ImageJ"):
        named = re.search(r"^unit=(.*?)\s*$", found, re.MULTILINE)
        microns = _IMAGEJ_MICRONS.get(named[1]) if named else None
        source = "ImageJ unit"
    if microns is None:
        return None, ""
    per_pixel: list[float | None] = []
    for name in ("XResolution", "YResolution"):
        tag = page.tags.get(name)
        value = (0, 1) if tag is None else tag.value
        numerator, denominator = value if len(value) == 2 else (0, 1)
        known = numerator and denominator
        per_pixel.append(microns * denominator / numerator if known else None)
    x, y = per_pixel
    finest = min((value for value in per_pixel if value), default=0.0)
    # A unit of microns is no printer's, however large the pixels.
    if microns >= 1e3 and max(x or 0.0, y or 0.0) >= _COARSEST_TAGGED:
        coarsest = max(x or 0.0, y or 0.0)
        note = f"its {25400 / coarsest:g} dpi are a screen's or printer's, not its mpp"
        return None, note if finest < _COARSEST_NOTED else ""
    return mpp_of(x, y, source), ""
