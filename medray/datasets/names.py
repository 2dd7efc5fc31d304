"""What slides and images may be called in a table, and which one a name means."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from medray.annotations import slide_names
from medray.datasets.images import ImageFile
from medray.slides import SlideFile, strip_suffix

_DEPTH = 6  # folders and file name at the end of an address that are a name of it


@dataclass(frozen=True)
class Names:
    """What a slide or image may be called in a table.

    Attributes:
        uri: Its address.
        ranks: Names, the closest first; of one rank none is closer than another.
    """

    uri: str
    ranks: tuple[tuple[str, ...], ...]


def names_of_slides(slides: Iterable[SlideFile]) -> dict[str, Names]:
    """Return the names of each slide by its id.

    That are its address and its path below the folder that was named; both without
    suffix; its id; and the ends of its address, such as its file name.
    """
    names = {}
    for file in slides:
        uri, path, stem, own = slide_names(file)[:4]
        stems = (strip_suffix(uri) or uri, stem)
        names[file.slide] = Names(uri, ((uri, path), stems, (own,), _ends(uri)))
    return names


def names_of_images(images: Iterable[ImageFile]) -> dict[str, Names]:
    """Return the names of each image by its own, which is its path below the folder."""
    names = {}
    for file in images:
        uri, path = _plain(file.uri), _plain(file.image)
        # An image of several cells is none of them.
        whole = (path,) if file.cut else (uri, path)
        stems = tuple(strip_suffix(name) or name for name in whole)
        ends = _ends(path if file.cut else uri)
        names[file.image] = Names(uri, (whole, stems, ends))
    return names


def _ends(path: str) -> tuple[str, ...]:
    """Return the ends of a path, with and without suffix."""
    parts = path.split("/")
    count = min(len(parts), _DEPTH)
    ends = ["/".join(parts[-i:]) for i in range(1, count + 1)]
    return (*ends, *(stem for end in ends if (stem := strip_suffix(end))))


def _plain(name: str) -> str:
    name = unicodedata.normalize("NFC", name).strip().replace("\\", "/")
    return name.removeprefix("./")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", _plain(name).casefold())


class NameIndex:
    """Finds slides by what a table calls them."""

    def __init__(self, names: Mapping[str, Names]) -> None:
        self._found: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
        for slide, own in names.items():
            for rank, same in enumerate(own.ranks):
                for name in dict.fromkeys(same):
                    self._found[_folded(name)].append((rank, _plain(name), slide))

    def find(self, said: str) -> list[str]:
        """Return the ids of the slides that a name fits best; of one if it is clear.

        A name that no slide has may have another suffix than the file, as of slides
        that were converted.
        """
        name = _plain(said)
        found = self._best(name)
        if not found and (stem := strip_suffix(name)):
            found = self._best(stem)
        return found

    def _best(self, name: str) -> list[str]:
        found = self._found.get(_folded(name), [])
        # In the same case, if there is such.
        found = [one for one in found if one[1] == name] or found
        first = min((rank for rank, _, _ in found), default=0)
        return sorted({slide for rank, _, slide in found if rank == first})
