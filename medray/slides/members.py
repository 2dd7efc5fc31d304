"""Which files a slide consists of.

Most slides are one file. These are several:

    MRXS        x.mrxs, and in the folder x: Slidedat.ini and the files that it names
    VMS, VMU    the file itself, and the files next to it that it names
    DICOM       all instances of a series in a folder (medray.slides.dicom)
"""

from __future__ import annotations

import configparser
import functools
import os
import re
from dataclasses import dataclass

from medray.errors import SlideError
from medray.slides import dicom, dicom_header
from medray.storage import files

SEVERAL_FILES = (".mrxs", ".vms", ".vmu")
"""Suffixes of the files that name others."""

_MOST_FILES = 10_000
_MOST_BYTES = 16 << 20
_VMS = ("Virtual Microscope Specimen", "Uncompressed Virtual Microscope Specimen")


@dataclass(frozen=True)
class Member:
    """A file of a slide.

    Attributes:
        uri: Path or address.
        size: Bytes.
        fingerprint: Size and time, as medray.storage.files.fingerprint returns them.
    """

    uri: str
    size: int
    fingerprint: str


def slide_members(uri: str) -> tuple[Member, ...]:
    """Return the files of a slide, the one that a reader opens first.

    Their order does not depend on how files or folders are named that other files do
    not name: a slide that was moved has it too.

    Args:
        uri: Path or address of the slide.

    Raises:
        FileNotFoundError: There is no such file.
        SlideError: One of the files is missing, or which there are cannot be read.
        StoreError: The files cannot be looked at.
    """
    lower = uri.lower()
    if lower.endswith(".mrxs"):
        return _mrxs(uri)
    if lower.endswith(SEVERAL_FILES):
        folder = os.path.dirname(uri) or "."
        own = _member(uri, files.fingerprint(uri))
        wanted, optional = _named_by_vms(uri, own.fingerprint)
        return (own, *_present(uri, uri, folder, wanted, optional))
    fingerprint = dicom.fingerprint_of_file(uri)
    maybe = fingerprint is None or dicom_header.may_be_dicom(uri)
    if maybe and (instances := dicom.find_series(uri)) is not None:
        dicom.check_series(uri, instances)
        return tuple(_member(one.uri, one.fingerprint) for one in instances)
    return (_member(uri, fingerprint or files.fingerprint(uri)),)


def named_beside(uri: str) -> list[str]:
    """Return the files that a VMS or VMU names, there or not; they are no slides.

    Also of one that is damaged, as far as its lines say.

    Raises:
        FileNotFoundError: It is not there.
        SlideError: It is too large for a VMS.
        StoreError: It cannot be read now.
    """
    values = re.findall(r"=[ \t]*(.*\S)", _read_text(uri))
    folder = os.path.dirname(uri) or "."
    return [files.join(folder, value) for value in values]


def _mrxs(uri: str) -> tuple[Member, ...]:
    own = _member(uri, files.fingerprint(uri))
    folder = uri[: -len(".mrxs")]
    ini = files.join(folder, "Slidedat.ini")
    try:
        fingerprint = files.fingerprint(ini)
    except FileNotFoundError as error:
        raise SlideError(
            f"{uri}: its file {ini} is missing; copy the folder of that name with the "
            f"slide"
        ) from error
    wanted = _named_by_mrxs(ini, fingerprint)
    return (own, _member(ini, fingerprint), *_present(uri, ini, folder, wanted, ()))


def _present(
    uri: str, ini: str, folder: str, wanted: tuple[str, ...], optional: tuple[str, ...]
) -> list[Member]:
    """Return the files of a folder that are there, and refuse if not all are."""
    fingerprints = files.list_fingerprints(folder)
    missing = [name for name in wanted if name not in fingerprints]
    if missing:
        raise SlideError(
            f"{uri}: its file {files.join(folder, missing[0])} is missing"
            f"{f', and {len(missing) - 1} more' if missing[1:] else ''}, which "
            f"{ini.rpartition('/')[2]} names; copy the whole slide again"
        )
    names = [*wanted, *(name for name in optional if name in fingerprints)]
    return [_member(files.join(folder, name), fingerprints[name]) for name in names]


@functools.lru_cache(maxsize=4096)
def _named_by_mrxs(ini: str, fingerprint: str) -> tuple[str, ...]:
    """Return the files that a Slidedat.ini names."""
    said = _read_ini(ini)
    try:
        count = int(said["DATAFILE"]["FILE_COUNT"])
        if not 0 <= count <= _MOST_FILES:
            raise ValueError(f"FILE_COUNT is {count}")
        names = [said["HIERARCHICAL"]["INDEXFILE"]]
        names += [said["DATAFILE"][f"FILE_{i}"] for i in range(count)]
    except (KeyError, ValueError) as error:
        raise SlideError(
            f"{ini}: expected [HIERARCHICAL] INDEXFILE and [DATAFILE] FILE_COUNT, "
            f"FILE_0 and so on, found {type(error).__name__}: {error}; it is damaged, "
            f"copy it again"
        ) from error
    return _safe(ini, names)


@functools.lru_cache(maxsize=4096)
def _named_by_vms(
    uri: str, fingerprint: str
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the files that a VMS or VMU needs, and the optional ones."""
    said = _read_ini(uri)
    section = next((said[name] for name in _VMS if name in said), None)
    images = [
        value
        for key, value in (section.items() if section is not None else ())
        if key.startswith("imagefile") and value
    ]
    if section is None or not images:
        raise SlideError(
            f"{uri}: expected [{_VMS[0]}] with ImageFile, found {said.sections()}; it "
            f"is damaged, copy it again"
        )
    needed = [*images, section.get("MapFile"), section.get("MacroImage")]
    spare = section.get("OptimisationFile")
    return (
        _safe(uri, [name for name in needed if name]),
        _safe(uri, [spare] if spare else []),
    )


def _read_text(uri: str) -> str:
    size = files.size(uri)
    if size > _MOST_BYTES:
        raise SlideError(
            f"{uri}: has {size} bytes, at most {_MOST_BYTES} are read; it is damaged"
        )
    return files.read_bytes(uri).decode("utf-8-sig", errors="surrogateescape")


def _read_ini(uri: str) -> configparser.ConfigParser:
    text = _read_text(uri)
    # Scanners indent lines and leave keys empty, which configparser takes for others.
    lines = [line.strip() for line in text.splitlines()]
    text = "\n".join(line for line in lines if not line.startswith("="))
    parser = configparser.ConfigParser(
        interpolation=None, strict=False, allow_no_value=True, delimiters=("=",)
    )
    try:
        parser.read_string(text)
    except (configparser.Error, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise SlideError(
            f"{uri}: expected sections and keys, found {said}; it is damaged, copy it "
            f"again"
        ) from error
    return parser


def _safe(uri: str, names: list[str]) -> tuple[str, ...]:
    """Raise an error for names that lead to other folders; a name counts once."""
    for name in names:
        if not name or name in (".", "..") or "/" in name or "\\" in name:
            raise SlideError(
                f"{uri}: names the file {name!r}, expected one in the same folder; it "
                f"is damaged"
            )
    return tuple(dict.fromkeys(names))


def _member(uri: str, fingerprint: str) -> Member:
    return Member(uri, int(fingerprint.partition(" ")[0]), fingerprint)
