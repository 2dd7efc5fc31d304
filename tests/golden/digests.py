"""Digests of what medray writes: what a person sees of it, and no bookkeeping.

A digest changes with a pixel, a coordinate, a class's name or colour, a score, a
weight; it does not change with dates, hosts, timings, versions, places, the provenance
that medray adds for itself, or the order of rows that has no meaning. So code may be
renamed and moved under its protection. Nothing of medray is imported here: its readers
are part of what is checked.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import tifffile
import zarr
from PIL import Image
from safetensors import safe_open

BOOKKEEPING = frozenset(
    {
        # when and how fast
        *("date", "seconds", "crops_per_second", "patches_per_second", "waiting"),
        # where
        *("uri", "truth", "run", "data", "out", "report"),
        # of what: medray's own settings, digests of files that hold them
        *("provenance", "made_from", "merkle_root", "fingerprint", "stamp", "inputs"),
        # in words: what tables of the request matched
        "notes",
        # which of the slides the model had seen, and the scores without them
        *("seen_slides", "unseen"),
    }
)
"""Keys and columns that say how a thing came about, not what it is."""

_TIMED = ("_s", "_at", "_bytes", "_digest", "seconds")
_FOLDERS = re.compile(r"(?<![\w:/])/(?:[^\s/:;,'\"()]+/)+")
_SHOWN = ("ome", "labels", "multiscales", "omero", "image-label")
"""Attributes of a group that viewers read; `medray` is provenance."""


def digest(*parts: Any) -> str:
    """Name values (of JSON) and bytes by 16 hexadecimal digits."""
    whole = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part if isinstance(part, bytes) else canonical(part).encode()
        whole.update(f"{len(data)} ".encode() + data)
    return whole.hexdigest()


def canonical(value: Any) -> str:
    """Write a value as JSON without bookkeeping, equal for equal meanings.

    Floats keep 9 significant digits: the sum of the same numbers in another order, as
    another number of workers adds them, is the same score.
    """
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item)
            for key, item in value.items()
            if key not in BOOKKEEPING and not str(key).endswith(_TIMED)
        }
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    if isinstance(value, np.integer):
        return int(value)
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def digest_array(pixels: npt.NDArray[Any]) -> str:
    """Digest an array: shape, type and values."""
    return digest([list(pixels.shape), str(pixels.dtype)], pixels.tobytes())


def digest_zarr(folder: Path) -> str:
    """Digest a zarr hierarchy (v2 or v3): arrays, their layout, what viewers read."""
    group = zarr.open_group(folder, mode="r")
    found: dict[str, Any] = {"": _shown(group)}
    for path, member in sorted(group.members(max_depth=None)):
        if isinstance(member, zarr.Group):
            found[path] = _shown(member)
            continue
        layout = [list(member.chunks), list(member.shards or ())]
        found[path] = [layout, digest_array(np.asarray(member[...]))]
    return digest(found)


def _shown(group: zarr.Group) -> Any:
    """Return a group's attributes for viewers, without who computed its levels."""
    shown = {key: group.attrs[key] for key in _SHOWN if key in group.attrs}
    return json.loads(
        json.dumps(shown),
        object_hook=lambda one: {k: v for k, v in one.items() if k != "metadata"},
    )


def digest_table(path: Path) -> str:
    """Digest the rows of a parquet table; their order says nothing."""
    return digest_rows(pq.read_table(path).to_pylist())


def digest_csv(path: Path) -> str:
    """Digest the rows of a CSV file, whose numbers are taken as such."""
    rows = csv.DictReader(io.StringIO(path.read_text()))
    return digest_rows({k: _number(v) for k, v in row.items()} for row in rows)


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def digest_rows(rows: Iterable[Mapping[str, Any]]) -> str:
    """Digest rows in any order."""
    return digest(sorted(canonical(row) for row in rows))


def digest_json(path: Path) -> str:
    """Digest a JSON file; metrics and the like."""
    return digest(json.loads(path.read_text()))


def digest_weights(path: Path) -> str:
    """Digest a safetensors file, tensor by tensor."""
    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return digest({name: digest_array(tensor) for name, tensor in tensors.items()})


def digest_outlines(path: Path) -> str:
    """Digest the geometries and properties of a GeoJSON file, in any order."""
    features = json.loads(path.read_text())["features"]
    return digest_rows(
        {k: one[k] for k in ("geometry", "properties")} for one in features
    )


def digest_tiff(path: Path) -> str:
    """Digest the pages of a TIFF: levels, tiles, resolution, description and pixels."""
    with tifffile.TiffFile(path) as tiff:
        pages = [level for series in tiff.series for level in series.levels]
        found = [
            [
                list(level.keyframe.tile or ()),
                level.keyframe.get_resolution(),
                digest_array(level.asarray()),
            ]
            for level in pages
        ]
        return digest(found, _without_ids(tiff.pages.first.description))


def _without_ids(description: str) -> str:
    return re.sub(r'(urn:uuid:|UUID=")[0-9a-f-]+', r"\1", description)


def digest_picture(path: Path) -> str:
    """Digest the pixels of a PNG or JPEG."""
    return digest_array(np.asarray(Image.open(path)))


_KINDS = {
    ".parquet": digest_table,
    ".csv": digest_csv,
    ".json": digest_json,
    ".safetensors": digest_weights,
    ".geojson": digest_outlines,
    ".tif": digest_tiff,
    ".tiff": digest_tiff,
    ".png": digest_picture,
    ".jpg": digest_picture,
    ".zarr": digest_zarr,
}


def digest_files(folder: Path, pattern: str) -> str:
    """Digest all files of a folder that a pattern names, with their names.

    Raises:
        FileNotFoundError: There is none; an empty set must not look like equal ones.
    """
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(f"{folder.name}: expected files like {pattern}")
    return digest({str(p.relative_to(folder)): _KINDS[p.suffix](p) for p in paths})
