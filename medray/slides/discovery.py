"""Which slides a request names, and the id of each."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import itertools
import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from medray.errors import ConfigError, SlideError, StoreError
from medray.slides import dicom, members
from medray.storage import files

log = logging.getLogger(__name__)

SLIDE_SUFFIXES = (
    ".ome.zarr",
    ".ome.tiff",
    ".ome.tif",
    ".tiff",
    ".tif",
    ".svs",
    ".ndpi",
    ".scn",
    ".bif",
    ".qptiff",
    ".mrxs",
    ".vms",
    ".vmu",
    ".dcm",
    ".dicom",
    ".png",
    ".jpeg",
    ".jpg",
    ".bmp",
)
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


def strip_suffix(name: str, suffixes: Iterable[str] = SLIDE_SUFFIXES) -> str | None:
    """Give `name` without its suffix; None when it has none of `suffixes`."""
    lower = name.lower()
    for suffix in sorted(suffixes, key=len, reverse=True):
        if lower.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return None


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


def _walk(folder: str) -> list[str]:
    """List files and `*.zarr` folders under a local folder, as absolute paths."""
    found = []

    def refuse(error: OSError) -> None:
        raise ConfigError(
            f"{error.filename}: folder cannot be read ({error.strerror}); give this "
            f"user permission to read it, or name the slides to use"
        ) from error

    for root, folders, names in os.walk(folder, onerror=refuse):
        zarrs = [name for name in folders if name.endswith(".zarr")]
        folders[:] = [f for f in folders if f not in zarrs and not f.startswith(".")]
        shown = (name for name in [*zarrs, *names] if not name.startswith("."))
        found += [os.path.join(root, name) for name in shown]
    return found


def _expand_address(address: str) -> list[tuple[str, str]]:
    """Give (address, path below what was named) of what lies at an address.

    A glob names files and, as among local files, folders, whose files it stands for.
    """
    if address.endswith(".zarr"):
        return [(address, address.rpartition("/")[2])]
    pattern = re.search(r"[*?\[]", address)
    root = address[: pattern.start()].rpartition("/")[0] if pattern else address
    found: dict[str, str] = {}
    for name in files.list_files(root):
        # The files of an OME-Zarr stand for the whole.
        inside = re.match(r".*?\.zarr(?=/)", name)
        name = inside[0] if inside else name
        found[files.join(root, name)] = name
    if pattern:
        wanted = address[len(root) :].strip("/").split("/")
        matched = ((uri, _below(name, wanted)) for uri, name in found.items())
        return [(uri, name) for uri, name in matched if name]
    if not found and (files.exists(address) or dicom.find_series(address)):
        return [(address, address.rpartition("/")[2])]
    return list(found.items())


def _below(name: str, wanted: list[str]) -> str:
    """Give a file's path below what a glob names of it; "" if it names nothing of it.

    That is the whole path of a file that matches, and else what lies below the
    uppermost of its folders that does.
    """
    parts = name.split("/")
    if _matches(parts, wanted):
        return name
    for count in range(1, len(parts)):
        if _matches(parts[:count], wanted):
            return "/".join(parts[count:])
    return ""


def _matches(parts: list[str], wanted: list[str]) -> bool:
    """Tell whether the parts of a path are as a glob wants them; ** is any number."""
    if not wanted or not parts:
        return wanted in (parts, ["**"])
    if wanted[0] == "**":
        return _matches(parts, wanted[1:]) or _matches(parts[1:], wanted)
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def _names(item: str) -> list[str]:
    """Give the files, folders and addresses that an item names: of a glob several.

    What a shell would make of a glob, so that it need not matter who expands it.

    Raises:
        ConfigError: There are none.
    """
    path = os.path.expanduser(item)
    if "://" in item or os.path.lexists(path):
        return [item]
    if names := sorted(glob.glob(path, recursive=True)):
        return names
    if dicom.find_series(os.path.abspath(path)):
        return [item]
    raise ConfigError(
        f"{item}: nothing there; name a file, a glob, a folder or an address"
    )


def _expand(
    item: str, suffixes: tuple[str, ...], *, bare: bool = False
) -> list[tuple[str, str]]:
    """Give (address, path below what was named) of each file of what `_names` gives.

    With `bare` files count too that may be DICOM, which need no suffix.
    """

    def wanted(name: str) -> bool:
        suffixed = strip_suffix(name, suffixes) is not None
        return suffixed or (bare and dicom.may_be_dicom(name))

    if files.exists(files.join(item, "dataset.yaml")):
        item = files.join(item, "slides")
    if "://" in item:
        return [
            (uri, relative)
            for uri, relative in _expand_address(item.rstrip("/"))
            if wanted(relative)
        ]
    path = os.path.abspath(os.path.expanduser(item))
    if _is_folder(path):
        found = [name for name in _walk(path) if wanted(name)]
        return [(name, os.path.relpath(name, path)) for name in found]
    return [(path, os.path.basename(path))]


def _is_folder(path: str) -> bool:
    """Tell a folder that is searched from a file, or from an OME-Zarr."""
    path = os.path.expanduser(path)
    return os.path.isdir(path) and not path.rstrip("/").endswith(".zarr")


def find_files(
    items: Iterable[str], suffixes: tuple[str, ...]
) -> list[tuple[str, str]]:
    """Give (address, relative path) of the files that `items` name, without repeats.

    Args:
        items: Files, globs, folders (searched in depth) or addresses. A file
            that is named is taken whatever its suffix; a dataset stands for its slides.
        suffixes: Which files count in a folder.

    Raises:
        ConfigError: An item names nothing, or a folder cannot be read.
    """
    found: dict[str, str] = {}
    for name in itertools.chain.from_iterable(map(_names, items)):
        for uri, relative in _expand(name, suffixes):
            found.setdefault(uri, relative)
    return sorted(found.items())


def find_slide_files(items: Iterable[str]) -> list[tuple[str, str]]:
    """Give (address, relative path) of the slides that `items` name, without repeats.

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
        for name in itertools.chain.from_iterable(map(_names, items)):
            expanded = _expand(name, SLIDE_SUFFIXES, bare=True)
            if not ("://" in name or _is_folder(name)):
                named.update(uri for uri, _ in expanded)
            for uri, relative in expanded:
                found.setdefault(uri, relative)
        for uri in _in_data_folders([*found]):
            del found[uri]
        by_folder: dict[str, dict[str, str]] = {}
        for uri in [uri for uri in found if dicom.may_be_dicom(uri)]:
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
    """Give the files that a VMS or VMU names, as far as it can be read."""
    try:
        return members.named_beside(uri)
    except (SlideError, FileNotFoundError):
        return []
    except StoreError as error:
        if not files.is_of_one_file(error):
            raise
        # Scanners name them like the slide: x.vms has x.jpg, x(1,0).jpg, x_macro.jpg.
        return [one for one in others if one != uri and one.startswith(uri[:-4])]


def _in_data_folders(uris: list[str]) -> list[str]:
    """Give what lies in the data folders of MRXS slides, which is part of those."""
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
    """Give the slides (relative path by address) that files of a folder belong to.

    Args:
        folder: That they lie in.
        group: Relative path of each by its address.
        named: Files that were named, not found.
    """
    instances = {one.uri: one for one in dicom.read_folder(folder)}
    series = dicom.volume_series(instances.values())
    slides: dict[str, str] = {}
    no_slides: list[dicom.Instance] = []
    unread: list[dicom.Instance] = []
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
        elif one and one.unread and not uri.lower().endswith(dicom.SUFFIXES):
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
    """Give the slides that `items` name, each with an id of its own.

    Raises:
        ConfigError: Nothing is found, or a folder cannot be read.
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
    """Give each (address, relative path) an id of its own.

    Ids that would be equal (also but for case) get a hash of their address appended.
    """
    named = [(uri, slide_id(path)) for uri, path in found]
    count = Counter(name.casefold() for _, name in named)
    slides = []
    for uri, name in named:
        unique = count[name.casefold()] == 1
        slides.append(SlideFile(name if unique else _unique_id(name, uri), uri))
    return slides
