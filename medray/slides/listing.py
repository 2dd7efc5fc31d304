"""Which slides a request names, and the id of each."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from medray.errors import ConfigError
from medray.store import files

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
    """Give (address, path below what was named) of what lies at an address."""
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
        return [item for item in found.items() if _matches(item[1].split("/"), wanted)]
    if not found and files.exists(address):
        return [(address, address.rpartition("/")[2])]
    return list(found.items())


def _matches(parts: list[str], wanted: list[str]) -> bool:
    """Tell whether the parts of a path are as a glob wants them; ** is any number."""
    if not wanted or not parts:
        return wanted in (parts, ["**"])
    if wanted[0] == "**":
        return _matches(parts, wanted[1:]) or _matches(parts[1:], wanted)
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def _expand(item: str, suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Give (address, path below what was named) of each file that `item` names."""
    if files.exists(files.join(item, "dataset.yaml")):
        item = files.join(item, "slides")
    if "://" in item:
        return [
            (uri, relative)
            for uri, relative in _expand_address(item.rstrip("/"))
            if strip_suffix(relative, suffixes)
        ]
    path = os.path.abspath(os.path.expanduser(item))
    if os.path.isdir(path) and not path.endswith(".zarr"):
        found = [name for name in _walk(path) if strip_suffix(name, suffixes)]
        return [(name, os.path.relpath(name, path)) for name in found]
    names = [path] if os.path.lexists(path) else sorted(glob.glob(path, recursive=True))
    if not names:
        raise ConfigError(
            f"{item}: nothing there; name a file, a glob, a folder or an address"
        )
    return [(name, os.path.basename(name)) for name in names]


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
    for item in items:
        for uri, relative in _expand(item, suffixes):
            found.setdefault(uri, relative)
    return sorted(found.items())


def find_slides(items: Iterable[str]) -> list[SlideFile]:
    """Give the slides that `items` name, each with an id of its own.

    Raises:
        ConfigError: Nothing is found, or a folder cannot be read.
    """
    items = list(items)
    slides = as_slides(find_files(items, SLIDE_SUFFIXES))
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
