"""What slides and images may be called in a table, and which one a name means."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from medray.annotations import slide_names
from medray.datasets.images import ImageFile
from medray.slides import SlideFile, strip_suffix


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

    That are its address and its path below the folder that was named; the path without
    suffix; its id; and the ends of its path, such as its file name.
    """
    names = {}
    for file in slides:
        uri, path, stem, own = slide_names(file)[:4]
        ends = (*_ends(path), *_ends(stem), *_ends("/".join(uri.split("/")[-2:])))
        names[file.slide] = Names(uri, ((uri, path), (stem,), (own,), ends))
    return names


def names_of_images(images: Iterable[ImageFile]) -> dict[str, Names]:
    """Return the names of each image by its own, which is its path below the folder."""
    names = {}
    for file in images:
        path = _plain(file.image)
        stem = strip_suffix(path) or path
        # An image of several cells is none of them.
        whole = (path,) if file.cut else (_plain(file.uri), path)
        ends = (*_ends(path), *_ends(stem))
        names[file.image] = Names(_plain(file.uri), (whole, (stem,), ends))
    return names


def _ends(path: str) -> list[str]:
    """Return the ends of a path below its first folder, with and without suffix."""
    parts = path.split("/")
    ends = ["/".join(parts[i:]) for i in range(1, len(parts))]
    return ends + [stem for end in ends if (stem := strip_suffix(end))]


def _plain(name: str) -> str:
    name = unicodedata.normalize("NFC", name).strip().replace("\\", "/")
    return name.removeprefix("./")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", _plain(name).casefold())


class NameIndex:
    """Finds slides by what a table calls them."""

    def __init__(self, names: Mapping[str, Names]) -> None:
        self._names = names
        self._found: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
        for slide, own in names.items():
            for rank, same in enumerate(own.ranks):
                for name in dict.fromkeys(same):
                    self._found[_folded(name)].append((rank, _plain(name), slide))

    def find(self, said: str) -> list[str]:
        """Return the ids of the slides that a name fits best; of one if it is clear.

        A name that no slide has may have more folders before it, or another suffix
        than the file, as of slides that were converted.
        """
        name = _plain(said)
        found = self._best(name) or self._below(name)
        if not found and (stem := strip_suffix(name)):
            found = self._best(stem)
        return found

    def _best(self, name: str) -> list[str]:
        found = self._found.get(_folded(name), [])
        # In the same case, if there is such.
        found = [one for one in found if one[1] == name] or found
        first = min((rank for rank, _, _ in found), default=0)
        return sorted({slide for rank, _, slide in found if rank == first})

    def _below(self, name: str) -> list[str]:
        parts = name.split("/")
        found = set()
        for i in range(1, len(parts)):
            end = _folded("/".join(parts[i:]))
            for rank, _, slide in self._found.get(end, ()):
                uri = self._names[slide].uri
                whole = {_folded(uri), _folded(strip_suffix(uri) or uri)}
                wanted = "/" + _folded(name).lstrip("/")
                if rank < 2 and any(f"/{one}".endswith(wanted) for one in whole):
                    found.add(slide)
        return sorted(found)
