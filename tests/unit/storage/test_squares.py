"""Parts of a level past zarr: what zarr reads, to the byte."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from medray.classes import Classes
from medray.errors import FormatError
from medray.geometry import Rectangle
from medray.storage import ome_zarr, squares
from medray.storage.squares import read_part


def write_level(folder: Path, height: int, width: int, *, holes: bool) -> str:
    """An image of regions of 128 px and patches of 32; one region is not written."""
    uri = str(folder / "s.ome.zarr")
    rng = np.random.default_rng(height * width)
    pixels = rng.integers(0, 256, (3, height, width), np.uint8)
    ome_zarr.create_image(
        uri, height, width, mpp=0.5, name="s", attributes={}, region=128, patch=32
    )
    for y in range(0, height, 128):
        for x in range(0, width, 128):
            if holes and (y, x) == (0, 128):
                continue
            region = Rectangle(y, x, min(128, height - y), min(128, width - x))
            block = pixels[:, y : y + 128, x : x + 128]
            if holes and not y and not x:
                block[:, 32:64, :32] = 255  # what is all fill is not stored either
            ome_zarr.write_region(uri, region, block)
    return uri


@pytest.fixture(scope="module")
def levels(tmp_path_factory: pytest.TempPathFactory) -> list[ome_zarr.Pixels]:
    return [
        ome_zarr.open_level(
            write_level(tmp_path_factory.mktemp("level"), height, width, holes=holes)
        )
        for height, width, holes in ((300, 280, False), (290, 333, True))
    ]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_part_is_as_zarr_reads_it(
    levels: list[ome_zarr.Pixels], data: st.DataObject
) -> None:
    level = data.draw(st.sampled_from(levels))
    rows, columns = level.shape[-2:]
    y = data.draw(st.integers(0, rows - 1))
    x = data.draw(st.integers(0, columns - 1))
    height = data.draw(st.integers(1, rows - y))
    width = data.draw(st.integers(1, columns - x))
    found = read_part(level, y, x, height, width)
    np.testing.assert_array_equal(found, level[:, y : y + height, x : x + width])
    assert squares._is_ours(level.array)


def test_labels_have_no_channels(tmp_path: Path) -> None:
    uri = str(tmp_path / "m.ome.zarr")
    ome_zarr.create_labels(
        uri,
        200,
        200,
        mpp=None,
        name="m",
        classes=Classes(),
        attributes={},
        region=128,
        patch=64,
    )
    block = np.random.default_rng(0).integers(0, 3, (72, 128), np.uint8)
    ome_zarr.write_region(uri, Rectangle(128, 0, 72, 128), block)
    found = read_part(ome_zarr.open_level(uri), 100, 50, 90, 140)
    expected = np.zeros((200, 200), np.uint8)
    expected[128:, :128] = block
    np.testing.assert_array_equal(found, expected[100:190, 50:190])


def test_what_others_wrote_is_read_by_zarr(tmp_path: Path) -> None:
    group = zarr.open_group(tmp_path / "o.ome.zarr", mode="w")
    values = np.arange(3 * 40 * 50, dtype=np.uint8).reshape(3, 40, 50)
    array = group.create_array("0", data=values, chunks=(1, 16, 16))
    level = ome_zarr.Pixels(array, "other")
    assert not squares._is_ours(array)
    np.testing.assert_array_equal(read_part(level, 3, 4, 20, 30), values[:, 3:23, 4:34])


def test_what_was_written_anew_is_read_as_it_is_now(tmp_path: Path) -> None:
    uri = write_level(tmp_path, 200, 200, holes=False)
    level = ome_zarr.open_level(uri)
    read_part(level, 0, 0, 128, 128)
    block = np.random.default_rng(9).integers(0, 9, (3, 128, 128), np.uint8)
    ome_zarr.write_region(uri, Rectangle(0, 0, 128, 128), block)
    np.testing.assert_array_equal(read_part(level, 0, 0, 128, 128), block)


@pytest.mark.parametrize("at", [-1, -40, 3])
def test_damage_is_told(tmp_path: Path, at: int) -> None:
    """In the checksum of the index, in the index, in a chunk."""
    uri = write_level(tmp_path, 200, 200, holes=False)
    path = Path(uri) / "0" / "c" / "0" / "0" / "0"
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(FormatError, match="damaged"):
        read_part(ome_zarr.open_level(uri), 0, 0, 128, 128)
    path.write_bytes(data[:50])
    squares._index.cache_clear()
    with pytest.raises(FormatError, match="damaged"):
        read_part(ome_zarr.open_level(uri), 0, 0, 128, 128)
