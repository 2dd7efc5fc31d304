"""Images in class folders, as they are found."""

from __future__ import annotations

from collections.abc import Sequence

from medray.datasets.cells import with_contours, without_clusters
from medray.datasets.images import ImageFile
from medray.datasets.splits import SPLITS
from medray.errors import ConfigError
from medray.slides import find_files, fingerprint_of
from medray.storage import files

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")


def find_images(
    folder: str, classes: Sequence[str] = (), *, contours: bool = False
) -> list[ImageFile]:
    """Return the images by their names.

    With `contours` they are cells, as medray.datasets.cells.with_contours has them.

    Raises:
        ConfigError: There are no class folders, or one has no image; there are no
            contours.
    """
    root = files.absolute(folder)
    images = []
    for uri, relative in find_files([root], IMAGE_SUFFIXES):
        parts = relative.split("/")
        split = parts[0] if parts[0] in SPLITS and len(parts) > 2 else ""
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
    found = {image.class_name for image in images}
    empty = sorted((set(classes) or _folders(root)) - found)
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
    cells = without_clusters(images)
    if contours:
        cells = with_contours(root, cells, images)
    return sorted(cells, key=lambda cell: cell.image)


def _folders(root: str) -> set[str]:
    """Return the names of the class folders, also of those without images."""
    top = [n for n in files.list_folder(root) if files.is_folder(files.join(root, n))]
    inner = [files.join(root, name) for name in top if name in SPLITS]
    if not inner:
        return {name for name in top if not name.startswith(".")}
    return {
        name
        for place in inner
        for name in files.list_folder(place)
        if files.is_folder(files.join(place, name)) and not name.startswith(".")
    }
