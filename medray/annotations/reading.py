"""Annotations of many formats as polygons with a class, and as label arrays."""

from __future__ import annotations

import gzip
import io
from collections import Counter
from dataclasses import dataclass

from defusedxml import ElementTree
from defusedxml.common import EntitiesForbidden

from medray.annotations.areas import (
    clip_to_slide,
    draw_nested_last,
    leave_out_unclassed,
    note_extremes,
)
from medray.annotations.geojson import parse_geojson
from medray.annotations.mask_image import is_picture, parse_mask
from medray.annotations.polygons import Area, Note
from medray.annotations.svg import parse_svg
from medray.annotations.xml import parse_asap, parse_imagescope
from medray.classes import Classes
from medray.errors import MedrayError, SlideError
from medray.slides import scanned_bounds
from medray.storage import files

ANNOTATION_SUFFIXES = (
    ".geojson.gz",
    ".geojson",
    ".json",
    ".svg",
    ".xml",
    ".png",
    ".tiff",
    ".tif",
)
"""What counts as an annotation in a folder, in the order of preference."""

_MAX_BYTES = (
    1 << 28
)  # of a file of text, unpacked; pictures are bounded by their pixels
_EXPECTED = "SVG, GeoJSON, ASAP or ImageScope XML, or a PNG or TIFF mask"
_REMEDY = "export the annotation again, or remove this file"


EXTENT = "Region*"
"""QuPath's own class for where a slide is annotated, if it is so only in part."""


@dataclass(frozen=True)
class Annotation:
    """What an annotation file says of a slide.

    Attributes:
        areas: Areas with known classes, cut off at the slide's border, in the order of
            drawing.
        extent: Where the slide is annotated, from areas of class `Region*`; if there
            are none, it is so all over.
        notes: What the user should know: what was left out, inferred or is odd.
    """

    areas: list[Area]
    extent: list[Area]
    notes: tuple[str, ...]


def read_annotation(
    uri: str, *, height: int, width: int, classes: Classes
) -> list[Area]:
    """Return the areas that an annotation file marks, see `read_marks`."""
    return read_marks(uri, height=height, width=width, classes=classes).areas


def read_extent(uri: str, *, height: int, width: int, classes: Classes) -> list[Area]:
    """Return where a slide is annotated, see `read_marks`."""
    return read_marks(uri, height=height, width=width, classes=classes).extent


def _is_extent(area: Area) -> bool:
    return (area.class_name or "").strip().casefold() == EXTENT.casefold()


def read_areas(
    uri: str, *, height: int, width: int, classes: Classes, slide: str = ""
) -> list[Area]:
    """Return all areas of an annotation file, those of class `Region*` too."""
    marks = read_marks(uri, height=height, width=width, classes=classes, slide=slide)
    return [*marks.areas, *marks.extent]


def read_marks(
    uri: str, *, height: int, width: int, classes: Classes, slide: str = ""
) -> Annotation:
    """Read an annotation file.

    Args:
        uri: SVG, QuPath GeoJSON (.gz), ASAP or ImageScope XML, or a mask image.
        height: Height of the slide, level-0 pixels.
        width: Width of the slide, level-0 pixels.
        classes: Names by label value.
        slide: Address of the slide, for its scanned bounds; empty: it has none.

    Raises:
        SlideError: The file is damaged, of another slide, names an unknown class, or
            has points and lines only, which mark something and enclose nothing.
    """
    notes: dict[str, None] = {}
    flat: Counter[str] = Counter()

    def note(said: str) -> None:
        notes.setdefault(f"annotation: {said}")

    try:
        data = files.read_bytes(uri)
        if data[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(_MAX_BYTES + 1)
        found = _parse(uri, data, height, width, classes, note, flat, slide)
        extent = [area for area in found if _is_extent(area)]
        areas = [area for area in found if not _is_extent(area)]
        _leave_out_flat(+flat, areas, note)
        areas = leave_out_unclassed(areas, classes, height, width, note)
        for area in areas:
            classes.value(area.class_name)
    except SlideError as error:
        message = f"{error}"
        named = message if uri in message else f"{uri}: {message}"
        raise SlideError(named) from error
    except (MedrayError, FileNotFoundError) as error:
        raise SlideError(f"{uri}: cannot be read ({error})") from error
    # Parsers raise exceptions of many kinds on what is not their format.
    except Exception as error:
        said = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise SlideError(
            f"{uri}: expected {_EXPECTED}, found a damaged file ({said}); {_REMEDY}"
        ) from error
    areas = clip_to_slide(uri, areas, height, width, note)
    extent = clip_to_slide(uri, extent, height, width, note)
    if not is_picture(data):  # the pixels of a mask do not overlap
        areas = draw_nested_last(areas, classes, note)
        if not areas:
            note("marks no area, so all that is annotated is background")
    note_extremes(areas, classes, height, width, note)
    return Annotation(areas, extent, tuple(notes))


def _leave_out_flat(flat: Counter[str], areas: list[Area], note: Note) -> None:
    """Report shapes that enclose nothing, where there are areas besides.

    Raises:
        SlideError: There are none. The shapes mark something, so the slide is no
            example of one where nothing is.
    """
    if not flat:
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(flat.items()))
    if not areas:
        raise SlideError(
            f"encloses no area, has only shapes without one ({kinds}); draw outlines "
            f"around what they mark, or remove them to say that nothing is there"
        )
    note(f"has shapes without an area ({kinds}); left out")


def _parse(
    uri: str,
    data: bytes,
    height: int,
    width: int,
    classes: Classes,
    note: Note,
    flat: Counter[str],
    slide: str,
) -> list[Area]:
    """Parse a file in the format that its content shows: suffixes are often wrong."""
    if is_picture(data):
        return parse_mask(uri, data, height=height, width=width, classes=classes)
    if len(data) > _MAX_BYTES:
        raise SlideError(f"{uri}: larger than {_MAX_BYTES} bytes; split it up")
    start = data[:4096]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        start = start.decode("utf-16", "ignore").encode()
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] in (b"{", b"["):
        bounds = scanned_bounds(slide, height=height, width=width)
        return parse_geojson(uri, data, note, flat, bounds)
    if start[:1] != b"<":
        found = f"a file that starts with {start[:16]!r}" if data else "an empty file"
        raise SlideError(f"{uri}: expected {_EXPECTED}, found {found}; {_REMEDY}")
    try:
        # Editors write a harmless DOCTYPE; what harms are the entities inside one.
        root = ElementTree.fromstring(data, forbid_dtd=False, forbid_entities=True)
    except EntitiesForbidden as error:
        raise SlideError(
            f"{uri}: found an XML entity ({error.name}), and entities are refused, for "
            f"they can grow without bounds; save it without (as plain SVG)"
        ) from error
    tag = str(root.tag).rpartition("}")[2]
    if tag == "svg":
        size = (height, width)
        return parse_svg(uri, root, size, classes, note, flat)
    if tag == "ASAP_Annotations":
        return parse_asap(root, flat)
    if tag == "Annotations":
        return parse_imagescope(root, classes, flat)
    raise SlideError(f"{uri}: expected {_EXPECTED}, found <{tag}>; {_REMEDY}")
