"""Images in class folders, as they are found."""

from __future__ import annotations

import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

from medray.annotations import CONTOUR_SUFFIX
from medray.datasets.cells import with_contours, without_clusters
from medray.datasets.images import ImageFile
from medray.datasets.splits import SPLIT_NAMES
from medray.errors import ConfigError
from medray.slides import find_files, fingerprint_of, strip_suffix
from medray.storage import files

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")
# What file systems and their programs leave behind, in lower case.
_LEFTOVERS = ("thumbs.db", "desktop.ini", "__macosx")
_LAYOUT = (
    "FOLDER/CLASS/IMAGE, or FOLDER/SPLIT/CLASS/IMAGE with the splits train, val, test"
)


def find_images(
    folder: str, classes: Sequence[str] = (), *, contours: bool = False
) -> list[ImageFile]:
    """Return the images by their names.

    With `contours` they are cells, as medray.datasets.cells.with_contours has them.
    Other files in class folders are counted in the log.

    Raises:
        ConfigError: There are no class folders, or one has no image; folders may be
            splits by other names; there are no contours.
    """
    root = files.absolute(folder)
    found: dict[str, str] = {}  # address by name
    others = []
    for uri, relative in find_files([root], ("",)):
        if strip_suffix(relative, IMAGE_SUFFIXES) is not None:
            found[relative] = uri
        elif "/" in relative and not _is_known_other(relative):
            others.append(relative)
    splits = _splits_of(folder, found, classes)
    images = []
    for relative, uri in found.items():
        parts = relative.split("/")
        split = splits.get(parts[0], "")
        below = parts[1:] if split else parts
        if len(below) < 2:
            raise ConfigError(
                f"{uri}: expected images in a folder for each class "
                f"({folder}/CLASS/IMAGE), found one beside them"
            )
        images.append(
            ImageFile(
                image=relative,
                uri=uri,
                class_name=below[0],
                split=split,
                fingerprint=fingerprint_of(uri),
                patient=relative,
            )
        )
    if others:
        log.warning(
            "left out: %d files that are no images (%s), such as %s",
            len(others),
            ", ".join(IMAGE_SUFFIXES),
            others[0],
        )
    _check_classes(folder, images, classes, _folders(root, splits))
    cells = without_clusters(images)
    if contours:
        cells = with_contours(root, cells, images)
    return sorted(cells, key=lambda cell: cell.image)


def _is_known_other(relative: str) -> bool:
    parts = relative.lower().split("/")
    return parts[-1].endswith(CONTOUR_SUFFIX) or any(p in _LEFTOVERS for p in parts)


def _check_classes(
    folder: str, images: list[ImageFile], classes: Sequence[str], folders: set[str]
) -> None:
    found = {image.class_name for image in images}
    empty = sorted((set(classes) or folders) - found)
    if empty:
        raise ConfigError(
            f"{folder}: no image ({', '.join(IMAGE_SUFFIXES)}) of the class "
            f"{empty[0]}; found images of {sorted(found)}"
        )
    if len(found) < 2:
        raise ConfigError(
            f"{folder}: expected a folder for each of two classes or more, found "
            f"{sorted(found)}"
        )
    if classes and found - set(classes):
        raise ConfigError(
            f"{folder}: holds the class {sorted(found - set(classes))[0]}, expected "
            f"{list(classes)}"
        )


def _splits_of(
    folder: str, names: Iterable[str], classes: Sequence[str]
) -> dict[str, str]:
    """Return the split of each top folder that is one, by how the folders are called.

    Args:
        folder: Named in errors.
        names: Of the images.
        classes: That were asked for, if any were.

    Raises:
        ConfigError: Folders would be taken for classes that seem to be splits, or the
            other way round.
    """
    inner: dict[str, set[str]] = defaultdict(set)  # folders in a top folder
    direct = set()  # top folders with images of their own
    for name in names:
        top, *below = name.split("/")[:-1] or [""]
        if top and below:
            inner[top].add(below[0])
        elif top:
            direct.add(top)
    known = {top: SPLIT_NAMES[top.lower()] for top in _with_split_names(inner)}
    if known:
        mixed = sorted(_with_split_names(direct))
        others = sorted((set(inner) | direct) - set(known) - set(mixed))
        if others:
            raise ConfigError(
                f"{folder}: holds {others[0]} beside {', '.join(sorted(known))}, which "
                f"hold a folder for each class; expected {_LAYOUT}; rename or move it"
            )
        if mixed:
            raise ConfigError(
                f"{folder}: holds images in {mixed[0]} itself, not in folders of "
                f"classes; expected {_LAYOUT}"
            )
        for split in set(known.values()):
            both = sorted(top for top, its in known.items() if its == split)
            if len(both) > 1:
                raise ConfigError(
                    f"{folder}: holds two folders for the split {split}: "
                    f"{', '.join(both)}; expected one"
                )
        return known
    if direct and not inner and len(_with_split_names(direct)) == len(direct):
        raise ConfigError(
            f"{folder}: holds images in {', '.join(sorted(direct))} themselves, whose "
            f"classes are unknown; expected {_LAYOUT}"
        )
    if turned := [top for top in sorted(inner) if _with_split_names(inner[top])]:
        first = turned[0]
        name = sorted(_with_split_names(inner[first]))[0]
        raise ConfigError(
            f"{folder}: holds the split {name} in {first}, expected {name}/{first}: "
            f"{_LAYOUT}"
        )
    for one, other in itertools.permutations(sorted(inner), 2):
        shared = inner[one]
        if len(shared) > 1 and shared <= inner[other] and not classes:
            raise ConfigError(
                f"{folder}: its folders {one} and {other} both hold "
                f"{', '.join(sorted(shared)[:3])}; if {one} and {other} are splits, "
                f"expected the names train, val and test; if they are classes, say so "
                f"by --classes"
            )
    return {}


def _with_split_names(folders: Iterable[str]) -> list[str]:
    return [name for name in folders if name.lower() in SPLIT_NAMES]


def _folders(root: str, splits: Iterable[str]) -> set[str]:
    """Return the names of the class folders, also of those without images."""
    places = [files.join(root, split) for split in splits] or [root]
    return {
        name
        for place in places
        for name in files.list_folder(place)
        if files.is_folder(files.join(place, name))
        and not name.startswith(".")
        and name.lower() not in _LEFTOVERS
    }
