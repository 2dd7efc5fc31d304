"""Annotations of many formats as polygons with a class, and as label arrays."""

from __future__ import annotations

import gzip
import io

from defusedxml import ElementTree
from defusedxml.common import EntitiesForbidden

from medray.annotations.area import Area, clip_to_slide
from medray.annotations.geojson import geojson_features, parse_geojson
from medray.annotations.mask_image import is_picture, parse_mask
from medray.annotations.rasterise import rasterise
from medray.annotations.svg import parse_svg
from medray.annotations.xml import parse_asap, parse_imagescope
from medray.classes import Classes
from medray.errors import MedrayError, SlideError
from medray.store import files

__all__ = [
    "ANNOTATION_SUFFIXES",
    "Area",
    "geojson_features",
    "rasterise",
    "read_annotation",
    "read_areas",
    "read_extent",
]

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


def read_annotation(
    uri: str, *, height: int, width: int, classes: Classes
) -> list[Area]:
    """Read what an annotation file marks, without its areas of class `Region*`.

    Args, result and errors are those of `read_areas`.
    """
    areas = read_areas(uri, height=height, width=width, classes=classes)
    return [area for area in areas if not _is_extent(area)]


def read_extent(uri: str, *, height: int, width: int, classes: Classes) -> list[Area]:
    """Read where a slide is annotated: the areas of class `Region*`.

    If there are none, it is so all over. Args and errors are those of `read_areas`.
    """
    areas = read_areas(uri, height=height, width=width, classes=classes)
    return [area for area in areas if _is_extent(area)]


def _is_extent(area: Area) -> bool:
    return (area.class_name or "").strip().casefold() == EXTENT.casefold()


def read_areas(uri: str, *, height: int, width: int, classes: Classes) -> list[Area]:
    """Read an annotation file as areas, cut off at the slide's border.

    Args:
        uri: SVG, QuPath GeoJSON (.gz), ASAP or ImageScope XML, or a mask image.
        height: Level-0 pixels of the slide.
        width: Likewise.
        classes: Names by label value.

    Returns:
        Areas with known classes or `Region*`, in the order of drawing.

    Raises:
        SlideError: The file is damaged, of another slide, or names an unknown class.
    """
    try:
        data = files.read_bytes(uri)
        if data[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(_MAX_BYTES + 1)
        areas = _parse(uri, data, height, width, classes)
        for area in areas:
            if not _is_extent(area):
                classes.value(area.class_name)
    except SlideError as error:
        message = f"{error}"
        named = message if uri in message else f"{uri}: {message}"
        raise SlideError(named) from error
    except (MedrayError, FileNotFoundError) as error:
        raise SlideError(f"{uri}: cannot be read ({error})") from error
    # Parsers raise exceptions of many kinds on what is not their format.
    except Exception as error:
        found = " ".join(f"{type(error).__name__} {error}".split())[:200]
        raise SlideError(
            f"{uri}: expected {_EXPECTED}, found a damaged file ({found}); {_REMEDY}"
        ) from error
    return clip_to_slide(uri, areas, height, width)


def _parse(
    uri: str, data: bytes, height: int, width: int, classes: Classes
) -> list[Area]:
    """Tell the formats apart by their content: suffixes are often wrong."""
    if is_picture(data):
        return parse_mask(uri, data, height=height, width=width, classes=classes)
    if len(data) > _MAX_BYTES:
        raise SlideError(f"{uri}: larger than {_MAX_BYTES} bytes; split it up")
    start = data[:4096]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
        start = start.decode("utf-16", "ignore").encode()
    start = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] in (b"{", b"["):
        return parse_geojson(uri, data)
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
        return parse_svg(uri, root, height=height, width=width, classes=classes)
    if tag == "ASAP_Annotations":
        return parse_asap(root)
    if tag == "Annotations":
        return parse_imagescope(root, classes)
    raise SlideError(f"{uri}: expected {_EXPECTED}, found <{tag}>; {_REMEDY}")
