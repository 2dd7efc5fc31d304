"""Checking that a run is what was committed.

No Ray and no torch: threads read and digest files.
"""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from medray.errors import FormatError, StoreError
from medray.inference.run import RunSettings, groups_of, mask_uri, read_run, record_uri
from medray.storage import (
    Digests,
    Ledger,
    content_digest,
    files,
    group_attributes,
    locked,
    merkle_root,
    ome_zarr,
)
from medray.types import Row

log = logging.getLogger(__name__)

_READERS = 16


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    Attributes:
        out: The run.
        verified: How many slides are what was committed.
        files: How many files were read.
        noted: Whether the next `medray infer` will repair what is damaged; not where
            the run cannot be written.
        failed: Of each damaged slide, what is wrong with which files.
    """

    out: str
    verified: int
    files: int
    noted: bool
    failed: dict[str, str]

    def __str__(self) -> str:
        lines = [f"damaged  {slide}: {why}" for slide, why in self.failed.items()]
        if self.failed and self.noted:
            lines.append("run the same `medray infer` again to repair them")
        lines.append(
            f"{self.verified} slides are as they were committed, {len(self.failed)} "
            f"damaged, {self.files} files read"
        )
        return "\n".join(lines)


def verify(out: str) -> Verified:
    """Read every file of a run against the digests recorded when it was committed.

    What is damaged is no longer counted as done, so that `medray infer` makes it again:
    the regions whose shards are damaged, and what follows from them.

    Args:
        out: Folder of the run.

    Raises:
        ConfigError: There is no run, or another process works there.

    Examples:
        >>> from medray.inference import verify
        >>> verified = verify("run")
        >>> verified.verified, verified.failed
        (4, {})
    """
    out = files.absolute(out)
    settings = read_run(out)
    with contextlib.ExitStack() as stack:
        noted = True
        try:
            stack.enter_context(locked(out, "verify"))
        except StoreError as error:
            log.warning("%s; what is found is not noted", error)
            noted = False
        ledger = Ledger(out)
        with ThreadPoolExecutor(_READERS) as readers:
            return _verify(out, settings, ledger, noted, readers)


def _verify(
    out: str,
    settings: RunSettings,
    ledger: Ledger,
    noted: bool,
    readers: ThreadPoolExecutor,
) -> Verified:
    found: dict[str, dict[str, str]] = {}
    count = good = 0
    done = [row for row in ledger.slides.values() if row["status"] == "done"]
    for row in done:
        slide = row["slide"]
        problems, record = _check_record(out, row)
        recorded: Digests = record["files"] if record else {}
        count += len(recorded)
        problems |= _check_files(out, recorded, readers)
        problems |= _unrecorded(out, settings, slide, recorded) if record else {}
        if not problems:
            good += 1
            continue
        found[slide] = problems
        kept = _kept_regions(record, problems) if record else {}
        ledger.reopen(slide, row["digest"], kept)
    for key, regions in [*ledger.regions.items()]:
        slide, _, digest = key.rpartition("@")
        if slide in found:
            continue
        recorded = {k: v for r in regions.values() for k, v in r["files"].items()}
        count += len(recorded)
        if problems := _check_files(out, recorded, readers):
            found[slide] = problems
            kept = _kept_regions({"regions": regions, "files": recorded}, problems)
            ledger.reopen(slide, digest, kept)
    if found and noted:
        ledger.flush()
    words = {slide: _as_text(problems) for slide, problems in found.items()}
    return Verified(out, good, count, noted, words)


def _check_record(out: str, row: Row) -> tuple[dict[str, str], Any]:
    """Check the record of a finished slide against its row and its mask's root."""
    uri, name = record_uri(out, row["slide"]), f"commits/{row['slide']}.json"
    try:
        record = files.read_json(uri)
        start = f"masks/{row['slide']}.ome.zarr/"
        inside = {
            path[len(start) :]: digest
            for path, digest in record["files"].items()
            if path.startswith(start) and path != f"{start}zarr.json"
        }
        root = merkle_root(inside)
        regions = {int(index): one for index, one in record["regions"].items()}
    except FileNotFoundError:
        return {name: "missing"}, None
    except (FormatError, KeyError, TypeError, ValueError, AttributeError):
        return {name: "damaged"}, None
    if root != row["merkle_root"]:
        return {name: "its digests are not those of slides.parquet"}, None
    if group_attributes.read_root(mask_uri(out, row["slide"])) != root:
        return {f"{start}zarr.json": "holds another Merkle root"}, None
    return {}, record | {"regions": regions}


def _check_files(
    out: str, recorded: Digests, readers: ThreadPoolExecutor
) -> dict[str, str]:
    def look(path: str) -> str:
        try:
            data = files.read_bytes(files.join(out, path))
        except FileNotFoundError:
            return "missing"
        except StoreError as error:
            return f"{error}"
        same = content_digest(data) == recorded[path]
        return "" if same else "damaged"

    problems = zip(recorded, readers.map(look, recorded), strict=True)
    return {path: problem for path, problem in problems if problem}


def _unrecorded(
    out: str, settings: RunSettings, slide: str, recorded: Digests
) -> dict[str, str]:
    """Find the files of a mask that are not recorded: they may pass for shards."""
    return {
        path: "not recorded"
        for group in groups_of(settings, out, slide)
        for name in files.list_files(group)
        if (path := f"{group[len(out) + 1 :]}/{name}") not in recorded
    }


def _kept_regions(record: Row, problems: dict[str, str]) -> dict[int, Row]:
    """Return the regions that need not be computed again.

    Coarser levels, outlines and metadata are made again when the slide is finished; a
    shard of the finer levels that no region wrote is one of a cleaned mask, which is
    made of all of them.
    """
    regions: dict[int, Row] = record["regions"]
    written = {path for region in regions.values() for path in region["files"]}
    for path, problem in problems.items():
        level = path.split("/c/")[0].rpartition("/")[2]
        fine = "/c/" in path and int(level) < ome_zarr.AT_ONCE
        if fine and path not in written and problem != "not recorded":
            return {}
    return {
        index: region
        for index, region in regions.items()
        if not any(path in problems for path in region["files"])
    }


def _as_text(problems: dict[str, str]) -> str:
    shown = [f"{path}: {problem}" for path, problem in sorted(problems.items())]
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return "; ".join(shown[:20]) + more
