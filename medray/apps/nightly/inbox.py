"""The plan of a night for what is new in an inbox; without Ray.

A file is new by its bytes, not by its name: files whose size and time are not those of
the last night are digested, and the catalog says whether their content is known. What
the user says of a slide (--mpp, --scene, --plane) is part of its content.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field

from medray.apps.nightly.catalog import Catalog, Found, current, quality_of
from medray.datasets import with_overrides
from medray.errors import ConfigError, MedrayError, SlideError
from medray.inference import Options
from medray.slides import (
    QualityLimits,
    SlideFile,
    as_slides,
    find_slide_files,
    judge,
    slide_digest,
    slide_fingerprint,
)
from medray.storage import files, storable
from medray.types import Row

log = logging.getLogger(__name__)

_READERS = 8  # each may hold 64 MiB


@dataclass(frozen=True, kw_only=True)
class Watch:
    """How an inbox is watched.

    Attributes:
        inbox: Folder or address that slides arrive in.
        out: Where all nights are; not inside the inbox.
        models: Folders of the models.
        truth: Dataset, or folder of annotations named like the slides; None: none.
        reference: Dataset that the model was trained on; None: not given.
        settle: Seconds in which a file must not change to count as complete.
        tries: After so many nights a slide that fails is given up.
        options: How slides are predicted.
        limits: Of slide quality control; None: there is none.
    """

    inbox: str
    out: str
    models: tuple[str, ...]
    truth: str | None = None
    reference: str | None = None
    settle: float = 60.0
    tries: int = 3
    options: Options = field(default_factory=Options)
    limits: QualityLimits | None = None

    def __post_init__(self) -> None:
        """Check the ranges, and that nights do not feed on their own masks."""
        if self.tries < 1:
            raise ConfigError(f"tries must be 1 or more, found {self.tries}")
        if not self.settle >= 0:
            raise ConfigError(f"settle must be 0 or more seconds, found {self.settle}")
        if f"{self.out}/".startswith(f"{self.inbox}/"):
            raise ConfigError(
                f"{self.out}: lies inside the inbox {self.inbox}, so masks would be "
                f"taken for slides; choose another --out"
            )


def plan_night(watch: Watch, catalog: Catalog, night: str) -> Row:
    """Plan what a night does.

    Takes the watch's `settle` seconds if anything is new.

    Args:
        watch: How the inbox is watched.
        catalog: What is known.
        night: Its date.

    Returns:
        The plan, as it is written as night.json: `files` that are new or touched and
        what they hold (see `Found`), `slides` to be done, which of them are `retried`,
        `copies` of known contents, names that were `replaced`, and why files were
        `left_out`.

    Raises:
        ConfigError: There is no such inbox.
        StoreError: It does not answer.
    """
    known = current(catalog)
    there = _look(watch.inbox)
    left_out = {
        storable(name): "its name is no Unicode; rename it"
        for name in there
        if name != storable(name)
    }
    there = {name: of for name, of in there.items() if name == storable(name)}
    there = _with_overrides(there, watch.options)
    fresh = {
        name: (slide, fingerprint)
        for name, (slide, fingerprint) in there.items()
        if not fingerprint
        or name not in known
        or known[name].fingerprint != fingerprint
        or not _is_said(known[name].digest, slide)
    }
    if fresh:
        log.info(
            "%d of %d files are new or touched; looking again in %.0f s",
            len(fresh),
            len(there),
            watch.settle,
        )
        time.sleep(watch.settle)
    settled: dict[str, SlideFile] = {}
    for name, (slide, fingerprint) in fresh.items():
        later, why = _fingerprint(slide.uri)
        if fingerprint and later == fingerprint:
            settled[name] = slide
        else:
            left_out[name] = why or "still being written, or cannot be looked at"
    found, unread = _digested(
        settled, {n: fingerprint for n, (_, fingerprint) in fresh.items()}
    )
    left_out |= unread
    new, copies = _sorted_out(catalog, found)
    now = {name: known[name].digest for name in there if name in known}
    now |= {file.name: file.digest for file in found}
    now = {name: digest for name, digest in now.items() if name not in left_out}
    retried = _to_retry(catalog, now, watch)
    return {
        "night": night,
        "files": [asdict(file) for file in found],
        "slides": [
            {"file": name, "digest": digest} | asdict(there[name][0])
            for name, digest in sorted((new | retried).items())
        ],
        "retried": sorted(retried),
        "copies": copies,
        "replaced": [
            {"name": file.name, "before": known[file.name].digest, "now": file.digest}
            for file in found
            if file.name in known and known[file.name].digest != file.digest
        ],
        "left_out": left_out,
        "in_inbox": len(there),
    }


def _look(inbox: str) -> dict[str, tuple[SlideFile, str]]:
    """Return the slides of the inbox and their fingerprints, by path below it."""
    if files.is_local(inbox) and not files.is_folder(inbox):
        raise ConfigError(f"{inbox}: expected a folder, the inbox; make it or name it")
    found = find_slide_files([inbox])
    with ThreadPoolExecutor(_READERS) as readers:
        slides = as_slides(found)
        fingerprints = readers.map(_fingerprint, [slide.uri for slide in slides])
        return {
            # A DICOM series may be the inbox's own.
            slide.uri[len(inbox) :].strip("/") or ".": (slide, fingerprint)
            for slide, (fingerprint, _) in zip(slides, fingerprints, strict=True)
        }


def _with_overrides(
    there: dict[str, tuple[SlideFile, str]], options: Options
) -> dict[str, tuple[SlideFile, str]]:
    """Add what the user says of the slides."""
    said = with_overrides(
        [slide for slide, _ in there.values()],
        mpp=options.mpp,
        scene=options.scene,
        plane=options.plane,
    )
    return {
        name: (slide, fingerprint)
        for (name, (_, fingerprint)), slide in zip(there.items(), said, strict=True)
    }


def _is_said(digest: str, slide: SlideFile) -> bool:
    """Return whether a content was known with what the user says of the slide now."""
    content, _, _ = digest.partition("+")
    return digest == content + slide.given


def _fingerprint(uri: str) -> tuple[str, str]:
    """Return size and time of a slide, of an OME-Zarr also how much is there.

    Returns:
        Empty, and why, if not all of its files are there.
    """
    try:
        fingerprint = slide_fingerprint(uri)
        if uri.endswith(".zarr"):
            sizes = files.list_files(uri).values()
            fingerprint += f" {len(sizes)} {sum(sizes)}"
        return fingerprint, ""
    except SlideError as error:
        return "", f"{error}"
    except (MedrayError, OSError):
        return "", ""


def _digest(slide: SlideFile) -> tuple[str, str]:
    """Return the digest, or why there is none."""
    try:
        return slide_digest(slide.uri) + slide.given, ""
    except (MedrayError, OSError) as error:
        return "", f"{error}"


def _digested(
    settled: dict[str, SlideFile], fingerprints: dict[str, str]
) -> tuple[list[Found], dict[str, str]]:
    """Return the digests of files, and why some could not be read."""
    found, unread = [], {}
    with ThreadPoolExecutor(_READERS) as readers:
        digests = readers.map(_digest, settled.values())
        for name, (digest, why) in zip(settled, digests, strict=True):
            if digest:
                found.append(Found(name, fingerprints[name], digest))
            else:
                unread[name] = why
    return found, unread


def _sorted_out(
    catalog: Catalog, found: Iterable[Found]
) -> tuple[dict[str, str], list[Row]]:
    """Return new contents (digest by name), and files that copy known ones."""
    new: dict[str, str] = {}
    name_of = {digest: row["names"][0] for digest, row in catalog.items()}
    copies = []
    for file in found:
        if file.digest not in name_of:
            name_of[file.digest] = file.name
            new[file.name] = file.digest
        elif file.name not in catalog.get(file.digest, {"names": ()})["names"]:
            copies.append({"name": file.name, "same_as": name_of[file.digest]})
    return new, copies


def _to_retry(catalog: Catalog, now: dict[str, str], watch: Watch) -> dict[str, str]:
    """Return the contents (digest by name) that were not done before and are there.

    What was quarantined is tried when today's limits let its values pass.
    """
    retried: dict[str, str] = {}
    for name, digest in now.items():
        row = catalog.get(digest)
        if row is None or row["status"] == "done" or len(row["tried"]) >= watch.tries:
            continue
        if (
            row["status"] == "quarantined"
            and watch.limits
            and judge(quality_of(row), watch.limits).quarantined
        ):
            continue
        if digest not in retried.values():
            retried[name] = digest
    return retried
