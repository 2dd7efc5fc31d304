"""OME-Zarr 0.4 (zarr v2): copies for viewers that do not read zarr v3 yet.

Levels and their pixels are those of `medray.storage.ome_zarr`. A chunk is a file, of
one channel, and metadata lie in `.zattrs`.

Specification: https://ngff.openmicroscopy.org/0.4/
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Protocol

import numcodecs
import numpy as np
import numpy.typing as npt
import zarr
from zarr.storage import LocalStore, ObjectStore

from medray.geometry import plan_regions
from medray.storage import files, object_store, ome_zarr
from medray.storage.pyramid import halved

# What readers in every language have.
_COMPRESSOR = numcodecs.Zlib(level=1)


class Readable(Protocol):
    """Pixels that are read in parts: (y, x) labels or a (c, y, x) image, uint8."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    def __getitem__(self, selection: Any) -> npt.NDArray[np.uint8]:
        """Read a part."""


def write(uri: str, pixels: Readable, ome: dict[str, Any], attributes: Any) -> None:
    """Write an image or a label image with its pyramid, in the memory of a few chunks.

    The attributes come last: a group that has them is complete.

    Args:
        uri: Folder to make; what is there is replaced.
        pixels: Of level 0.
        ome: What `ngff.image_metadata` or `labels_metadata` gives.
        attributes: Stored under the key `medray`.

    Raises:
        StoreError: The place cannot be written.
    """
    group = _new_group(uri)
    *lead, height, width = pixels.shape
    with object_store.answered(uri, "written"):
        for level, shape in enumerate(ome_zarr.level_shapes(height, width)):
            array: Any = group.create_array(
                str(level),
                shape=(*lead, *shape),
                chunks=(*[1] * len(lead), ome_zarr.PATCH, ome_zarr.PATCH),
                dtype="uint8",
                compressors=_COMPRESSOR,
                fill_value=0,
                chunk_key_encoding={"name": "v2", "separator": "/"},
            )
            _fill(array, pixels, halve=level > 0)
            pixels = array
        group.attrs.put(_as_04(ome) | {"medray": attributes})


def _fill(array: Any, pixels: Readable, *, halve: bool) -> None:
    factor = 2 if halve else 1
    for part in plan_regions(array.shape[-2], array.shape[-1], 4 * ome_zarr.PATCH):
        rows, columns = (
            slice(factor * one.start, factor * one.stop) for one in part.slices()
        )
        found = np.asarray(pixels[..., rows, columns])
        array[..., *part.slices()] = halved(found) if halve else found


def list_labels(uri: str, names: Sequence[str]) -> None:
    """Make the group of the label images in an image."""
    _new_group(files.join(uri, "labels")).attrs.put({"labels": [*names]})


def _new_group(uri: str) -> zarr.Group:
    files.remove(uri)
    store: Any
    if files.is_local(uri):
        store, path = LocalStore(uri), ""
    else:
        inner, path = object_store.locate(uri)
        store = ObjectStore(inner)
    return zarr.create_group(store, path=path, zarr_format=2)


def _as_04(ome: dict[str, Any]) -> dict[str, Any]:
    """Return 0.5 metadata as 0.4 has them: each part has its version."""
    parts: dict[str, Any] = copy.deepcopy(ome)
    del parts["version"]
    for scales in parts["multiscales"]:
        scales["version"] = "0.4"
    for name in ("omero", "image-label"):
        if name in parts:
            parts[name]["version"] = "0.4"
    return parts
