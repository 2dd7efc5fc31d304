"""Slides in two places, and a dataset that is asked for a second time."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from medray.cli import main
from medray.datasets.ingest_slides import ingest
from medray.datasets.splits import copies_apart, joined_groups, kept_splits
from medray.errors import ConfigError
from medray.execution.commit import Summary

SIDE = 96


def write_slide(folder: Path, name: str, seed: int) -> None:
    """A slide of tissue, with a square of tumour outlined in it."""
    for sub in ("s", "a"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(90, 190, (SIDE, SIDE, 3)).astype(np.uint8)
    tifffile.imwrite(folder / "s" / f"{name}.tif", pixels, photometric="rgb")
    write_outline(folder, name, "Polygon", [[[8, 8], [60, 8], [60, 60], [8, 60]]])


def write_outline(folder: Path, name: str, kind: str, coordinates: Any) -> None:
    shape = {"type": kind, "coordinates": coordinates}
    tumour = {"classification": {"name": "tumour"}}
    feature = {"type": "Feature", "geometry": shape, "properties": tumour}
    (folder / "a" / f"{name}.geojson").write_text(json.dumps([feature]))


def again(folder: Path, **options: Any) -> Summary:
    return ingest(
        [str(folder / "s")],
        annotations=str(folder / "a"),
        out=str(folder / "d"),
        executor="local",
        **options,
    )


def table(folder: Path, name: str = "slides") -> list[dict[str, Any]]:
    return pq.read_table(folder / "d" / f"{name}.parquet").to_pylist()


def splits(folder: Path) -> dict[str, str]:
    found = {row["slide"]: row["split"] for row in table(folder)}
    patches = {row["slide"]: row["split"] for row in table(folder, "patches")}
    assert patches == {slide: split for slide, split in found.items() if split}
    return found


@pytest.fixture
def six(tmp_path: Path) -> Path:
    for number in range(6):
        write_slide(tmp_path, f"s{number}", number)
    return tmp_path


# --- the same scan twice --------------------------------------------------------------


def test_a_scan_under_two_names_is_dealt_to_one_split(six: Path) -> None:
    for number in range(4):
        shutil.copy(six / "s" / f"s{number}.tif", six / "s" / f"z{number}.tif")
        write_outline(six, f"z{number}", "Polygon", [[[0, 0], [9, 0], [9, 9]]])
    done = again(six, fractions=(0.4, 0.3, 0.3))
    assert done.warnings == ()
    found = splits(six)
    assert set(found.values()) == {"train", "val", "test"}
    for number in range(4):
        assert found[f"s{number}"] == found[f"z{number}"]


def test_given_splits_that_part_a_scan_are_warned_of(
    six: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(six / "s" / "s1.tif", six / "s" / "again.tif")
    write_outline(six, "again", "Polygon", [[[0, 0], [9, 0], [9, 9]]])
    lines = ["slide,split", "again,val", *(f"s{number},train" for number in range(6))]
    (six / "splits.csv").write_text("\n".join(lines))
    words = ["ingest", f"{six}/s", "--annotations", f"{six}/a", "--out", f"{six}/d"]
    words += ["--splits", f"{six}/splits.csv", "--executor", "local"]
    assert main(words) == 0
    said = capsys.readouterr()
    for text in (said.out, said.err):
        assert "again (val) and s1 (train)" in text
    assert main([*words, "--json"]) == 0
    (warned,) = json.loads(capsys.readouterr().out)["warnings"]
    assert "1 scans are in more than one split" in warned


@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcde"),
            st.sampled_from("12345"),
            st.sampled_from(["", "train", "val", "test"]),
        ),
        max_size=9,
    )
)
def test_neither_a_scan_nor_a_patient_is_in_two_groups(
    drawn: Sequence[tuple[str, str, str]],
) -> None:
    rows = [
        {"slide": f"s{i}", "group": group, "digest": f"{scan}+mpp=1+{i}", "split": was}
        for i, (group, scan, was) in enumerate(drawn)
    ]
    joined = joined_groups(rows)
    near = {a: {b for b in drawn if a[0] == b[0] or a[1] == b[1]} for a in drawn}
    for _ in drawn:  # what is near to what is near, and so on
        near = {a: set().union(*(near[b] for b in near[a])) for a in drawn}
    pairs = itertools.combinations(zip(drawn, joined, strict=True), 2)
    for (one, now), (other, then) in pairs:
        assert (now["group"] == then["group"]) == (other in near[one])
    kept = kept_splits(joined)
    # What was learned from stays what is learned from, and takes its copies along.
    for row in joined:
        if row["split"] == "train":
            assert kept[row["group"]] == "train"
    dealt = [row | {"split": kept.get(row["group"], "")} for row in joined]
    assert copies_apart(dealt) == []


def test_copies_of_an_earlier_dataset_are_brought_together(six: Path) -> None:
    """As an older medray left them: the copy that was tested on goes to train."""
    shutil.copy(six / "s" / "s1.tif", six / "s" / "copy.tif")
    write_outline(six, "copy", "Polygon", [[[0, 0], [9, 0], [9, 9]]])
    lines = ["slide,split", "copy,test", "s0,val"]
    lines += [f"s{number},train" for number in range(1, 6)]
    (six / "splits.csv").write_text("\n".join(lines))
    again(six, splits=str(six / "splits.csv"))
    done = again(six)
    assert "copy from test to train" in done.warnings[-1]
    assert splits(six) == {"copy": "train", "s0": "val"} | {
        f"s{number}": "train" for number in range(1, 6)
    }


# --- another request than before ------------------------------------------------------


def test_slides_that_are_not_named_stay_until_they_are_to_go(
    six: Path, caplog: pytest.LogCaptureFixture
) -> None:
    again(six)
    before = splits(six)
    (six / "s" / "s2.tif").unlink()
    write_slide(six, "new", 9)
    done = again(six)
    (said,) = done.warnings
    assert "1 slides of the dataset are not in the request and stay: s2" in said
    assert said in caplog.text
    assert said in str(done)
    assert before.items() <= splits(six).items()
    done = again(six, remove_missing=True)
    assert "taken out of the dataset: s2" in done.warnings[0]
    assert splits(six).keys() == before.keys() - {"s2"} | {"new"}
    assert not (six / "d" / "slides" / "s2.ome.zarr").exists()
    assert (six / "d" / "slides" / "s1.ome.zarr").exists()
    assert (again(six).done, again(six).warnings) == (0, ())


def test_a_mistaken_folder_does_not_empty_a_dataset(six: Path, tmp_path: Path) -> None:
    again(six)
    other = tmp_path / "other"
    write_slide(other, "x", 1)
    with pytest.raises(ConfigError, match=r"would take out all of its 6"):
        ingest(
            [str(other / "s")],
            out=str(six / "d"),
            remove_missing=True,
            executor="local",
        )
    assert len(splits(six)) == 6


def test_other_fractions_and_seeds_are_said_to_have_no_effect(six: Path) -> None:
    assert again(six, fractions=(0.5, 0.5, 0)).warnings == ()
    before = splits(six)
    for options in ({"seed": 3, "fractions": (0.5, 0.5, 0)}, {}):
        (said,) = again(six, **options).warnings
        assert "6 slides keep the splits that they have by fractions 0.5,0.5,0" in said
        assert splits(six) == before
    assert again(six, fractions=(0.5, 0.5, 0.0)).warnings == ()
    # A table decides of all; what it decided stays as well.
    lines = ["slide,split", *(f"s{number},train" for number in range(6))]
    (six / "splits.csv").write_text("\n".join(lines))
    assert again(six, splits=str(six / "splits.csv")).warnings == ()
    assert set(splits(six).values()) == {"train"}
    assert "by --splits" in again(six, fractions=(0.5, 0.5, 0)).warnings[0]


def test_a_slide_that_is_replaced_keeps_its_split(six: Path) -> None:
    """It may be the same tissue, scanned again: a model has learned from it."""
    again(six)
    before = splits(six)
    for number in range(6):
        write_slide(six, f"s{number}", 20 + number)
    assert again(six, seed=5).done == 6
    assert splits(six) == before


# --- annotations that enclose nothing -------------------------------------------------


def test_a_slide_that_fails_for_a_night_keeps_its_split(six: Path) -> None:
    again(six, fractions=(0.5, 0.5, 0))
    before = splits(six)
    slide = next(iter(before))
    (six / "s" / f"{slide}.tif").write_bytes(b"II*\0 damaged")
    assert list(again(six, fractions=(0.5, 0.5, 0)).failed) == [slide]
    other = {"train": (0, 1, 0), "val": (1, 0, 0)}[before[slide]]
    write_slide(six, slide, 60)
    again(six, fractions=other)
    assert splits(six) == before


def test_a_line_is_no_example_of_a_slide_without_tumour(six: Path) -> None:
    write_outline(six, "s1", "LineString", [[10, 10], [80, 80]])
    (six / "a" / "s2.geojson").write_text('{"type":"FeatureCollection","features":[]}')
    done = again(six)
    assert set(done.failed) == {"s1"}
    assert "encloses no area" in done.failed["s1"]
    rows = {row["slide"]: row for row in table(six)}
    assert (rows["s2"]["annotated"], rows["s2"]["px_tumour"]) == (True, 0)
    assert "s1" not in {row["slide"] for row in table(six, "patches")}


# --- a folder that was copied ---------------------------------------------------------


def test_a_dataset_that_was_copied_with_its_slides_goes_on_with_the_copies(
    tmp_path: Path,
) -> None:
    """The slides of the first place are still there, and other ones by now."""
    first, second = tmp_path / "first", tmp_path / "second"
    for number in range(3):
        write_slide(first, f"s{number}", number)
    again(first, fractions=(1, 0, 0))
    shutil.copytree(first, second)
    assert again(second, fractions=(1, 0, 0)).skipped == 3  # the same bytes
    shutil.rmtree(second)
    shutil.copytree(first, second)
    write_slide(second, "s1", 9)
    found = again(second, fractions=(1, 0, 0))
    assert (found.done, found.skipped) == (1, 2)


@pytest.mark.parametrize("there", [False, True])
def test_a_slide_of_another_folder_does_not_take_ones_place(
    there: bool, tmp_path: Path
) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    write_slide(first, "s1", 1)
    again(first, fractions=(1, 0, 0))
    write_slide(second, "s1", 2)
    if there:  # next to the other slide, too, but not where OUT is
        shutil.copytree(first / "d", second / "d2")
    with pytest.raises(ConfigError, match="another slide"):
        ingest(
            [str(second / "s")],
            annotations=str(second / "a"),
            out=str(first / "d"),
            fractions=(1, 0, 0),
            executor="local",
        )
