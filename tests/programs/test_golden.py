"""What changes a golden digest, and what does not."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "golden"))

import digests
import golden


def write_zarr(folder: Path) -> Path:
    """A mask of two levels, as a run has it."""
    group = zarr.create_group(folder, zarr_format=3, overwrite=True)
    for level, side in enumerate((64, 32)):
        array = group.create_array(
            str(level), shape=(side, side), chunks=(16, 16), shards=(32, 32), dtype="u1"
        )
        array[...] = np.arange(side * side).reshape(side, side) % 2
    label = {"properties": [{"label-value": 1, "class": "tumour"}]}
    label["colors"] = [{"label-value": 1, "rgba": [0, 1, 2, 255]}]
    scales = [{"name": "s", "metadata": {"method": "medray.storage.pyramid.halved"}}]
    group.attrs["ome"] = {"image-label": label, "multiscales": scales}
    group.attrs["medray"] = {"run_digest": "a"}
    return folder


def edit_ome(folder: Path, edit: Callable[[Any], None]) -> None:
    group = zarr.open_group(folder, mode="r+")
    ome: Any = group.attrs["ome"]
    edit(ome)
    group.attrs["ome"] = ome


def change_pixel(folder: Path) -> None:
    array: Any = zarr.open_group(folder, mode="r+")["1"]
    array[31, 31] = 7


def rename_class(folder: Path) -> None:
    edit_ome(
        folder, lambda ome: ome["image-label"]["properties"][0].update({"class": "x"})
    )


def change_colour(folder: Path) -> None:
    edit_ome(folder, lambda ome: ome["image-label"]["colors"][0]["rgba"].reverse())


def change_chunks(folder: Path) -> None:
    group = zarr.open_group(folder, mode="r+")
    pixels = np.asarray(group["1"][...])  # type: ignore[index]
    group.create_array(
        "1",
        shape=(32, 32),
        chunks=(32, 32),
        shards=(32, 32),
        dtype="u1",
        overwrite=True,
    )[...] = pixels


@pytest.mark.parametrize(
    "change", [change_pixel, rename_class, change_colour, change_chunks]
)
def test_a_mask_is_its_pixels_layout_classes_and_colours(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    mask = write_zarr(tmp_path / "a.ome.zarr")
    before = digests.digest_zarr(mask)
    change(mask)
    assert digests.digest_zarr(mask) != before


def test_a_mask_is_not_its_place_nor_its_provenance(tmp_path: Path) -> None:
    mask = write_zarr(tmp_path / "a.ome.zarr")
    before = digests.digest_zarr(mask)
    other = tmp_path / "elsewhere" / "a.ome.zarr"
    shutil.copytree(mask, other)
    zarr.open_group(other, mode="r+").attrs["medray"] = {"run": "b", "new": 1}
    edit_ome(other, lambda ome: ome["multiscales"][0].update(metadata={"method": "n"}))
    assert digests.digest_zarr(other) == before


ROWS: list[dict[str, Any]] = [
    {
        "slide": f"s{n}",
        "uri": f"/a/s{n}.tif",
        "message": f"/a/b/s{n}.tif: is damaged",
        "read_s": 0.1,
        "committed_at": 5.0,
        "merkle_root": "1",
        "px_tumour": n,
        "label": "tumour",
        "p": 0.1 + n,
    }
    for n in range(3)
]


def digest_of_rows(folder: Path, rows: list[dict[str, Any]]) -> str:
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    return digests.digest_table(folder / "t.parquet")


@pytest.mark.parametrize(
    "changed",
    [{"px_tumour": 9}, {"label": "stroma"}, {"p": 0.1001}, {"message": "/a/s.tif: ok"}],
)
def test_a_table_is_its_values(changed: dict[str, Any], tmp_path: Path) -> None:
    rows = [ROWS[0] | changed, *ROWS[1:]]
    assert digest_of_rows(tmp_path, rows) != digest_of_rows(tmp_path, ROWS)


def test_a_table_is_not_its_order_times_or_places(tmp_path: Path) -> None:
    before = digest_of_rows(tmp_path, ROWS)
    moved = {"uri": "/x/y.tif", "read_s": 7.0, "committed_at": 8.0, "merkle_root": "2"}
    rows = [
        dict(reversed((row | moved).items()))
        | {"message": row["message"].replace("/a/b/", "/tmp/elsewhere/")}
        for row in reversed(ROWS)
    ]
    assert digest_of_rows(tmp_path, rows) == before


METRICS: dict[str, Any] = {
    "f1": 0.5,
    "per_class": [{"class": "tumour", "f1": 0.5}],
    "date": "2026-01-01",
    "truth": "/a/truth",
    "provenance": {"run digest": "1"},
    "history": [{"epoch": 0, "loss": 0.3, "seconds": 2.0}],
}


def test_metrics_are_their_scores() -> None:
    before = digests.digest(METRICS)
    classes = [{"class": "stroma", "f1": 0.5}]
    losses = [{"epoch": 0, "loss": 0.31, "seconds": 2.0}]
    for changed in ({"f1": 0.5001}, {"per_class": classes}, {"history": losses}):
        assert digests.digest(METRICS | changed) != before
    later = {"date": "2027-01-01", "truth": "/b/truth", "provenance": {}}
    later["history"] = [{"epoch": 0, "loss": 0.3, "seconds": 9.0}]
    assert digests.digest(METRICS | later) == before
    # The same numbers, added in another order.
    assert digests.digest([0.1 + 0.2 + 0.3]) == digests.digest([0.3 + 0.2 + 0.1])


def digest_of_weights(folder: Path, tensors: dict[str, Any]) -> str:
    save_file(tensors, folder / "w.safetensors", {"made": str(len(tensors))})
    return digests.digest_weights(folder / "w.safetensors")


def test_weights_are_their_tensors(tmp_path: Path) -> None:
    one = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.float32)}
    before = digest_of_weights(tmp_path, one)
    nudged = one["b"].copy()
    nudged[0] = np.nextafter(np.float32(1), np.float32(2))
    for changed in (
        one | {"b": nudged},
        one | {"a": one["a"].T.copy()},
        one | {"b": one["b"].astype(np.float16)},
        {"a": one["a"], "c": one["b"]},
    ):
        assert digest_of_weights(tmp_path, changed) != before
    assert digest_of_weights(tmp_path, dict(reversed(one.items()))) == before


def feature(corner: float, name: str = "tumour", index: str = "1") -> dict[str, Any]:
    ring = [[0, 0], [4, 0], [corner, 4], [0, 0]]
    return {
        "type": "Feature",
        "id": index,
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"classification": {"name": name, "color": [1, 2, 3]}},
    }


def test_outlines_are_their_vertices_and_classes(tmp_path: Path) -> None:
    path = tmp_path / "o.geojson"

    def digest_of(*features: dict[str, Any]) -> str:
        path.write_text(json.dumps({"features": features}))
        return digests.digest_outlines(path)

    before = digest_of(feature(4), feature(5))
    assert digest_of(feature(4), feature(5.5)) != before
    assert digest_of(feature(4), feature(5, "stroma")) != before
    assert digest_of(feature(4)) != before
    assert digest_of(feature(5, index="9"), feature(4)) == before


def test_what_is_compared_with_nothing_is_not_equal(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected files like \*\.zarr"):
        digests.digest_files(tmp_path, "*.zarr")


def test_each_difference_has_its_row() -> None:
    kept = {"a/x": "1", "a/y": "2", "b/x": "3", "real/x": "4"}
    found = {"a/x": "1", "a/y": "9", "c/x": "5"}
    rows = golden.differences(kept, found, {"real": "not made: no slides"})
    assert rows == [
        ("a/y", "differs", "2", "9"),
        ("b/x", "is gone", "3", ""),
        ("c/x", "new", "", "5"),
    ]
    assert golden.differences(found, found, {}) == []


def test_steps_are_chosen_by_the_names_of_what_they_make() -> None:
    steps = dict.fromkeys(["options/a", "options/ab", "demo"])
    kept = {"options/a/masks": "1", "options/ab/masks": "1", "demo/run/masks": "1"}
    assert golden.chosen_steps(steps, kept, "*") == [*steps]
    assert golden.chosen_steps(steps, kept, "options/a") == ["options/a"]
    assert golden.chosen_steps(steps, kept, "options/*") == ["options/a", "options/ab"]
    assert golden.chosen_steps(steps, kept, "*/masks") == [*steps]
    assert golden.chosen_steps(steps, {}, "demo") == ["demo"]
