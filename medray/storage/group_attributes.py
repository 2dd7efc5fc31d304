"""What medray writes to the attributes of an OME-Zarr group, and its Merkle root.

A group without a Merkle root is not finalized: shards may be missing or left over.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from medray.errors import FormatError
from medray.storage import files
from medray.storage.digests import Digests, content_digest, merkle_root
from medray.storage.zarr_group import GROUP, open_group

ROOT = "merkle_root"
"""Key in a group's `medray` attributes: what `finalize` found. Absent until then."""
_AREAS = ("area_px", "area_um2")


def before_finalize(uri: str) -> Any:
    """Return a group's metadata without what `finalize` adds; None if damaged."""
    try:
        metadata = json.loads(files.read_bytes(files.join(uri, GROUP)))
        attributes = metadata["attributes"]
        attributes["medray"].pop(ROOT, None)
        for value in attributes["ome"].get("image-label", {}).get("properties", []):
            for key in _AREAS:
                value.pop(key, None)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return metadata


def finalize(
    uri: str, digests: Digests, areas: Sequence[int] | None = None
) -> tuple[Digests, str]:
    """Complete an OME-Zarr: remove unrecorded files, and write its Merkle root.

    Args:
        uri: The OME-Zarr; all its shards are stored.
        digests: Of its shards, by path below `uri`.
        areas: Of a mask, the pixels of each class, for its properties.

    Returns:
        Digests of all its files, and the Merkle root (`merkle_root`), which is written
        to its attributes; the group's own zarr.json, which holds it, is left out.

    Raises:
        StoreError: The place cannot be read or written.
    """
    found = dict(digests)
    for name in files.list_files(uri):
        if name.rpartition("/")[2] == GROUP:
            found[name] = content_digest(files.read_bytes(files.join(uri, name)))
        elif name not in digests:
            files.remove(files.join(uri, name))
    found.pop(GROUP)
    root = merkle_root(found)
    top = files.join(uri, GROUP)
    metadata = files.read_json(top)
    attributes = metadata["attributes"]
    attributes["medray"][ROOT] = root
    if areas is not None:
        mpp = attributes["medray"]["mpp"]
        for value, px in zip(
            attributes["ome"]["image-label"]["properties"], areas, strict=True
        ):
            value[_AREAS[0]] = px
            if mpp:
                value[_AREAS[1]] = round(px * mpp**2, 3)
    data = json.dumps(metadata, indent=2).encode()
    files.write_bytes(top, data)
    found[GROUP] = content_digest(data)
    return found, root


UNREADABLE = "unreadable"
"""Key in a group's attributes: what of a slide could not be read, and so is white."""


def note_unreadable(uri: str, places: Sequence[Sequence[int]]) -> None:
    """Write to an image which parts of its slide could not be read.

    Args:
        uri: The OME-Zarr; creating it again takes the note away.
        places: Rectangles (y, x, height, width) in pixels of level 0.

    Raises:
        StoreError: The place cannot be read or written.
    """
    top = files.join(uri, GROUP)
    metadata = files.read_json(top)
    metadata["attributes"][UNREADABLE] = [list(place) for place in places]
    files.write_bytes(top, json.dumps(metadata, indent=2).encode())


def read_attributes(uri: str) -> Any:
    """Return what was stored under the key `medray`, the Merkle root apart.

    Returns:
        None when nothing is there.
    """
    try:
        stored: Any = open_group(uri).attrs.get("medray")
    except FormatError:
        return None
    if not isinstance(stored, dict):
        return None
    return {key: value for key, value in stored.items() if key != ROOT}


def read_root(uri: str) -> str | None:
    """Return the Merkle root that `finalize` wrote; None when there is none."""
    try:
        stored: Any = open_group(uri).attrs.get("medray")
    except FormatError:
        return None
    return stored.get(ROOT) if isinstance(stored, dict) else None
