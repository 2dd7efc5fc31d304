"""Which crops a training sees, and in which order."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medray.classes import Classes
from medray.datasets.dataset import (
    DatasetSettings,
    labels_uri,
    slide_uri,
    write_patches,
)
from medray.errors import FormatError
from medray.geometry import Rectangle
from medray.storage import ome_zarr
from medray.storage.yaml_config import write_settings
from medray.training.crops import (
    place_crop,
    read_train,
    read_unlabelled,
    read_val,
)
from medray.training.sampler import (
    Data,
    Sampling,
    crop_of_epoch,
    draw,
    shares,
    usable_patches,
)

SIZE = (1200, 1100)
PATCH = ome_zarr.PATCH


def sampling(
    data: Data,
    *,
    batch: int = 8,
    micro_batch_size: int | None = None,
    seed: int = 0,
    epochs: int = 20,
) -> Sampling:
    """What a recipe would ask for."""
    return Sampling(data, seed, epochs, batch, micro_batch_size or batch)


def write_slide(folder: Path, name: str, labels: np.ndarray | None) -> np.ndarray:
    """A slide whose red and green are its coordinates, a tenth of them; blue 7."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    pixels = np.stack([y // 10, x // 10, np.full(SIZE, 7)]).astype(np.uint8)
    uri = slide_uri(str(folder), name)
    ome_zarr.create_image(
        uri, *SIZE, mpp=0.5, name=name, attributes={"slide": name}, region=2048
    )
    ome_zarr.write_region(uri, Rectangle(0, 0, *SIZE), pixels)
    if labels is not None:
        uri = labels_uri(str(folder), name)
        ome_zarr.create_labels(
            uri,
            *SIZE,
            mpp=0.5,
            name=name,
            classes=Classes(),
            attributes={"slide": name},
            region=2048,
        )
        ome_zarr.write_region(uri, Rectangle(0, 0, *SIZE), labels)
    return pixels


def rows_of(name: str, labels: np.ndarray | None, split: str) -> list[dict]:
    rows = []
    for y in range(0, SIZE[0], PATCH):
        for x in range(0, SIZE[1], PATCH):
            h, w = min(PATCH, SIZE[0] - y), min(PATCH, SIZE[1] - x)
            part = np.zeros((h, w), np.uint8)
            if labels is not None:
                part = labels[y : y + h, x : x + w]
            count = np.bincount(part.ravel(), minlength=2).tolist()
            rows.append(
                {"slide": name, "y": y, "x": x, "height": h, "width": w}
                | {"tissue": 1.0, "class_px": count[:2], "split": split, "mpp": 0.5}
            )
    return rows


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two annotated slides to learn from, one to check, one without annotation."""
    folder = tmp_path_factory.mktemp("dataset")
    write_settings(
        str(folder / "dataset.yaml"), DatasetSettings(classes=Classes(), mpp=0.5)
    )
    rows = []
    for name, split in (("a", "train"), ("b", "train"), ("c", "val"), ("d", "")):
        labels = None
        if split:
            labels = np.zeros(SIZE, np.uint8)
            labels[700:720, 300:310] = 1  # 200 of more than a million pixels
        write_slide(folder, name, labels)
        rows += rows_of(name, labels, split)
    write_patches(str(folder), rows)
    return str(folder)


@given(
    st.lists(st.floats(0, 5), min_size=1, max_size=40).filter(lambda w: sum(w) > 1e-3),
    st.integers(1, 200),
    st.integers(0, 2**31),
)
def test_each_is_drawn_as_often_as_its_share(
    weights: list[float], count: int, seed: int
) -> None:
    wanted = np.array(weights)[:, None] / sum(weights)
    drawn = draw(wanted, count, np.random.default_rng(seed))[:, 0]
    found = np.bincount(drawn, minlength=len(weights))
    expected = wanted[:, 0] * count
    assert found.sum() == count
    # Rounded up or down; a hair for the sums of floats.
    assert (found >= np.floor(expected - 1e-6)).all()
    assert (found <= np.ceil(expected + 1e-6)).all()


def test_every_patch_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    equal = np.full((50, 1), 1 / 50)
    orders = [draw(equal, 50, np.random.default_rng((0, e)))[:, 0] for e in (0, 1, 0)]
    for order in orders:
        assert sorted(order) == list(range(50))
    np.testing.assert_array_equal(orders[0], orders[2])
    assert (orders[0] != orders[1]).any()
    # Half as many draws are spread over all of them (they lie by slide).
    half = draw(equal, 10, np.random.default_rng(3))[:, 0]
    assert np.bincount(half // 10).tolist() == [2] * 5


def test_balance_draws_each_class_as_often() -> None:
    class_px = np.array([[100, 0], [99, 1], [50, 50], [100, 0]])
    wanted = shares(class_px, Data(balance=True), np.full(4, np.nan))
    np.testing.assert_allclose(wanted.sum(axis=0), [0.5, 0.5, 0.0])
    np.testing.assert_allclose(wanted[:, 1], [0, 0.5 / 51, 0.5 * 50 / 51, 0])


def test_hard_patches_come_more_often() -> None:
    losses = np.array([0.1, 0.3, np.nan, 0.2])
    class_px = np.ones((4, 2), int)
    wanted = shares(class_px, Data(hard=0.5), losses)
    np.testing.assert_allclose(
        wanted[:, -1], 0.125 + 0.5 * np.array([0.1, 0.3, 0.2, 0.2]) / 0.8
    )
    none = shares(class_px, Data(hard=0.5), np.full(4, np.nan))
    np.testing.assert_allclose(none[:, -1], 0.25)


@given(st.data())
def test_crops_lie_within_the_slide_and_fit_their_patch(data: st.DataObject) -> None:
    size = data.draw(st.tuples(st.integers(40, 3000), st.integers(40, 3000)))
    y, x = (PATCH * data.draw(st.integers(0, (n - 1) // PATCH)) for n in size)
    patch = {"y": y, "x": x}
    patch |= {"height": min(PATCH, size[0] - y), "width": min(PATCH, size[1] - x)}
    side = 32 * data.draw(st.integers(1, 48))
    around = None
    if data.draw(st.booleans()):
        around = (
            y + data.draw(st.integers(0, patch["height"] - 1)),
            x + data.draw(st.integers(0, patch["width"] - 1)),
        )
    rng = np.random.default_rng(data.draw(st.integers(0, 2**31)))
    corner = place_crop(patch, side, size, rng, around)
    for axis, (at, n, start, extent) in enumerate(
        zip(corner, size, (y, x), (patch["height"], patch["width"]), strict=True)
    ):
        assert at >= 0
        assert at + side <= n or at == 0  # beyond the slide only where it is too small
        first, last = (
            min(start, start + extent - side),
            max(start, start + extent - side),
        )
        if side <= n:
            assert min(first, n - side) <= at <= max(0, last)
        if around is not None:
            assert at <= around[axis] < at + side or n < side


@pytest.mark.parametrize("side", [64, 512, 1024])
def test_crops_hold_the_pixels_of_their_place(dataset: str, side: int) -> None:
    how = sampling(Data(crop=side, balance=True), batch=4)
    for first in (0, 4, 8):
        crops = read_train(dataset, how, 0, first)
        assert crops.images.shape == (4, 3, side, side)
        assert (crops.images[:, 2] == 7).all()
        steps = np.diff(crops.images[:, :2].astype(int), axis=2)[:, 0]
        assert set(np.unique(steps).tolist()) <= {0, 1}
        inside = crops.masks == 1
        tenths = crops.images[:, :2].astype(int)[:, :, :, :]
        y, x = tenths[:, 0][inside], tenths[:, 1][inside]
        assert ((y >= 70) & (y < 72)).all()
        assert ((x >= 30) & (x < 31)).all()


def test_crops_are_drawn_around_the_class_that_is_wanted(dataset: str) -> None:
    """200 pixels of tumour are in half of the crops, not in one of 40."""
    how = sampling(Data(crop=64, balance=True, samples=64), batch=32)
    crops = read_train(dataset, how, 0, 0)
    held = crops.masks.any(axis=(1, 2))
    assert 12 <= held.sum() <= 20
    # Not always in the middle of the crop.
    places = {np.argwhere(mask)[0].tolist()[0] for mask in crops.masks[held]}
    assert len(places) > 3


def test_the_order_does_not_depend_on_how_it_is_read(dataset: str) -> None:
    how = sampling(Data(crop=64), batch=4)
    whole = read_train(dataset, how, 1, 4)
    single = sampling(Data(crop=64), batch=4, micro_batch_size=1)
    parts = [read_train(dataset, single, 1, place) for place in range(4, 8)]
    np.testing.assert_array_equal(
        whole.images, np.concatenate([part.images for part in parts])
    )
    other = read_train(dataset, sampling(Data(crop=64), batch=4, seed=1), 1, 4)
    assert (other.images != whole.images).any()
    seen = Counter(
        int(i)
        for first in range(0, 16, 4)
        for i in read_train(dataset, how, 0, first).patches
    )
    assert max(seen.values()) == 1


def test_epochs_go_through_the_sides_of_a_progressive_crop() -> None:
    how = sampling(Data(crop=(256, 512, 1024)), epochs=7)
    sides = [crop_of_epoch(how, epoch) for epoch in range(7)]
    assert sides == [256, 256, 256, 512, 512, 1024, 1024]


def test_validation_gives_each_patch_whole(dataset: str) -> None:
    how = sampling(Data())
    patches = usable_patches(dataset, "val", how.data)
    found = []
    for first in range(0, len(patches), 4):
        crops = read_val(dataset, how, first, 4)
        for image, index, (h, w) in zip(
            crops.images, crops.patches, crops.sizes, strict=True
        ):
            row = patches[index]
            assert (h, w) == (row["height"], row["width"])
            assert image[0, 0, 0] == row["y"] // 10
            assert image[1, h - 1, w - 1] == (row["x"] + w - 1) // 10
            found.append(int(index))
    assert found == list(range(len(patches)))


def test_unlabelled_crops_come_from_slides_without_annotation(dataset: str) -> None:
    how = sampling(Data(crop=64), batch=4)
    crops = read_unlabelled(dataset, how, 0, 0)
    assert crops.shape == (4, 3, 64, 64)
    assert (crops != read_unlabelled(dataset, how, 1, 0)).any()
    assert {row["slide"] for row in usable_patches(dataset, "", how.data)} == {"d"}


def test_damaged_patches_are_named_and_replaced(dataset: str, tmp_path: Path) -> None:
    import shutil

    damaged = tmp_path / "damaged"
    shutil.copytree(dataset, damaged)
    shard = next((damaged / "slides" / "a.ome.zarr" / "0" / "c").rglob("0"))
    shard = next(
        p for p in (damaged / "slides/a.ome.zarr/0/c").rglob("*") if p.is_file()
    )
    data = bytearray(shard.read_bytes())
    data[: len(data) // 2] = b"\xff" * (len(data) // 2)
    shard.write_bytes(bytes(data))
    how = sampling(Data(crop=64), batch=16)
    crops = read_train(str(damaged), how, 0, 0)
    assert crops.images.shape[0] == 16
    assert crops.damaged
    assert all(name.startswith("a at y=") for name in crops.damaged)
    assert (crops.images[:, 2] == 7).all()
    again = read_train(str(damaged), how, 0, 0)
    np.testing.assert_array_equal(again.images, crops.images)


def test_labels_that_are_no_class_are_named(dataset: str, tmp_path: Path) -> None:
    labels = np.full(SIZE, 9, np.uint8)
    write_slide(tmp_path, "a", labels)
    write_settings(
        str(tmp_path / "dataset.yaml"), DatasetSettings(classes=Classes(), mpp=0.5)
    )
    before = np.indices(SIZE).sum(axis=0).astype(np.uint8) % 2
    write_patches(str(tmp_path), rows_of("a", before, "train"))
    how = sampling(Data(crop=64), batch=2)
    with pytest.raises(FormatError, match="label 9 .*2 classes"):
        read_train(str(tmp_path), how, 0, 0)
