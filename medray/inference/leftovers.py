"""What crashed runs left in a folder, and unrecorded files: `medray gc`."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from medray.inference.run import RunSettings, read_run
from medray.storage import (
    Ledger,
    files,
    group_attributes,
    locked,
)

log = logging.getLogger(__name__)


_PARTIAL = (f"{files.PARTIAL}*", "*.partial")  # medray's, and zarr's


@dataclass(frozen=True)
class Collected:
    """What `collect` removed, or would.

    Attributes:
        out: The run.
        removed: Files and folders, by their path in the run.
        bytes: How much they held.
        dry_run: They are still there.
    """

    out: str
    removed: list[str]
    bytes: int
    dry_run: bool

    def __str__(self) -> str:
        verb = "would remove" if self.dry_run else "removed"
        lines = [f"{verb}  {path}" for path in self.removed]
        size = f"{self.bytes / 2**20:.1f} MiB"
        return "\n".join([*lines, f"{verb} {len(lines)} leftovers, {size}"])


def collect(out: str, *, dry_run: bool = False) -> Collected:
    """Remove what crashed runs left behind, and nothing else.

    That is: files that were being written; masks before cleaning of slides that are
    done; masks, outlines and records of slides of which nothing was committed.

    Args:
        out: Folder of the run.
        dry_run: Remove nothing, only list it.

    Raises:
        ConfigError: There is no run, or another process works there.
        StoreError: The run cannot be written.
    """
    out = files.absolute(out)
    settings = read_run(out)
    with locked(out, "gc"):
        runs = [(out, settings)]
        coarse = files.join(out, "coarse")
        if files.exists(files.join(coarse, "run.yaml")):
            runs.append((coarse, read_run(coarse)))
        found = [uri for run, of in runs for uri in _leftovers(run, of)]
        found += [uri for uri in _partial(out) if not _is_inside(uri, found)]
        size = sum(map(_bytes, found))
        if not dry_run:
            for uri in found:
                files.remove(uri)
    names = sorted(uri[len(out) + 1 :] for uri in found)
    return Collected(out, names, size, dry_run)


def _partial(out: str) -> Iterator[str]:
    """Return the files that were being written."""
    for path in files.list_files(out):
        name = path.rpartition("/")[2]
        if any(fnmatch.fnmatch(name, pattern) for pattern in _PARTIAL):
            yield files.join(out, path)


def _leftovers(out: str, settings: RunSettings) -> Iterator[str]:
    ledger = Ledger(out)
    known = {key.rpartition("@")[0] for key in ledger.regions} | set(ledger.slides)
    done = {s for s, row in ledger.slides.items() if row["status"] == "done"}
    for folder, suffixes, keep in (
        ("raw", (".ome.zarr",), known - done),
        ("masks", (".probabilities.ome.zarr", ".ome.zarr"), known),
        ("outlines", (".geojson",), known),
        ("commits", (".json",), known),
    ):
        for name in files.list_folder(files.join(out, folder)):
            suffix = next((s for s in suffixes if name.endswith(s)), None)
            if suffix is None or name.removesuffix(suffix) in keep:
                continue
            uri = files.join(out, folder, name)
            if not name.endswith(".zarr") or _is_ours(uri, settings):
                yield uri


def _is_ours(uri: str, settings: RunSettings) -> bool:
    """Return whether a group is a mask of this run, or the beginning of one."""
    attributes = group_attributes.read_attributes(uri)
    if attributes:
        return bool(attributes.get("run_digest") == settings.digest())
    names = {path.rpartition("/")[2] for path in files.list_files(uri)}
    return all(
        name == "zarr.json" or any(fnmatch.fnmatch(name, p) for p in _PARTIAL)
        for name in names
    )


def _is_inside(uri: str, folders: Iterable[str]) -> bool:
    return any(uri.startswith(f"{folder}/") for folder in folders)


def _bytes(uri: str) -> int:
    if files.is_folder(uri):
        return sum(files.list_files(uri).values())
    return files.size(uri)
