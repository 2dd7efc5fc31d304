"""Annotations of many formats as polygons with a class, and as label arrays."""

from __future__ import annotations

import gzip
import io

from PIL import Image

from medray.annotations.area import Area, clip_to_slide
from medray.annotations.geojson import geojson_features, parse_geojson
from medray.annotations.mask_image import parse_mask
from medray.annotations.rasterise import rasterise
from medray.annotations.svg import parse_svg
from medray.annotations.xml import parse_xml
from medray.classes import Classes
from medray.errors import MedrayError, SlideError
from medray.store import files

__all__ = [
    "ANNOTATION_SUFFIXES",
    "Area",
    "geojson_features",
    "rasterise",
    "read_annotation",
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

_MAX_BYTES = 1 << 28


def read_annotation(
    uri: str, *, height: int, width: int, classes: Classes
) -> list[Area]:
    """Read an annotation file as areas, cut off at the slide's border.

    Args:
        uri: SVG, QuPath GeoJSON (.gz), ASAP or ImageScope XML, or a mask image.
        height: Level-0 pixels of the slide.
        width: Likewise.
        classes: Names by label value.

    Returns:
        Areas with known classes, in the order of drawing.

    Raises:
        SlideError: The file is damaged, of another slide, or names an unknown class.
    """
    try:
        data = files.read_bytes(uri)
        if data[:2] == b"\x1f\x8b":
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise SlideError(f"{uri}: larger than {_MAX_BYTES} bytes; split it up")
        areas = _parse(uri, data, height, width, classes)
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
        raise SlideError(
            f"{uri}: expected an annotation, found {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    return clip_to_slide(uri, areas, height, width)


def _parse(
    uri: str, data: bytes, height: int, width: int, classes: Classes
) -> list[Area]:
    start = data[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:1] in (b"{", b"["):
        return parse_geojson(uri, data)
    if start[:1] == b"<":
        if uri.lower().endswith(".svg") or b"<svg" in start:
            return parse_svg(uri, data, height=height, width=width, classes=classes)
        return parse_xml(uri, data, classes)
    return parse_mask(uri, data, height=height, width=width, classes=classes)


Image.MAX_IMAGE_PIXELS = None  # every reader here bounds sizes itself
