"""Which annotation belongs to which slide."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from medray.annotations import ANNOTATION_SUFFIXES
from medray.slides.listing import SlideFile, find_files, slide_id

log = logging.getLogger(__name__)


def match_annotations(
    wanted: Sequence[SlideFile], annotations: str | None
) -> dict[str, str]:
    """Find the annotation of each slide: the same path below its folder, or name."""
    if annotations is None:
        return {}
    by_name: dict[str, list[str]] = {}
    for uri, relative in find_files([annotations], ANNOTATION_SUFFIXES):
        by_name.setdefault(slide_id(relative, ANNOTATION_SUFFIXES), []).append(uri)
    matched = {}
    for file in wanted:
        name = file.name if file.name in by_name else file.name.rpartition("__")[2]
        if name in by_name:
            best = min(by_name[name], key=_preference)
            matched[file.slide] = best
    used = set(matched.values())
    for name, uris in by_name.items():
        if used.isdisjoint(uris):
            log.warning(
                "annotation %s has no slide named %s; it is not used", uris, name
            )
    bare = [file.slide for file in wanted if file.slide not in matched]
    if bare:
        shown = ", ".join(bare[:5]) + (" ..." if len(bare) > 5 else "")
        log.warning("%d slides have no annotation: %s", len(bare), shown)
    return matched


def _preference(uri: str) -> int:
    lower = uri.lower()
    return next(i for i, s in enumerate(ANNOTATION_SUFFIXES) if lower.endswith(s))
