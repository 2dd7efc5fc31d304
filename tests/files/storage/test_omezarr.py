from pathlib import Path

import dask.array as da
import numpy as np
import ome_zarr_models
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import medray
from medray.classes import Classes
from medray.errors import FormatError
from medray.geometry import Rectangle, plan_regions
from medray.storage import group_attributes, ome_zarr
from medray.storage.pyramid import halved


def write_pair(folder: Path, height: int, width: int) -> tuple[str, str]:
    """An image whose labels are 1 exactly where it is black."""
    uri = str(folder / "x.ome.zarr")
    rng = np.random.default_rng(0)
    coarse = rng.random((height // 64 + 1, width // 64 + 1)) < 0.4
    labels = coarse.repeat(64, 0).repeat(64, 1)[:height, :width].astype(np.uint8)
    ome_zarr.create_image(uri, height, width, mpp=0.25, name="x", attributes={})
    ome_zarr.list_labels(uri, ["annotation"])
    where = f"{uri}/labels/annotation"
    ome_zarr.create_labels(
        where,
        height,
        width,
        mpp=0.25,
        name="annotation",
        classes=Classes(),
        attributes={},
        source="../../",
    )
    for region in plan_regions(height, width, ome_zarr.REGION):
        part = labels[region.slices()]
        ome_zarr.write_region(where, region, part)
        ome_zarr.write_region(uri, region, np.stack([(1 - part) * 255] * 3))
    ome_zarr.build_pyramid(uri)
    ome_zarr.build_pyramid(where)
    return uri, where


@pytest.mark.parametrize("size", [(2049, 700), (100, 37), (4100, 2500)])
def test_image_and_labels_are_registered_at_every_level(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    image, labels = write_pair(tmp_path, *size)
    group = zarr.open_group(labels, mode="r")
    levels = len(list(group.array_keys()))
    assert levels == len(ome_zarr.level_shapes(*size))
    for level in range(levels):
        pixels = np.asarray(ome_zarr.open_level(image, level)[0])
        mask = np.asarray(ome_zarr.open_level(labels, level)[:])
        assert pixels.shape == mask.shape
        # Mean of 2x2 and majority of 2x2 (ties to the foreground) agree wherever the
        # mean is not exactly half.
        decided = np.abs(pixels.astype(int) - 127) > 1 + level
        np.testing.assert_array_equal(pixels[decided] < 127, mask[decided] == 1)
        assert decided.mean() > 0.8
    ours, theirs = (
        zarr.open_group(uri, mode="r").attrs["ome"] for uri in (image, labels)
    )
    for one, other in zip(
        ours["multiscales"][0]["datasets"],
        theirs["multiscales"][0]["datasets"],
        strict=True,
    ):
        for mine, yours in zip(
            one["coordinateTransformations"],
            other["coordinateTransformations"],
            strict=True,
        ):
            assert mine[mine["type"]][1:] == yours[yours["type"]]


def test_it_is_valid_ome_zarr(tmp_path: Path) -> None:
    image, labels = write_pair(tmp_path, 600, 700)
    opened = ome_zarr_models.open_ome_zarr(zarr.open_group(image, mode="r"))
    assert type(opened).__name__ == "Image"
    assert opened.labels is not None
    opened = ome_zarr_models.open_ome_zarr(zarr.open_group(labels, mode="r"))
    assert type(opened).__name__ == "ImageLabel"


def test_ome_zarr_py_reads_image_and_labels(tmp_path: Path) -> None:
    from ome_zarr.io import parse_url
    from ome_zarr.reader import Reader

    image, _ = write_pair(tmp_path, 600, 700)
    nodes = list(Reader(parse_url(image))())
    assert nodes[0].data[0].shape == (3, 600, 700)
    shapes = [node.data[0].shape for node in nodes[1:] if node.data]
    assert (600, 700) in shapes


def test_a_mask_opens_as_a_dask_array(tmp_path: Path) -> None:
    _, labels = write_pair(tmp_path, 600, 700)
    mask = medray.open_mask(labels)
    assert isinstance(mask, da.Array)
    np.testing.assert_array_equal(mask.compute(), ome_zarr.open_level(labels)[:])
    assert medray.open_mask(labels, level=1).shape == (300, 350)
    with pytest.raises(FormatError, match="no level 9"):
        medray.open_mask(labels, level=9)


def test_blank_regions_leave_no_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "m.ome.zarr")
    ome_zarr.create_labels(
        uri, 4096, 4096, mpp=None, name="m", classes=Classes(), attributes={}
    )
    for region in plan_regions(4096, 4096, 2048):
        ome_zarr.write_region(uri, region, np.zeros((2048, 2048), np.uint8))
    ome_zarr.build_pyramid(uri)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "zarr.json"
    }


def test_a_region_that_is_not_a_shard_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "m.ome.zarr")
    ome_zarr.create_labels(
        uri, 4096, 4096, mpp=None, name="m", classes=Classes(), attributes={}
    )
    with pytest.raises(ValueError, match="multiple of 2048"):
        ome_zarr.write_region(uri, Rectangle(512, 0, 4, 4), np.ones((4, 4), np.uint8))


@given(hnp.arrays(np.uint8, (2, 2), elements=st.integers(0, 3)))
def test_majority_of_four(block: np.ndarray) -> None:
    counts = np.bincount(block.ravel(), minlength=4)
    expected = max(range(4), key=lambda value: (counts[value], value))
    assert halved(block)[0, 0] == expected


@given(hnp.arrays(np.uint8, (3, 2, 4)))
def test_mean_of_four(pixels: np.ndarray) -> None:
    blocks = pixels.reshape(3, 1, 2, 2, 2).mean(axis=(2, 4))
    assert np.abs(halved(pixels) - blocks).max() <= 0.5


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["zarr.json", "0/zarr.json", "1/zarr.json"]), st.data())
def test_damaged_metadata_raise_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject
) -> None:
    uri = str(tmp_path_factory.mktemp("damaged") / "m.ome.zarr")
    ome_zarr.create_labels(
        uri, 600, 700, mpp=None, name="m", classes=Classes(), attributes={"a": 1}
    )
    ones = np.ones((600, 700), np.uint8)
    ome_zarr.write_region(uri, Rectangle(0, 0, 600, 700), ones)
    path = Path(uri) / name
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    assert isinstance(group_attributes.read_attributes(uri), dict | None)
    assert group_attributes.read_root(uri) is None  # nothing has sealed it
    for level in (0, 1):
        try:
            pixels = ome_zarr.open_level(uri, level)[:64, :64]
        except FormatError as error:
            assert uri in str(error)  # noqa: PT017
        else:
            assert pixels.ndim == 2
