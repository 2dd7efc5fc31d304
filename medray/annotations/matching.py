"""Which annotation belongs to which slide: one rule for every stage.

An annotation belongs to the slide that one of its names is equal to, the first of these
that any slide has:

    1. the slide's path below the folder that was named, with suffix   a/x.svs.geojson
    2. the same path without it                                        a/x.geojson
    3. the slide's id                                                  a__x.geojson
    4. the slide's file name with suffix, then without, at the top     x.geojson

What belongs to one slide by an earlier name is not free for another by a later one.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from medray.annotations.reading import ANNOTATION_SUFFIXES
from medray.errors import ConfigError
from medray.slides import SlideFile, find_files, strip_suffix

log = logging.getLogger(__name__)


def match_annotations(
    wanted: Sequence[SlideFile], annotations: str | None
) -> dict[str, str]:
    """Return the address of each slide's annotation by the slide's id.

    Args:
        wanted: All slides of the request.
        annotations: Folder, file or address; None: there are none.

    Raises:
        ConfigError: An annotation could be that of several slides, or ANNOTATIONS is
            not there.
    """
    if annotations is None:
        return {}
    names = list_annotations(annotations)
    matched = match_names(wanted, names)
    idle = unused_annotations(wanted, names, matched)
    if idle:
        shown = ", ".join(idle[:5]) + (" ..." if len(idle) > 5 else "")
        log.warning("%d annotations belong to no slide, not used: %s", len(idle), shown)
    bare = [file.slide for file in wanted if file.slide not in matched]
    if bare:
        shown = ", ".join(bare[:5]) + (" ..." if len(bare) > 5 else "")
        log.warning("%d slides have no annotation: %s", len(bare), shown)
    return matched


def unused_annotations(
    wanted: Sequence[SlideFile], names: Iterable[str], matched: Mapping[str, str]
) -> list[str]:
    """Return the addresses of annotations that belong to no slide, or are second ones.

    Args:
        wanted: All slides of the request.
        names: Addresses of all annotations.
        matched: From `match_names`.
    """
    taken = {*matched.values(), *_uris(wanted)}
    return [uri for uri in names if uri not in taken]


def list_annotations(annotations: str) -> dict[str, list[str]]:
    """Return the names of each annotation by its address, for `match_names`."""
    found = find_files([annotations], ANNOTATION_SUFFIXES)
    return {
        uri: [strip_suffix(path, ANNOTATION_SUFFIXES) or path] for uri, path in found
    }


def slide_names(file: SlideFile) -> list[str]:
    """Return the names that an annotation of a slide may have, the closest first.

    The first is the slide's address, by which a dataset knows it; the last two lack the
    folders.
    """
    path = file.path
    stem = strip_suffix(path) or path
    names = [file.uri, path, stem, file.slide]
    names += [name.rpartition("/")[2] for name in (path, stem)]
    return list(map(_normal, names))


def match_names(
    slides: Sequence[SlideFile], names: Mapping[str, Iterable[str]]
) -> dict[str, str]:
    """Return the address of what belongs to each slide by the slide's id.

    Args:
        slides: All slides of the request or run.
        names: Names of each candidate by its address, see `slide_names`. A slide is
            never its own annotation.

    Raises:
        ConfigError: A candidate could belong to several slides.
    """
    uris = _uris(slides)
    by_name: dict[str, list[str]] = {}
    for uri, own in names.items():
        if uri not in uris:
            for name in dict.fromkeys(map(_normal, own)):
                by_name.setdefault(name, []).append(uri)
    wanted = {file: slide_names(file) for file in slides}
    matched: dict[str, str] = {}
    taken: set[str] = set()
    for rank in range(max(map(len, wanted.values()), default=0)):
        claims: dict[str, list[SlideFile]] = {}
        for file, own in wanted.items():
            if file.slide not in matched and rank < len(own):
                claims.setdefault(own[rank], []).append(file)
        for name, files in claims.items():
            free = [uri for uri in by_name.get(name, ()) if uri not in taken]
            if not free:
                continue
            if len(files) > 1:
                raise ConfigError(_collision(free, files))
            matched[files[0].slide] = best = min(free, key=_preference)
            taken.update(free)
            if len(free) > 1:
                rest = ", ".join(uri for uri in free if uri != best)
                log.warning(
                    "several annotations of slide %s: %s is used, not %s",
                    files[0].uri,
                    best,
                    rest,
                )
    return matched


def _collision(found: Sequence[str], files: Sequence[SlideFile]) -> str:
    slides = " and ".join(file.uri for file in files[:2])
    more = f" ({len(files)} slides in all)" if len(files) > 2 else ""
    return (
        f"{found[0]}: could belong to {slides}{more}; expected one slide of that "
        f"name: name it by the slide's path with its suffix below the folder of slides "
        f"(such as {files[0].path}, an annotation {files[0].path}.geojson), or name "
        f"the folder that holds all slides"
    )


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _uris(slides: Iterable[SlideFile]) -> set[str]:
    return {file.uri for file in slides}


def _preference(uri: str) -> tuple[int, str]:
    lower = uri.lower()
    ends = (i for i, s in enumerate(ANNOTATION_SUFFIXES) if lower.endswith(s))
    return next(ends, len(ANNOTATION_SUFFIXES)), uri
