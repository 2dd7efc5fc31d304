"""Copies of masks and datasets for other viewers hold the same pixels."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import ome_zarr_models
import openslide
import pyarrow as pa
import pytest
import tifffile
import zarr
from PIL import Image

from medray import cli, open_mask
from medray.apps.convert import convert
from medray.datasets.ingest_slides import ingest
from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import ConfigError
from medray.inference.run import LAYERS, layer_uri
from medray.slides.opening import open_slide
from medray.storage import ome_zarr

SIZES = {"s0": (1500, 2200), "s1": (700, 800), "s2": (600, 900)}


@pytest.fixture
def folder(layered: Path) -> Path:
    return layered


def mask_of(folder: Path, slide: str) -> Any:
    return np.asarray(open_mask(str(folder / f"run/masks/{slide}.ome.zarr")))


def levels_of(group: Any) -> list[Any]:
    scales = group.attrs.asdict()
    scales = scales.get("ome", scales)["multiscales"][0]
    return [np.asarray(group[one["path"]][:]) for one in scales["datasets"]]


def test_a_mask_tells_the_area_of_its_classes(folder: Path) -> None:
    for slide in SIZES:
        group = zarr.open_group(folder / f"run/masks/{slide}.ome.zarr", mode="r")
        ome: Any = group.attrs["ome"]
        counts = np.bincount(mask_of(folder, slide).ravel(), minlength=2)
        assert [
            (one["label-value"], one["class"], one["area_px"], one["area_um2"])
            for one in ome["image-label"]["properties"]
        ] == [
            (value, name, counts[value], counts[value] / 4)  # 0.5 um a pixel
            for value, name in enumerate(("background", "tumour"))
        ]


@pytest.mark.parametrize("to", ["ome-zarr", "ome-zarr-0.4"])
def test_image_and_masks_lie_in_one_group(
    folder: Path, tmp_path: Path, to: str
) -> None:
    command = ["convert", str(folder / "run"), "--to", to, "--with-image"]
    command += ["--executor", "local"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    for slide in SIZES:
        group: Any = zarr.open_group(tmp_path / f"{slide}.ome.zarr", mode="r")
        assert group.metadata.zarr_format == (3 if to == "ome-zarr" else 2)
        opened: Any = ome_zarr_models.open_ome_zarr(group)
        version = opened.ome_zarr_version
        assert (type(opened).__name__, version) == ("Image", to[9:] or "0.5")
        assert opened.labels is not None

        with open_slide(folder / "slides" / f"{slide}.tif") as whole:
            pixels = whole.read(0, 0, *SIZES[slide]).transpose(2, 0, 1)
        image = levels_of(group)
        np.testing.assert_array_equal(image[0], pixels)
        np.testing.assert_array_equal(image[1], ome_zarr.halved(pixels))

        for name in ("mask", *LAYERS):
            labels: Any = group[f"labels/{name}"]
            model = ome_zarr_models.open_ome_zarr(labels)
            assert type(model).__name__ == "ImageLabel"
            uri = str(folder / f"run/masks/{slide}.ome.zarr")
            if name != "mask":
                uri = layer_uri(str(folder / "run"), slide, name)
            for level, found in enumerate(levels_of(labels)):
                np.testing.assert_array_equal(found, open_mask(uri, level))
                assert found.shape == image[level].shape[1:]


def test_tiffs_open_as_pyramids_of_the_mask(folder: Path, tmp_path: Path) -> None:
    for to in ("ome-tiff", "tiff"):
        summary = convert(
            str(folder / "run"), to=to, out=str(tmp_path / to), executor="local"
        )  # type: ignore[arg-type]
        assert (summary.done, summary.failed) == (3, {})
    for slide, size in SIZES.items():
        uri = str(folder / f"run/masks/{slide}.ome.zarr")
        shapes = ome_zarr.level_shapes(*size)
        with tifffile.TiffFile(tmp_path / "ome-tiff" / f"{slide}.ome.tif") as tiff:
            assert tiff.ome_metadata is not None
            assert '<M K="1">tumour</M>' in tiff.ome_metadata
            assert 'PhysicalSizeX="0.5"' in tiff.ome_metadata
            (series,) = tiff.series
            assert [level.shape for level in series.levels] == shapes
            for number, level in enumerate(series.levels):
                np.testing.assert_array_equal(level.asarray(), open_mask(uri, number))
        other = openslide.OpenSlide(tmp_path / "tiff" / f"{slide}.tif")
        assert [*other.level_dimensions] == [(w, h) for h, w in shapes]
        assert float(other.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        for number, (height, width) in enumerate(shapes):
            read = np.asarray(other.read_region((0, 0), number, (width, height)))
            np.testing.assert_array_equal(read[..., 0], open_mask(uri, number))


def test_a_dataset_in_the_older_version(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    truth = np.zeros(SIZES["s1"], np.uint8)
    truth[100:300, 50:200] = 1
    Image.fromarray(truth).save(annotations / "s1.png")
    slide = str(folder / "slides" / "s1.tif")
    ingest([slide], annotations=str(annotations), out=str(data), executor="local")
    out = str(tmp_path / "out")
    assert convert(str(data), to="ome-zarr-0.4", out=out, executor="local").done == 1
    group: Any = zarr.open_group(f"{out}/s1.ome.zarr", mode="r")
    assert type(ome_zarr_models.open_ome_zarr(group)).__name__ == "Image"
    stored = open_mask(str(data / "slides/s1.ome.zarr"))
    np.testing.assert_array_equal(group["0"][:], stored)
    np.testing.assert_array_equal(group["labels/annotation/0"][:], truth)


def test_only_what_is_missing_or_has_changed_is_made(
    folder: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(folder / "run", run)
    assert convert(str(run), to="tiff", out=str(out), executor="local").done == 3
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tif")}
    again = convert(str(run), to="tiff", out=str(out), executor="local")
    assert (again.done, again.skipped) == (0, 3)
    (out / "s1.tif").unlink()
    again = convert(str(run), to="tiff", out=str(out), executor="local")
    assert (again.done, again.skipped) == (1, 2)
    assert (out / "s0.tif").stat().st_mtime_ns == before[out / "s0.tif"]
    with pytest.raises(ConfigError, match="to: tiff -> ome-tiff"):
        convert(str(run), to="ome-tiff", out=str(out), executor="local")


def test_what_is_wrong_costs_one_slide(folder: Path, tmp_path: Path) -> None:
    run, slides = tmp_path / "run", tmp_path / "slides"
    shutil.copytree(folder / "run", run)
    shutil.copytree(folder / "slides", slides)
    table = ome_zarr.files.read_table(str(run / "slides.parquet")).to_pylist()
    for row in table:
        row["uri"] = str(slides / f"{row['slide']}.tif")
    ome_zarr.files.write_table(str(run / "slides.parquet"), pa.Table.from_pylist(table))
    write_slide(slides, "s0", draw_scene(9, height=1500, width=2200))
    out = tmp_path / "out"
    found = convert(
        str(run), to="ome-zarr", out=str(out), with_image=True, executor="local"
    )
    assert found.done == 2
    assert "is not the file that the mask was made of" in found.failed["s0"]
    assert not (out / "s0.ome.zarr").exists()
    shutil.copy(folder / "slides" / "s0.tif", slides / "s0.tif")
    shard = next((run / "masks" / "s1.ome.zarr" / "0").rglob("c/*/*"))
    shard.write_bytes(shard.read_bytes()[:100])
    found = convert(str(run), to="tiff", out=str(tmp_path / "tiff"), executor="local")
    assert (found.done, [*found.failed]) == (2, ["s1"])
    assert "damaged" in found.failed["s1"]
    found = convert(
        str(run), to="ome-zarr-0.4", out=str(tmp_path / "old"), executor="local"
    )
    assert [*found.failed] == ["s1"]
    assert not (tmp_path / "old" / "s1.ome.zarr").exists()
    left = sorted(path.name for path in (tmp_path / "tiff").iterdir())
    assert left == ["convert.yaml", "s0.tif", "s2.tif", "slides.parquet"]


def test_wrong_requests_say_what_to_do(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*words: str) -> str:
        assert cli.main(["convert", *words, "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    run = str(folder / "run")
    with pytest.raises(SystemExit):
        asked(run, "--to", "png")
    assert 'Choose from: "ome-zarr", "ome-zarr-0.4"' in capsys.readouterr().err
    with pytest.raises(ConfigError, match="expected one of ome-zarr, ome-zarr-0.4"):
        convert(run, to="png", out=str(tmp_path / "out"))
    assert "leave --with-image away" in asked(run, "--to", "tiff", "--with-image")
    assert "add --with-image" in asked(run, "--to", "ome-zarr")
    assert "expected a dataset" in asked(str(tmp_path), "--to", "tiff")
    assert not (tmp_path / "out").exists()
