"""Which slides a request names, and the id of each."""

from __future__ import annotations

import hashlib
import itertools
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from medray.errors import ConfigError, SlideError, StoreError
from medray.slides import dicom, dicom_header, members
from medray.slides.listing import (
    SLIDE_SUFFIXES,
    expand_item,
    expand_names,
    is_searched_folder,
    strip_suffix,
)
from medray.storage import files, object_store

log = logging.getLogger(__name__)

_MAX_ID = 120  # bytes; file systems allow 255, and suffixes are added


@dataclass(frozen=True)
class SlideFile:
    """One slide to work on.

    Attributes:
        slide: Its id: unique in a request, safe as a file name.
        uri: Absolute path or address.
        mpp: Microns per pixel of level 0, as the user says; None: as the file says.
        scene: Which of several slides in the file; None: by the format's rules.
        plane: Which of several focal planes; None: the one in focus, or the first.
    """

    slide: str
    uri: str
    mpp: float | None = None
    scene: int | None = None
    plane: int | None = None

    @property
    def given(self) -> str:
        """What the user says of it, as the end of a digest: `+mpp=0.25`, or ""."""
        said = {"mpp": self.mpp, "scene": self.scene, "plane": self.plane}
        return "".join(f"+{k}={v:.9g}" for k, v in said.items() if v is not None)

    @property
    def path(self) -> str:
        """The path that the id was made of: the end of `uri`, below what was named.

        A run and a dataset store id and address of a slide, so every stage sees the
        same path. If the id was not made of the address, it is the id.
        """
        parts = [part for part in self.uri.split("/") if part]
        for count in range(1, len(parts) + 1):
            path = "/".join(parts[-count:])
            name = slide_id(path)
            if self.slide in (name, _unique_id(name, self.uri)):
                return unicodedata.normalize("NFC", path)
        return self.slide


def slide_id(relative: str, suffixes: Iterable[str] = SLIDE_SUFFIXES) -> str:
    """Make a safe id of a path: one file name, never a path, never hidden.

    Folders become part of the name (`a/x.tif` is `a__x`), so slides of one name in
    different folders stay apart.
    """
    name = unicodedata.normalize("NFC", relative)
    name = strip_suffix(name, suffixes) or name
    parts = [part for part in re.split(r"[/\\]+", name) if part not in ("", ".", "..")]
    safe = re.sub(r"[^\w.()+-]", "_", "__".join(parts)).strip(".") or "slide"
    if len(safe.encode()) > _MAX_ID:
        start = safe.encode()[: _MAX_ID - 9].decode(errors="ignore")
        safe = f"{start}-{_short_hash(safe)}"
    return safe


def _short_hash(text: str) -> str:
    # Linux allows names that are no Unicode; Python has surrogates for their bytes.
    data = text.encode(errors="surrogateescape")
    return hashlib.blake2b(data, digest_size=4).hexdigest()


def _unique_id(name: str, uri: str) -> str:
    return f"{name}-{_short_hash(uri)}"


def find_slide_files(items: Iterable[str]) -> list[tuple[str, str]]:
    """Return (address, relative path) of the slides that `items` name, without repeats.

    A slide of several files is one: the files that a VMS names are none of their own,
    and DICOM instances of one series are the slide that medray.slides.dicom says: their
    folder, or, where it holds several series, FOLDER/SeriesInstanceUID. DICOM files
    that are no slides are left out unless they are named one by one.

    Raises:
        ConfigError: An item names nothing, a folder cannot be read, or pydicom is
            needed and not installed.
        StoreError: The files cannot be looked at.
    """
    found: dict[str, str] = {}
    named: set[str] = set()
    try:
        for name in itertools.chain.from_iterable(map(expand_names, items)):
            expanded = expand_item(name, SLIDE_SUFFIXES, bare=True)
            if not ("://" in name or is_searched_folder(name)):
                named.update(uri for uri, _ in expanded)
            for uri, relative in expanded:
                found.setdefault(uri, relative)
        for uri in _in_data_folders([*found]):
            del found[uri]
        by_folder: dict[str, dict[str, str]] = {}
        for uri in [uri for uri in found if dicom_header.may_be_dicom(uri)]:
            folder = uri.rpartition("/")[0]
            by_folder.setdefault(folder, {})[uri] = found.pop(uri)
        for folder, group in by_folder.items():
            found |= _dicom_slides(folder, group, named)
    except SlideError as error:
        raise ConfigError(f"{error}") from error
    for uri in [uri for uri in found if uri.lower().endswith((".vms", ".vmu"))]:
        for part in _parts_of_vms(uri, [*found]):
            if part not in named:
                found.pop(part, None)
    return sorted(found.items())


def _parts_of_vms(uri: str, others: list[str]) -> list[str]:
    """Return the files that a VMS or VMU names, as far as it can be read."""
    try:
        return members.named_beside(uri)
    except (SlideError, FileNotFoundError):
        return []
    except StoreError as error:
        if not object_store.is_of_one_file(error):
            raise
        # Scanners name them like the slide: x.vms has x.jpg, x(1,0).jpg, x_macro.jpg.
        return [one for one in others if one != uri and one.startswith(uri[:-4])]


def _in_data_folders(uris: list[str]) -> list[str]:
    """Return what lies in the data folders of MRXS slides, which is part of those."""
    folders, there = {uri.rpartition("/")[0] for uri in uris}, set(uris)
    data = {
        folder
        for folder in folders
        for slide in (f"{folder}.mrxs", f"{folder}.MRXS")
        # A store takes a request to be asked.
        if slide in there or (files.is_local(slide) and files.exists(slide))
        if files.exists(files.join(folder, "Slidedat.ini"))
    }
    return [uri for uri in uris if uri.rpartition("/")[0] in data]


def _dicom_slides(
    folder: str, group: dict[str, str], named: set[str]
) -> dict[str, str]:
    """Return the slides (relative path by address) that files of a folder belong to.

    Args:
        folder: That they lie in.
        group: Relative path of each by its address.
        named: Files that were named, not found.
    """
    instances = {one.uri: one for one in dicom.read_folder(folder)}
    series = dicom.volume_series(instances.values())
    slides: dict[str, str] = {}
    no_slides: list[dicom_header.Instance] = []
    unread: list[dicom_header.Instance] = []
    for uri, relative in group.items():
        one = instances.get(uri)
        above, _, name = relative.rpartition("/")
        its = one.series if one and one.flavor else name
        if its in series:
            address = dicom.series_address(folder, its, series)
            alone = above or folder.rpartition("/")[2]
            slides[address] = (
                alone if address == folder else f"{above}/{its}".lstrip("/")
            )
        elif uri in named or (one and one.damaged):
            slides[uri] = relative
        elif one and one.unread and not uri.lower().endswith(dicom_header.SUFFIXES):
            unread.append(one)
        elif one and not one.unread:
            no_slides.append(one)
        elif strip_suffix(uri):  # says that it is DICOM, and is not
            slides[uri] = relative
    if no_slides:
        log.warning(
            "%d DICOM files in %s are no slides, left out: %s (%s)",
            len(no_slides),
            folder,
            no_slides[0].uri.rpartition("/")[2],
            no_slides[0].flavor or no_slides[0].kind,
        )
    if unread:
        log.warning(
            "%d files without a suffix in %s may be DICOM and cannot be read, left "
            "out: %s",
            len(unread),
            folder,
            unread[0].unread,
        )
    return slides


def find_slides(items: Iterable[str]) -> list[SlideFile]:
    """Return the slides that `items` name, each with an id of its own.

    Raises:
        ConfigError: Nothing is found, or a folder cannot be read.

    Examples:
        >>> from medray.slides import find_slides
        >>> [slide.slide for slide in find_slides(["slides/slide_00[01].tif"])]
        ['slide_000', 'slide_001']
    """
    items = list(items)
    slides = as_slides(find_slide_files(items))
    if not slides:
        raise ConfigError(
            f"no slides in {items}: expected files that end in "
            f"{', '.join(SLIDE_SUFFIXES)}"
        )
    return slides


def as_slides(found: Iterable[tuple[str, str]]) -> list[SlideFile]:
    """Assign each (address, relative path) an id of its own.

    Ids that would be equal (also but for case) get a hash of their address appended.
    """
    named = [(uri, slide_id(path)) for uri, path in found]
    count = Counter(name.casefold() for _, name in named)
    slides = []
    for uri, name in named:
        unique = count[name.casefold()] == 1
        slides.append(SlideFile(name if unique else _unique_id(name, uri), uri))
    return slides
