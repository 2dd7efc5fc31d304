"""A few plain arrays as one zarr v3 group, written whole and read whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from medray.errors import FormatError, StoreError
from medray.storage import files, object_store, zarr_group

Array = npt.NDArray[Any]

_CHUNK = 4096  # rows
_COMPRESSOR = ZstdCodec(level=1, checksum=False)
_TOP = "zarr.json"


def write_arrays(
    uri: str, arrays: Mapping[str, Array], attributes: dict[str, Any]
) -> None:
    """Write arrays; what was there is replaced, and the group's own file is last.

    The same arrays give the same bytes.

    Args:
        uri: Of the group.
        arrays: By name; (rows, columns).
        attributes: Of the group; plain values.

    Raises:
        StoreError: The place cannot be written.
    """
    stored: dict[str, Buffer] = {}
    store = MemoryStore(stored)
    group = zarr.create_group(store, zarr_format=3, attributes=attributes)
    for name, values in arrays.items():
        chunks = (_CHUNK, *values.shape[1:])
        group.create_array(name, data=values, chunks=chunks, compressors=_COMPRESSOR)
    top = stored.pop(_TOP).to_bytes()
    files.remove(uri)
    for name, data in stored.items():
        files.write_bytes(files.join(uri, name), data.to_bytes())
    files.write_bytes(files.join(uri, _TOP), top)


def read_arrays(uri: str) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read what `write_arrays` wrote: the arrays by name, and the attributes.

    Raises:
        FormatError: There is no such group, or it is damaged.
        StoreError: It cannot be reached.
    """
    group = zarr_group.open_group(uri)
    try:
        with object_store.answered(uri):
            arrays = {name: np.asarray(array[...]) for name, array in group.arrays()}
    except StoreError:
        raise
    except Exception as error:  # codecs raise exceptions of many kinds
        raise FormatError(
            f"{uri}: what is stored is damaged ({type(error).__name__}: {error}); "
            f"remove it and its row by running `medray embed` into a new folder"
        ) from error
    return arrays, dict(group.attrs)
