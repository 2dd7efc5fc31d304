"""Which scanner made a slide, as far as its file says."""

from __future__ import annotations

import re
from typing import Any

import tifffile
from defusedxml import ElementTree

from medray.errors import MedrayError
from medray.slides import dicom, dicom_header
from medray.storage import remote_files

UNKNOWN = "unknown"
_LONGEST = 80
_DESCRIPTION, _MAKE, _MODEL = 270, 271, 272  # TIFF 6.0, section 8


def scanner_of(uri: str) -> str:
    """Name the scanner of a TIFF or DICOM slide.

    An SVS names its device (`ScanScope ID`), an OME-TIFF its microscope or detector,
    DICOM maker and model, others their Make and Model in the first page's tags.

    Args:
        uri: Path or address.

    Returns:
        At most 80 characters; `unknown` where the file does not say, or is of another
        format.
    """
    if dicom_header.may_be_dicom(uri):
        try:
            instances = dicom.find_series(uri)
        except (MedrayError, OSError):
            return UNKNOWN
        return _clean(instances[0].scanner) if instances else UNKNOWN
    if not uri.lower().endswith((".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif")):
        return UNKNOWN
    try:
        with remote_files.open_file(uri) as file, tifffile.TiffFile(file) as tiff:
            said = _said(tiff)
    except (MedrayError, OSError):
        return UNKNOWN
    except Exception:  # tifffile raises what a broken file leads it to
        return UNKNOWN
    return _clean(said)


def _clean(said: str) -> str:
    words = " ".join(re.sub(r"[^\x20-\x7e]", " ", said).split())
    return words[:_LONGEST] or UNKNOWN


def _said(tiff: Any) -> str:
    tags = tiff.pages[0].tags
    description = str(tags.valueof(_DESCRIPTION, ""))
    if found := re.search(r"\|\s*ScanScope ID\s*=\s*([^|\r\n]+)", description):
        return f"Aperio {found[1]}"
    if tiff.is_ome and (named := _ome(tiff.ome_metadata)):
        return named
    return " ".join(str(tags.valueof(tag, "")) for tag in (_MAKE, _MODEL))


def _ome(metadata: str) -> str:
    """Return maker, model and number of the first instrument that an OME-XML names."""
    for element in ElementTree.fromstring(metadata).iter():
        if element.tag.rpartition("}")[2] in ("Microscope", "Detector"):
            names = ("Manufacturer", "Model", "SerialNumber")
            if words := " ".join(filter(None, map(element.get, names))):
                return words
    return ""
