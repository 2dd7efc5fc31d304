"""OME-Zarr 0.5 (zarr v3, sharded): images and label images with their pyramids.

Layout of a dataset's slide (axes c, y, x) and of a mask (axes y, x):

    SLIDE.ome.zarr/                 MASK.ome.zarr/
      zarr.json   (ome.multiscales)   zarr.json   (ome.multiscales, ome.image-label)
      0/ 1/ 2/ …                      0/ 1/ 2/ …
      labels/annotation/0/ 1/ …

A chunk is a patch, a shard is a region; a shard is always written whole by one task.
Level k+1 has half the pixels of level k in each direction (rounded up), each made of
2 x 2 pixels: the mean of an image, the majority of labels. Image and labels follow the
same rule, so they are registered to the pixel at every level.

Specification: https://ngff.openmicroscopy.org/0.5/

One file, because what creates, writes and reads the shards has to agree on the layout.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from medray.classes import Classes
from medray.errors import FormatError, StoreError
from medray.geometry import Rectangle, plan_regions
from medray.storage import files, object_store
from medray.storage.digests import Digests
from medray.storage.group_attributes import before_finalize, read_attributes
from medray.storage.ngff import RGB, image_metadata, labels_metadata
from medray.storage.pyramid import halved
from medray.storage.zarr_group import (
    GROUP,
    Array,
    array_of,
    count_levels,
    open_group,
    written_digests,
)
from medray.types import UInt8

if TYPE_CHECKING:
    import dask.array as da


PATCH = 512
REGION = 2048

# zstd 1 writes nearly as fast as no compression and keeps masks tiny; no checksum, so
# the same pixels give the same bytes.
_COMPRESSOR = ZstdCodec(level=1, checksum=False)
AT_ONCE = 3
"""Levels that the writer of a region fills at once: in level k a shard is a region's
side / 2^k, so that no two regions share one. Coarser levels, 1/64 of the pixels, have
large shards again and are built when the slide is complete."""


def level_shapes(height: int, width: int) -> list[tuple[int, int]]:
    """Return (height, width) of each level, down to one that fits into a patch."""
    shapes = [(height, width)]
    while max(shapes[-1]) > PATCH:
        h, w = shapes[-1]
        shapes.append((-(-h // 2), -(-w // 2)))
    return shapes


def _create(
    uri: str,
    shapes: list[tuple[int, ...]],
    attributes: dict[str, Any],
    region: int,
    patch: int,
    fill_value: int,
) -> None:
    """Write the metadata of an empty OME-Zarr, or repair it where it is damaged."""
    stored: dict[str, Buffer] = {}
    group = zarr.create_group(MemoryStore(stored), zarr_format=3)
    _create_arrays(group, shapes, region=region, patch=patch, fill_value=fill_value)
    group.attrs.put(attributes)
    wanted = {name: value.to_bytes() for name, value in stored.items()}
    top = wanted.pop(GROUP)
    same = read_attributes(uri) == attributes["medray"]
    if not same:
        files.remove(uri)
    for name, data in wanted.items():
        place = files.join(uri, name)
        if not same or not files.exists(place) or files.read_bytes(place) != data:
            files.write_bytes(place, data)
    if not same or before_finalize(uri) != json.loads(top):
        files.write_bytes(files.join(uri, GROUP), top)


def _create_arrays(
    group: zarr.Group,
    shapes: list[tuple[int, ...]],
    *,
    region: int,
    patch: int,
    fill_value: int,
) -> None:
    for level, shape in enumerate(shapes):
        lead = shape[:-2]
        shard = region >> level if level < AT_ONCE else region
        chunk = next(
            shard // n for n in range(-(-shard // patch), shard) if not shard % n
        )
        group.create_array(
            str(level),
            shape=shape,
            chunks=(*lead, chunk, chunk),
            shards=(*lead, shard, shard),
            dtype="uint8",
            compressors=[_COMPRESSOR],
            serializer=BytesCodec(),
            fill_value=fill_value,
            dimension_names=[*(["c"] if lead else []), "y", "x"],
            overwrite=True,
        )


def create_image(
    uri: str,
    height: int,
    width: int,
    *,
    mpp: float | None,
    name: str,
    attributes: Any,
    channels: Sequence[tuple[str, str]] = RGB,
    fill_value: int = 255,
    region: int = REGION,
    patch: int = PATCH,
) -> None:
    """Create an empty image (channel, y, x).

    The attributes come last: a group that has them has all its arrays.

    Args:
        uri: Folder of the OME-Zarr; kept if it has these attributes, else replaced.
        height: Pixels of level 0.
        width: Pixels of level 0.
        mpp: Microns per pixel of level 0; None when unknown.
        name: Shown by viewers.
        attributes: Stored under the key `medray`.
        channels: Name and #rrggbb of each channel.
        fill_value: What never written pixels read as: white for a slide.
        region: Side of a region, and so of a shard, in pixels; a multiple of `patch`.
        patch: Side of a chunk, in pixels, at most; a multiple of 32.
    """
    shapes = level_shapes(height, width)
    ome = image_metadata(len(shapes), mpp=mpp, name=name, channels=channels)
    cyx: list[tuple[int, ...]] = [(len(channels), *shape) for shape in shapes]
    _create(uri, cyx, {"ome": ome, "medray": attributes}, region, patch, fill_value)


def create_labels(
    uri: str,
    height: int,
    width: int,
    *,
    mpp: float | None,
    name: str,
    classes: Classes,
    attributes: Any,
    source: str | None = None,
    region: int = REGION,
    patch: int = PATCH,
) -> None:
    """Create an empty label image; what is never written is background.

    The attributes come last: a group that has them has all its arrays.

    Args:
        uri: Folder of the OME-Zarr; kept if it has these attributes, else replaced.
        height: Pixels of level 0.
        width: Pixels of level 0.
        mpp: Microns per pixel of level 0; None when unknown.
        name: Shown by viewers.
        classes: Names and colours of the label values.
        attributes: Stored under the key `medray`.
        source: Relative path to the image that is labelled, if it is near.
        region: Side of a region, and so of a shard, in pixels; a multiple of `patch`.
        patch: Side of a chunk, in pixels, at most; a multiple of 32.
    """
    shapes = level_shapes(height, width)
    ome = labels_metadata(
        len(shapes), mpp=mpp, name=name, classes=classes, source=source
    )
    _create(uri, [*shapes], {"ome": ome, "medray": attributes}, region, patch, 0)


def list_labels(uri: str, names: Sequence[str]) -> None:
    """List label images in an OME-Zarr's `labels` group, unless they are listed.

    Vizarr looks for the list at the top of the attributes, the specification under
    `ome`: both are written.
    """
    where = files.join(uri, "labels")
    wanted: Any = {"ome": {"version": "0.5", "labels": [*names]}, "labels": [*names]}
    try:
        if open_group(where).attrs.asdict() == wanted:
            return
    except FormatError:
        pass
    stored: dict[str, Buffer] = {}
    zarr.create_group(MemoryStore(stored), zarr_format=3).attrs.put(wanted)
    files.write_bytes(files.join(where, GROUP), stored[GROUP].to_bytes())


def write_region(uri: str, region: Rectangle, pixels: UInt8) -> Digests:
    """Write one region, which is exactly one shard of each of the first levels.

    Args:
        uri: The OME-Zarr, made by `create_image` or `create_labels`.
        region: Level-0 pixels; starts at a multiple of the shard's side.
        pixels: (height, width) labels or (3, height, width) RGB, uint8.

    Returns:
        Digests of the shards, by path below `uri`; a shard of nothing but the fill
        value is not stored.

    Raises:
        StoreError: The place cannot be written.
    """
    group = open_group(uri, mode="r+")
    with object_store.answered(f"{uri}: {region}", "written"):
        for level in range(min(AT_ONCE, count_levels(group))):
            array = array_of(group, level)
            side = (array.shards or array.chunks)[-1]
            y, x = region.y >> level, region.x >> level
            if y % side or x % side:
                raise ValueError(f"{region} does not start at a multiple of {side}")
            if level:
                pixels = halved(pixels)
            height, width = pixels.shape[-2:]
            array[..., y : y + height, x : x + width] = pixels
        return written_digests(group, uri)


class Pixels:
    """One level of an OME-Zarr: (3, y, x) or (y, x) uint8, read by slicing.

    Slicing raises FormatError where what is stored is damaged, StoreError where it
    cannot be reached.
    """

    def __init__(self, array: Array, uri: str) -> None:
        """Read from a zarr array at an address."""
        self.array, self.uri = array, uri
        self.shape, self.ndim, self.dtype = array.shape, array.ndim, array.dtype
        self.stored = array.shards or array.chunks

    def __getitem__(self, selection: Any) -> UInt8:
        try:
            with object_store.answered(self.uri):
                return np.asarray(self.array[selection], dtype=np.uint8)
        except (StoreError, IndexError):
            raise
        except Exception as error:  # codecs raise exceptions of many kinds
            raise FormatError(
                f"{self.uri}: what is stored is damaged ({type(error).__name__}: "
                f"{error}); `medray verify` finds that in a run, ingest makes a "
                f"slide of a dataset anew once its folder is removed"
            ) from error

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> UInt8:
        """Read all of it."""
        return np.asarray(self[...], dtype=dtype)


def open_level(uri: str, level: int = 0) -> Pixels:
    """Open one level of an OME-Zarr for reading.

    Raises:
        FormatError: There is no such level, or its metadata are damaged.
        StoreError: It cannot be reached.
    """
    group = open_group(uri)
    try:
        with object_store.answered(uri):
            return Pixels(array_of(group, level), f"{uri}/{level}")
    except (StoreError, FormatError):
        raise
    except KeyError as error:
        raise FormatError(f"{uri}: there is no level {level}") from error
    except Exception as error:  # see open_group
        raise FormatError(
            f"{uri}: the metadata of level {level} are damaged "
            f"({type(error).__name__}: {error})"
        ) from error


def build_pyramid(uri: str) -> Digests:
    """Fill the levels that `write_region` leaves, in the memory of four shards.

    Returns:
        Digests of their shards, by path below `uri`.

    Raises:
        StoreError: The place cannot be read or written.
    """
    group = open_group(uri, mode="r+")
    with object_store.answered(uri, "written"):
        for level in range(AT_ONCE, count_levels(group)):
            below, target = open_level(uri, level - 1), array_of(group, level)
            height, width = target.shape[-2:]
            side = (target.shards or target.chunks)[-1]
            for region in plan_regions(height, width, side):
                rows, columns = (
                    slice(2 * part.start, 2 * part.stop) for part in region.slices()
                )
                target[..., *region.slices()] = halved(below[..., rows, columns])
        return written_digests(group, uri)


def open_mask(uri: str, level: int = 0) -> da.Array:
    """Open a mask, or any OME-Zarr of medray, as a dask array.

    Args:
        uri: The OME-Zarr, such as RUN/masks/SLIDE.ome.zarr.
        level: Level of the pyramid; level k has 1/2^k of the pixels per side.

    Returns:
        (y, x) uint8 label values, or (channel, y, x) of an image; read when computed.

    Raises:
        FormatError: There is no such level.

    Examples:
        >>> mask = medray.open_mask("run/masks/slide_000.ome.zarr")
        >>> mask.shape, str(mask.dtype)
        ((768, 640), 'uint8')
        >>> medray.open_mask("run/masks/slide_000.ome.zarr", level=1).shape
        (384, 320)
    """
    # Imported here: it takes half a second, and workers never need it.
    import dask.array as da

    array = open_level(files.absolute(uri), level)
    lazy: da.Array = da.from_array(  # type: ignore[no-untyped-call]
        array, chunks=array.stored
    )
    return lazy
