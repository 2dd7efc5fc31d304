"""What the training loop is fed: parts of steps, read by Ray Data, in order.

A part is a few crops that go through the network together. It travels as one row of
bytes, so that epochs may differ in the size of their crops, and it is looked at where
it lies in Ray's object store.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data

from medray.datasets.dataset import read_dataset
from medray.errors import FormatError
from medray.execution import cluster
from medray.training.recipe import Recipe
from medray.training.sampler import Crops, read_train, read_unlabelled, read_val
from medray.types import Row


class Place(NamedTuple):
    """Which part of a training; the validation batches follow an epoch's last step."""

    epoch: int
    step: int
    micro_batch: int


_VAL_PX = 4 * 512**2  # pixels of validation patches that are predicted at once
_TASK_MICRO_BATCHES = 4  # that a task of Ray Data reads


@dataclass(frozen=True)
class MicroBatch:
    """What lies at a place.

    Attributes:
        crops: With labels.
        unlabelled: (N, 3, S, S) uint8 of slides without annotation, where the recipe
            wants them; else N is 0.
    """

    crops: Crops
    unlabelled: npt.NDArray[np.uint8]


def val_batch(data: str) -> int:
    """Give how many validation patches are predicted at once: 4 of 512 px."""
    return max(1, _VAL_PX // read_dataset(data).patch ** 2)


def read_micro_batches(
    places: Sequence[Place],
    recipe: Recipe,
    data: str,
    steps: int,
    losses: bytes,
    readers: int,
) -> Iterator[MicroBatch]:
    """Read what lies at the places, in their order, some of it ahead.

    Args:
        places: See `Place`.
        recipe: What is read.
        data: Dataset.
        steps: Of an epoch.
        losses: (N,) float64 of the patches that the order follows, see
        medray.training.sampler.
        readers: Processes that read at a time.

    Raises:
        FormatError: The dataset is damaged beyond what is endured.
    """
    blocks = [
        pa.Table.from_pylist([place._asdict() for place in some])
        for some in itertools.batched(places, _TASK_MICRO_BATCHES)
    ]
    # A block is a part: larger ones would have to be taken apart by copying.
    with cluster.streaming(block_bytes=1, in_order=True):
        tables = (
            ray.data.from_arrow(blocks)
            .map_batches(
                _read_places,
                fn_args=(recipe, data, steps, losses),
                batch_size=None,
                num_cpus=0.25,
                compute=ray.data.TaskPoolStrategy(size=readers),
            )
            .iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
        )
        for table in tables:
            for index in range(table.num_rows):
                yield _micro_batch(
                    {key: table[key][index] for key in table.column_names}
                )


def _read_places(
    batch: Row, recipe: Recipe, data: str, steps: int, losses: bytes
) -> Iterator[pa.Table]:
    for values in zip(*(batch[name] for name in Place._fields), strict=True):
        place = Place(*map(int, values))
        yield _read_place(place, recipe, data, steps, losses)


def _read_place(
    place: Place, recipe: Recipe, data: str, steps: int, losses: bytes
) -> pa.Table:
    epoch, step, micro_batch = place
    other = b""
    try:
        if step == steps:
            count = val_batch(data)
            crops = read_val(data, recipe, micro_batch * count, count)
        else:
            first = step * recipe.batch + micro_batch * recipe.crops_per_micro_batch
            crops = read_train(data, recipe, epoch, first, losses)
            if recipe.unlabelled:
                other = read_unlabelled(data, recipe, epoch, first).tobytes()
    except FormatError as error:
        # Raised where the parts are wanted; here Ray would wrap it up.
        return pa.Table.from_pylist([{"failure": f"{error}"}], _SCHEMA)
    row = {
        "failure": "",
        "shape": list(crops.images.shape),
        "images": crops.images.tobytes(),
        "masks": crops.masks.tobytes(),
        "unlabelled": other,
        "patches": crops.patches.tolist(),
        "sizes": crops.sizes.ravel().tolist(),
        "damaged": json.dumps(crops.damaged),
    }
    return pa.Table.from_pylist([row], _SCHEMA)


_SCHEMA = pa.schema(
    {
        "failure": pa.string(),
        "shape": pa.list_(pa.int64()),
        "images": pa.large_binary(),
        "masks": pa.large_binary(),
        "unlabelled": pa.large_binary(),
        "patches": pa.list_(pa.int64()),
        "sizes": pa.list_(pa.int64()),
        "damaged": pa.string(),
    }
)


def _micro_batch(row: dict[str, Any]) -> MicroBatch:
    if failure := row["failure"].as_py():
        raise FormatError(failure)
    shape = row["shape"].as_py()

    def pixels(name: str) -> npt.NDArray[np.uint8]:
        return np.frombuffer(row[name].as_buffer(), np.uint8)

    crops = Crops(
        images=pixels("images").reshape(shape),
        masks=pixels("masks").reshape(shape[0], *shape[2:]),
        patches=np.array(row["patches"].as_py(), np.int64),
        sizes=np.array(row["sizes"].as_py(), np.int64).reshape(-1, 2),
        damaged=json.loads(row["damaged"].as_py()),
    )
    unlabelled = pixels("unlabelled").reshape(-1, *shape[1:])
    return MicroBatch(crops, unlabelled)
