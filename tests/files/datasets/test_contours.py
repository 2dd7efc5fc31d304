"""Single cells with outlines of nucleus and cytoplasm, ingested."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from contours import points_of, shoelace
from PIL import Image

from medray.annotations.morphology import feature_names
from medray.datasets.dataset import read_morphology, read_patches, slide_uri
from medray.datasets.find_images import find_images
from medray.datasets.image_folder import Images, ingest_images
from medray.datasets.synthetic_cells import CELL_CLASSES, generate_cells
from medray.errors import ConfigError
from medray.storage import files, ome_zarr

# --- layout ---------------------------------------------------------------------------


def ingested(cells: Path, out: Path, **how: object) -> Images:
    return ingest_images(str(cells), out=str(out), side=64, executor="local", **how)


def measures(out: Path) -> dict[str, np.ndarray]:
    patches = [
        row
        for split in ("train", "val", "test")
        for row in read_patches(str(out), split)
    ]
    names, values = read_morphology(str(out), patches)
    assert names == feature_names()
    return {row["image"]: v for row, v in zip(patches, values, strict=True)}


def test_crops_are_taken_with_their_contours(
    contoured_cells: Path, tmp_path: Path
) -> None:
    summary = ingested(contoured_cells, tmp_path / "data", contours=True)
    assert (summary.images, summary.copies, summary.failed) == (40, 0, {})
    found = measures(tmp_path / "data")
    for name, values in found.items():
        assert "/CROPPED/" in name
        stem = contoured_cells / name.removesuffix(".bmp")
        nucleus, cytoplasm = (
            shoelace(points_of(stem.with_name(f"{stem.name}_{part}.dat")))
            for part in ("nuc", "cyt")
        )
        assert values[0] == pytest.approx(nucleus, rel=0.05)
        assert values[4] == pytest.approx(cytoplasm, rel=0.02)
        assert values[8] == pytest.approx(nucleus / cytoplasm, rel=0.05)
    # The contours count as much as the images: again only if one has changed.
    assert ingested(contoured_cells, tmp_path / "data", contours=True).skipped == 40
    # Without contours the same cells are there, and nothing of the measures stays.
    summary = ingested(contoured_cells, tmp_path / "data")
    assert summary.images == 40
    with pytest.raises(ConfigError, match="--contours"):
        read_morphology(str(tmp_path / "data"), [])


def test_cells_are_cut_out_of_clusters_where_there_are_no_crops(
    contoured_cells: Path, tmp_path: Path
) -> None:
    generate_cells(tmp_path / "cells", clusters=2, each=4, crops=False)
    summary = ingested(tmp_path / "cells", tmp_path / "data", contours=True)
    assert (summary.images, summary.copies, summary.failed) == (40, 0, {})
    ingested(contoured_cells, tmp_path / "crops", contours=True)
    crops = measures(tmp_path / "crops")
    for name, values in measures(tmp_path / "data").items():
        same = name.replace("/", "/CROPPED/") + ".bmp"
        np.testing.assert_allclose(values, crops[same], rtol=0.05, atol=0.02)
    for row in read_patches(str(tmp_path / "data"), "test"):
        folder, stem = row["image"].split("/")
        number, cell = stem.split("_")
        contour = points_of(tmp_path / "cells" / folder / f"{number}_cyt{cell}.dat")
        (x0, y0), (x1, y1) = contour.min(axis=0) // 1, np.ceil(contour.max(axis=0))
        with Image.open(tmp_path / "cells" / folder / f"{number}.bmp") as picture:
            x1, y1 = min(x1 + 10, picture.width), min(y1 + 10, picture.height)
            box = (max(x0 - 10, 0), max(y0 - 10, 0), x1, y1)
            cut = picture.crop(tuple(map(int, box)))
        wanted = np.asarray(cut.resize((64, 64), Image.Resampling.BILINEAR))
        sheet = ome_zarr.open_level(slide_uri(str(tmp_path / "data"), row["slide"]))
        pixels = sheet[:, row["y"] : row["y"] + 64, row["x"] : row["x"] + 64]
        np.testing.assert_array_equal(np.moveaxis(pixels, 0, 2), wanted)


def test_what_is_wrong_with_a_cell_costs_only_that_cell(
    contoured_cells: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = tmp_path / "cells"
    shutil.copytree(contoured_cells, folder)
    crops = folder / CELL_CLASSES[0] / "CROPPED"
    damaged = crops / "001_01.bmp"
    damaged.write_bytes(damaged.read_bytes()[:60])
    (crops / "001_02_nuc.dat").write_text("10,10\n400,10\n10,20\n")
    (crops / "001_03_cyt.dat").unlink()
    (crops / "001_04.bmp").unlink()
    # The same cell under another name, in the split that tests.
    for suffix in (".bmp", "_nuc.dat", "_cyt.dat"):
        shutil.copy(crops / f"002_01{suffix}", crops / f"900_01{suffix}")
    names = [one.image for one in find_images(str(folder))]
    lines = [f"{n},{'test' if '/900' in n else 'train'}" for n in names]
    splits = tmp_path / "splits.csv"
    splits.write_text("\n".join(["slide,split", *lines]) + "\n")
    how = {"contours": True, "splits": str(splits)}
    summary = ingested(folder, tmp_path / "data", **how)
    failed = {Path(name).name: why for name, why in summary.failed.items()}
    assert set(failed) == {"001_01.bmp", "001_02.bmp", "001_03.bmp"}
    assert "001_01.bmp" in failed["001_01.bmp"]
    assert "001_02_nuc.dat: the contour reaches" in failed["001_02.bmp"]
    assert "no contour of its cytoplasm" in failed["001_03.bmp"]
    assert "1 images of contours are missing" in caplog.text
    assert "CROPPED/001_04.bmp" in caplog.text
    assert (summary.images, summary.copies) == (40 + 1 - 4 - 1, 1)
    table = files.read_table(f"{tmp_path}/data/images.parquet").to_pylist()
    (copy,) = [row for row in table if row["status"] == "copy"]
    assert copy["image"].endswith("002_01.bmp")
    assert "900_01.bmp" in copy["message"]
