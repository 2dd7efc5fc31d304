"""The files that paths, globs, folders and addresses name."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import re
from collections.abc import Iterable

from medray.errors import ConfigError
from medray.slides import dicom
from medray.slides.dicom_header import may_be_dicom
from medray.storage import files

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
    ".webp",
    ".gif",
)


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
    """Return (address, path below what was named) of what lies at an address.

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
    """Return a file's path below what a glob names of it; "" if it names nothing of it.

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
    """Return whether the parts of a path are as a glob wants them; ** is any number."""
    if not wanted or not parts:
        return wanted in (parts, ["**"])
    if wanted[0] == "**":
        return _matches(parts, wanted[1:]) or _matches(parts[1:], wanted)
    return fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


def expand_names(item: str) -> list[str]:
    """Return the files, folders and addresses that an item names: several for a glob.

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


def expand_item(
    item: str, suffixes: tuple[str, ...], *, bare: bool = False
) -> list[tuple[str, str]]:
    """Return (address, path below what was named) of each file that an item stands for.

    With `bare` files count too that may be DICOM, which need no suffix.
    """

    def wanted(name: str) -> bool:
        suffixed = strip_suffix(name, suffixes) is not None
        return suffixed or (bare and may_be_dicom(name))

    if files.exists(files.join(item, "dataset.yaml")):
        item = files.join(item, "slides")
    if "://" in item:
        return [
            (uri, relative)
            for uri, relative in _expand_address(item.rstrip("/"))
            if wanted(relative)
        ]
    path = os.path.abspath(os.path.expanduser(item))
    if is_searched_folder(path):
        found = [name for name in _walk(path) if wanted(name)]
        return [(name, os.path.relpath(name, path)) for name in found]
    return [(path, os.path.basename(path))]


def is_searched_folder(path: str) -> bool:
    """Return whether this is a folder to search: no file, no OME-Zarr."""
    path = os.path.expanduser(path)
    return os.path.isdir(path) and not path.rstrip("/").endswith(".zarr")


def find_files(
    items: Iterable[str], suffixes: tuple[str, ...]
) -> list[tuple[str, str]]:
    """Return (address, relative path) of the files that `items` name, without repeats.

    Args:
        items: Files, globs, folders (searched in depth) or addresses. A file
            that is named counts with any suffix; a dataset stands for its slides.
        suffixes: Which files count in a folder.

    Raises:
        ConfigError: An item names nothing, or a folder cannot be read.
    """
    found: dict[str, str] = {}
    for name in itertools.chain.from_iterable(map(expand_names, items)):
        for uri, relative in expand_item(name, suffixes):
            found.setdefault(uri, relative)
    return sorted(found.items())


def strip_suffix(name: str, suffixes: Iterable[str] = SLIDE_SUFFIXES) -> str | None:
    """Return `name` without its suffix; None when it has none of `suffixes`."""
    lower = name.lower()
    for suffix in sorted(suffixes, key=len, reverse=True):
        if lower.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return None
