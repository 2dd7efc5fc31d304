"""Parts of a level as training reads them: small, at random, thousands a second.

zarr's way through its event loop and codec pipeline takes milliseconds for a chunk of
any size. Here the index of a shard is read once and kept, and a part is some ranges of
bytes of a file: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import numpy.typing as npt
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec, ZstdCodec

from medray.errors import StoreError
from medray.storage import files
from medray.storage.ome_zarr import Pixels
from medray.types import UInt8

_NONE = 2**64 - 1  # an offset in an index: the chunk is not stored


def read_part(pixels: Pixels, y: int, x: int, height: int, width: int) -> UInt8:
    """Read a part of a level that does not change any more.

    Args:
        pixels: The level; from another writer than medray it is read by zarr.
        y: First row; the part lies within the level.
        x: First column.
        height: In pixels.
        width: In pixels.

    Returns:
        (3, height, width) or (height, width) uint8.

    Raises:
        FormatError: What is stored is damaged.
        StoreError: It cannot be reached.
    """
    shards = pixels.array.shards
    if shards is None or not _is_ours(pixels.array):
        return pixels[..., y : y + height, x : x + width]
    side, chunk = shards[-1], pixels.array.chunks[-1]
    lead = pixels.shape[:-2]
    part = np.full((*lead, height, width), pixels.array.fill_value, np.uint8)
    try:
        _fill(part, pixels.uri, y, x, side, chunk)
    except StoreError:
        raise
    except Exception:  # codecs raise exceptions of many kinds
        # Rewritten since its index was read, or damaged: zarr reads it, or says so.
        _index.cache_clear()
        return pixels[..., y : y + height, x : x + width]
    return part


def _fill(part: UInt8, level: str, y: int, x: int, side: int, chunk: int) -> None:
    """Copy what is stored of the part of a level that begins at (y, x)."""
    *lead, height, width = part.shape
    for row, column in _cells(y, x, y + height, x + width, side):
        shard = "/".join([level, "c", *["0"] * len(lead), str(row), str(column)])
        index = _index(shard, side // chunk)
        if index is None:
            continue
        top, left = row * side, column * side
        within = max(y, top), max(x, left)
        until = min(y + height, top + side), min(x + width, left + side)
        cells = [
            (r, c, *index[r - top // chunk, c - left // chunk].tolist())
            for r, c in _cells(*within, *until, chunk)
        ]
        cells = [cell for cell in cells if cell[2] != _NONE]
        starts, lengths = [cell[2] for cell in cells], [cell[3] for cell in cells]
        found = files.read_ranges(shard, starts, lengths) if cells else []
        for (r, c, *_), data in zip(cells, found, strict=True):
            values = np.frombuffer(numcodecs.zstd.decompress(data), np.uint8)
            values = values.reshape(*lead, chunk, chunk)
            _put(part, values, r * chunk - y, c * chunk - x)


def _is_ours(array: Any) -> bool:
    """Return whether shards are laid out as `ome_zarr` writes them."""
    codecs = array.metadata.codecs
    if len(codecs) != 1 or not isinstance(codecs[0], ShardingCodec):
        return False
    how = codecs[0]
    return (
        array.chunks[:-2] == array.shape[:-2]
        and array.chunks[-1] == array.chunks[-2]
        and array.shards[-1] == array.shards[-2]
        and [type(codec) for codec in how.codecs] == [BytesCodec, ZstdCodec]
        and [type(codec) for codec in how.index_codecs] == [BytesCodec, Crc32cCodec]
        and how.index_location == "end"
    )


def _cells(
    top: int, left: int, bottom: int, right: int, side: int
) -> Iterator[tuple[int, int]]:
    """List the cells (row, column) of a grid that a rectangle touches."""
    for row in range(top // side, -(-bottom // side)):
        for column in range(left // side, -(-right // side)):
            yield row, column


@functools.lru_cache(maxsize=4096)
def _index(uri: str, across: int) -> npt.NDArray[np.uint64] | None:
    """Read where the chunks of a shard lie: (rows, columns, 2) offset and length.

    None: the shard is not stored, so all of it has the fill value.
    """
    length = across * across * 16 + 4
    try:
        stored = files.size(uri)
    except FileNotFoundError:
        return None
    if stored < length:
        raise ValueError(f"{uri} has {stored} bytes, its index alone {length}")
    (data,) = files.read_ranges(uri, [stored - length], [length])
    values, checksum = data[:-4], int.from_bytes(data[-4:], "little")
    if google_crc32c.value(values) != checksum:
        raise ValueError(f"the index of {uri} has another checksum than it says")
    return np.frombuffer(values, "<u8").reshape(across, across, 2)


def _put(part: UInt8, chunk: UInt8, y: int, x: int) -> None:
    """Copy what a chunk has of a part; (y, x) is its corner, seen from the part's."""
    height, width = part.shape[-2:]
    side = chunk.shape[-1]
    top, left = max(0, y), max(0, x)
    bottom, right = min(height, y + side), min(width, x + side)
    part[..., top:bottom, left:right] = chunk[
        ..., top - y : bottom - y, left - x : right - x
    ]
