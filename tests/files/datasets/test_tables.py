"""Tables of groups and splits, as ingest makes datasets of them."""

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from image_cells import write_cells
from PIL import Image

from medray.datasets.image_folder import ingest_images
from medray.datasets.ingest_slides import ingest
from medray.errors import ConfigError
from medray.storage import files

NAMES = [f"{patient}-{number}" for patient in ("ann", "bob", "cyd") for number in "12"]


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of each of three patients, each with a mask."""
    folder = tmp_path_factory.mktemp("slides")
    rng = np.random.default_rng(0)
    mask = np.zeros((96, 96), np.uint8)
    mask[20:60, 20:60] = 1
    for name in NAMES:
        pixels = rng.integers(90, 160, (96, 96, 3)).astype(np.uint8)
        (folder / "s" / name[:3]).mkdir(parents=True, exist_ok=True)
        tifffile.imwrite(
            folder / "s" / name[:3] / f"{name}.tiff", pixels, photometric="rgb"
        )
        (folder / "a" / name[:3]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / "a" / name[:3] / f"{name}.png")
    return folder


def made(slides: Path, out: Path, *which: str, **how: Any) -> dict[str, dict[str, Any]]:
    """Ingest; return the rows by slide, without the folder of each."""
    places = [str(slides / "s" / one) for one in which] or [str(slides / "s")]
    annotations = slides / "a" / which[0] if which else slides / "a"
    ingest(
        places,
        annotations=str(annotations),
        out=str(out),
        executor="local",
        **how,
    )
    rows = files.read_table(f"{out}/slides.parquet").to_pylist()
    return {row["slide"].rpartition("__")[2]: row for row in rows}


def table(path: Path, header: str, *lines: str) -> str:
    path.write_text("\n".join([header, *lines]) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "name", ["{0}.tiff", "{1}/{0}", " {0} ", "{1}__{0}", "{2}", "{2}.TIFF"]
)
def test_patients_stay_together_however_slides_are_named(
    slides: Path, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    said = [f"{name.format(n, n[:3], n.upper())};{n[:3]}" for n in NAMES]
    groups = table(tmp_path / "g.csv", "Slide;Group", *said)
    with caplog.at_level(logging.INFO):
        rows = made(slides, tmp_path / "d", groups=groups, fractions=(0.4, 0.3, 0.3))
    split_of = defaultdict(set)
    for slide, row in rows.items():
        split_of[slide[:3]].add(row["split"])
        assert row["group"] == slide[:3]
    assert sorted(map(sorted, split_of.values())) == [["test"], ["train"], ["val"]]
    assert "g.csv: 6 of 6 rows matched 6 of 6 slides" in caplog.text


def test_slides_of_nobody_are_not_of_one_patient(
    slides: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["ann-1,ann", "ann-2,ann", "bob-1,", "bob-2,N/A", "cyd-1,nan"]
    groups = table(tmp_path / "g.csv", "slide,group", *lines)
    rows = made(slides, tmp_path / "d", groups=groups)
    assert [rows[name]["group"] for name in NAMES[:2]] == ["ann", "ann"]
    assert len({rows[name]["group"] for name in NAMES[2:]}) == 4
    assert "of 3 slides the group is not known" in caplog.text
    assert "1 slides have no row: cyd__cyd-2" in caplog.text


def test_wrong_tables_stop_before_any_work(slides: Path, tmp_path: Path) -> None:
    out, path = tmp_path / "d", tmp_path / "t.csv"
    for how, header, lines, said in (
        ("groups", "slide,group", ["dan-1,x"], "line 2: names dan-1"),
        ("splits", "slide,split", ["ann-1,train", "dan,val"], "line 3: names dan"),
        ("splits", "slide,split", ["ann-1,train", "ann-2,learn"], "line 3: .*'learn'"),
        ("groups", "slide,group", ["ann-1,x", "ann-2,X"], "lines 2 and 3: group"),
        ("mpp", "slide,mpp", ["ann-1,0.5", "dan-1,0.5"], "line 3: names dan-1"),
    ):
        with pytest.raises(ConfigError, match=said):
            made(slides, out, **{how: table(path, header, *lines)})
    assert not out.exists()


def test_a_patient_in_two_given_splits_is_refused(slides: Path, tmp_path: Path) -> None:
    groups = table(tmp_path / "g.csv", "slide,group", *[f"{n},{n[:3]}" for n in NAMES])
    splits = [f"{name},{'val' if name == 'bob-2' else 'training'}" for name in NAMES]
    given = table(tmp_path / "s.csv", "slide,split", *splits)
    said = r"group bob of .* train \(bob__bob-1: line 4.* val \(bob__bob-2: line 5"
    with pytest.raises(ConfigError, match=said):
        made(slides, tmp_path / "d", groups=groups, splits=given)
    assert not (tmp_path / "d").exists()
    given = table(tmp_path / "s.csv", "slide,split", *splits[:3], *splits[4:])
    rows = made(slides, tmp_path / "d", groups=groups, splits=given)
    assert rows["bob-2"]["split"] == ""
    assert rows["bob-1"]["split"] == "train"


def test_slides_that_a_table_leaves_out_are_told_of(
    slides: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = ["ann-1.tiff,train", "ann-2.tiff,", "bob-1,valid"]
    rows = made(
        slides, tmp_path / "d", splits=table(tmp_path / "s", "slide,split", *lines)
    )
    found = {slide: row["split"] for slide, row in rows.items() if row["split"]}
    assert found == {"ann-1": "train", "bob-1": "val"}
    assert "4 of 6 slides are in no split" in caplog.text


def test_a_table_over_all_slides_serves_each_request(
    slides: Path, tmp_path: Path
) -> None:
    """The second request finds those of the first known, and leaves their splits."""
    lines = [f"{name}.tiff,{name[:3]}" for name in NAMES[:4]]
    groups = table(tmp_path / "g.csv", "slide,group", *lines)
    first = table(tmp_path / "s.csv", "slide,split", "ann-1,train", "ann-2,train")
    with pytest.raises(ConfigError, match="line 4: names bob-1.tiff"):
        made(slides, tmp_path / "d", "ann", groups=groups)
    made(
        slides, tmp_path / "d", "ann", groups=groups, splits=first, ignore_unknown=True
    )
    second = table(tmp_path / "s.csv", "slide,split", "bob-1,val", "bob-2,val")
    rows = made(slides, tmp_path / "d", "bob", groups=groups, splits=second)
    assert {slide: row["split"] for slide, row in rows.items()} == {
        "ann-1": "train",
        "ann-2": "train",
        "bob-1": "val",
        "bob-2": "val",
    }
    assert {row["group"] for row in rows.values()} == {"ann", "bob"}


def test_images_are_named_by_their_files(tmp_path: Path) -> None:
    cells = write_cells(tmp_path / "cells", patients=4, each=3)
    paths = sorted(path.relative_to(cells) for path in cells.rglob("*.*"))
    lines = [
        f"{path.parent.name}/{path.stem}\tpatient {path.stem[:2]}" for path in paths
    ]
    groups = table(tmp_path / "g.csv", "slide\tgroup", *lines)
    done = ingest_images(
        str(cells), out=str(tmp_path / "d"), side=32, groups=groups, executor="local"
    )
    rows = files.read_table(f"{done.out}/images.parquet").to_pylist()
    split_of = defaultdict(set)
    for row in rows:
        split_of[row["patient"]].add(row["split"])
    assert len(split_of) == 4
    assert all(len(splits) == 1 for splits in split_of.values())


def test_a_patient_of_images_in_two_given_splits_is_refused(tmp_path: Path) -> None:
    cells = write_cells(tmp_path / "cells", patients=2, each=2)
    names = sorted(f"{path.relative_to(cells)}" for path in cells.rglob("*.png"))
    groups = table(tmp_path / "g", "slide,group", *[f"{one},same" for one in names])
    split_of = [f"{one},{'test' if n else 'train'}" for n, one in enumerate(names)]
    splits = table(tmp_path / "s", "slide,split", *split_of)
    with pytest.raises(
        ConfigError, match=r"group same of .* is in train .*and in test"
    ):
        ingest_images(
            str(cells),
            out=str(tmp_path / "d"),
            side=32,
            groups=groups,
            splits=splits,
            executor="local",
        )
    wrong = table(tmp_path / "g", "slide,group", "unheard of.png,x")
    with pytest.raises(ConfigError, match="which is no image of the request"):
        ingest_images(
            str(cells), out=str(tmp_path / "d"), side=32, groups=wrong, executor="local"
        )
    assert not (tmp_path / "d").exists()
