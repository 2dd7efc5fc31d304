"""Which folders are classes, which are splits, and what else lies in them."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from image_cells import write_cells
from PIL import Image

from medray.datasets.find_images import find_images
from medray.datasets.image_folder import ingest_images
from medray.errors import ConfigError


def tree(folder: Path, *names: str) -> str:
    """Put a small picture of its own at each name."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        colour = (number % 256, number // 256, 99)
        Image.new("RGB", (8, 8), colour).save(folder / name)
    return str(folder)


def laid_out(*tops: str) -> list[str]:
    return [f"{top}/{name}/{top}.png" for top in tops for name in ("cat", "dog")]


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "valid", "test"),
        ("Training", "Validation", "Testing"),
        ("TRAIN", "VAL", "TEST"),
    ],
)
def test_folders_of_splits_are_known_by_their_usual_names(
    train: str, val: str, test: str, tmp_path: Path
) -> None:
    folder = tree(tmp_path, *laid_out(train, val, test))
    found = find_images(folder)
    assert Counter((one.split, one.class_name) for one in found) == {
        (split, name): 1
        for split in ("train", "val", "test")
        for name in ("cat", "dog")
    }
    assert {one.image.split("/")[0] for one in found} == {train, val, test}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            laid_out("train", "holdout"),
            "holds holdout beside train, .*train, val, test",
        ),
        (laid_out("fold1", "fold2"), "fold1 and fold2 both hold cat, dog"),
        ([*laid_out("dev"), *laid_out("eval"), "eval/cow/1.png"], "dev and eval both"),
        (laid_out("val", "valid"), "two folders for the split val: val, valid"),
        (["train/cat/1.png", "train/dog/1.png", "test/1.png"], "images in test itself"),
        (["train/1.png", "test/1.png"], "images in test, train themselves"),
        (["cat/train/1.png", "dog/train/1.png"], "expected train/cat"),
    ],
)
def test_folders_that_may_be_splits_are_never_classes(
    names: list[str], said: str, tmp_path: Path
) -> None:
    folder = tree(tmp_path, *names)
    with pytest.raises(ConfigError, match=said):
        find_images(folder)


def test_classes_may_hold_folders_of_their_own(tmp_path: Path) -> None:
    """Of patients, of magnifications; or be called as splits are."""
    names = [f"{name}/{mag}/1.png" for name in ("cat", "dog") for mag in ("10x", "40x")]
    folder = tree(tmp_path / "a", *names)
    with pytest.raises(ConfigError, match="say so by --classes"):
        find_images(folder)
    assert len(find_images(folder, ("cat", "dog"))) == 4
    patients = tree(tmp_path / "b", "cat/p1/1.png", "cat/p2/1.png", "dog/p3/1.png")
    assert {one.class_name for one in find_images(patients)} == {"cat", "dog"}
    words = tree(tmp_path / "c", "valid/1.png", "invalid/1.png")
    assert {one.class_name for one in find_images(words)} == {"valid", "invalid"}


def test_files_that_are_no_images_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_cells(tmp_path / "cells", patients=1, each=2)
    for name in ("sick/Thumbs.db", "sick/.DS_Store", "healthy/desktop.ini", "notes.md"):
        (folder / name).write_bytes(b"x")
    (folder / "__MACOSX" / "sick").mkdir(parents=True)
    (folder / "__MACOSX" / "sick" / "._P0.png").write_bytes(b"x")
    assert len(find_images(str(folder))) == 4
    assert caplog.text == ""
    for name in ("healthy/scan.heic", "sick/scan.jp2", "sick/scan.txt"):
        (folder / name).write_bytes(b"x")
    assert len(find_images(str(folder))) == 4
    assert "left out: 3 files that are no images" in caplog.text
    assert "healthy/scan.heic" in caplog.text


def test_what_readers_remark_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_cells(tmp_path / "cells", patients=2, each=2)
    for number in range(2):
        turned = Image.new("RGB", (40, 20), (number, 9, 9))
        exif = turned.getexif()
        exif[0x0112] = 8
        turned.save(folder / "sick" / f"turned-{number}.jpg", exif=exif)
    frames = [Image.new("L", (20, 20), value) for value in (0, 255)]
    frames[0].save(folder / "sick" / "z.gif", save_all=True, append_images=frames[1:])
    shutil.copy(folder / "healthy" / "P0_cell_0.png", folder / "healthy" / "Q.PNG")
    done = ingest_images(
        str(folder), out=str(tmp_path / "data"), side=32, executor="local"
    )
    assert (done.images, done.copies, list(done.failed)) == (10, 1, ["sick/z.gif"])
    assert "holds 2 pictures, expected one" in done.failed["sick/z.gif"]
    said = "2 images, such as sick/turned-0.jpg: turned as its EXIF Orientation 8"
    assert caplog.text.count(said) == 1
