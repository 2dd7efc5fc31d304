"""A run over a slide of which the scanner filled a part, and what is made of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serial
import serial_ingest
from several_files import write_mrxs

from medray import open_mask
from medray.annotations.rasterize import rasterise
from medray.annotations.reading import read_marks
from medray.classes import Classes
from medray.datasets.dataset import labels_uri
from medray.datasets.synthetic_scene import draw_scene
from medray.evaluation.ground_truth import read_truth
from medray.evaluation.review_run import review
from medray.geometry import Rectangle
from medray.inference.run import Options, mask_uri, outlines_uri
from medray.models.config import Prediction
from medray.models.predict import Predictor
from medray.storage import files, ome_zarr

pytest.importorskip("openslide")

HEIGHT, WIDTH = 1536, 2048
SIZE = {"height": HEIGHT, "width": WIDTH}
PART = Rectangle(256, 768, 1024, 1024)
CLASSES = Classes()
QUALITY = Prediction(precision="float32", quality=True)
OPTIONS = Options(region=1024, outlines=True, prediction=QUALITY)


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MRXS and a run over it."""
    folder = tmp_path_factory.mktemp("bounds")
    scene = draw_scene(3, height=HEIGHT, width=WIDTH)
    write_mrxs(folder / "slides" / "m.mrxs", scene.pixels, scanned=PART)
    predictor = Predictor.from_folders([str(model)], QUALITY)
    source = folder / "slides"
    done = serial.infer(source, predictor, model, folder / "run", OPTIONS)
    assert (done.done, done.failed) == (1, {})
    return folder


def mask_of(folder: Path, run: str = "run") -> np.ndarray:
    return np.asarray(open_mask(mask_uri(str(folder / run), "m")))


def row_of(folder: Path, run: str = "run") -> dict[str, Any]:
    (row,) = files.read_table(str(folder / run / "slides.parquet")).to_pylist()
    return row


def test_outlines_are_the_mask_and_lie_in_what_qupath_shows(folder: Path) -> None:
    mask, uri = mask_of(folder), outlines_uri(str(folder / "run"), "m")
    assert 0.01 < (mask > 0).mean() < 0.99
    slide = str(folder / "slides" / "m.mrxs")
    found = read_marks(uri, **SIZE, classes=CLASSES, slide=slide)
    labels = rasterise(found.areas, CLASSES, y=0, x=0, **SIZE)
    np.testing.assert_array_equal(labels, mask)
    row = row_of(folder) | {"truth": uri, "kind": "annotation"}
    whole = Rectangle(0, 0, HEIGHT, WIDTH)
    np.testing.assert_array_equal(read_truth(row, whole, CLASSES), mask)
    features = json.loads(files.read_bytes(uri))["features"]
    rings = [np.array(f["geometry"]["coordinates"][0]) for f in features]
    x, y = np.concatenate(rings).max(axis=0)
    assert mask[PART.slices()].any()
    rows, columns = np.nonzero(mask)
    assert (y, x) == (rows.max() + 1 - PART.y, columns.max() + 1 - PART.x)


def test_what_was_corrected_is_ingested_where_it_was(
    folder: Path, tmp_path: Path
) -> None:
    review(str(folder / "run"), out=str(tmp_path / "review"), count=2)
    uri = tmp_path / "review" / "m.geojson"
    squares = files.read_table(str(tmp_path / "review" / "squares.parquet")).to_pylist()
    slide = str(folder / "slides" / "m.mrxs")
    extent = read_extent_of(uri, slide)
    inside = np.zeros((HEIGHT, WIDTH), bool)
    for square in squares:
        rows = slice(square["y"], square["y"] + square["height"])
        inside[rows, square["x"] : square["x"] + square["width"]] = True
    np.testing.assert_array_equal(extent, inside)
    # Corrected: an object more, next to the corner of what QuPath shows of the slide.
    document = json.loads(uri.read_text())
    ring = [[6, 4], [56, 4], [56, 34], [6, 34], [6, 4]]
    document["features"].append(
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {
                "objectType": "annotation",
                "classification": {"name": "tumour"},
            },
        }
    )
    uri.write_text(json.dumps(document))
    wanted = np.where(inside, mask_of(folder), 0)
    wanted[PART.y + 4 : PART.y + 34, PART.x + 6 : PART.x + 56] = 1
    out = tmp_path / "data"
    rows = serial_ingest.ingest(folder / "slides", out, tmp_path / "review")
    assert rows["m"]["status"] == "done"
    labels = np.asarray(ome_zarr.open_level(labels_uri(str(out), "m")))
    np.testing.assert_array_equal(labels, wanted)
    patches = files.read_table(str(out / "patches.parquet")).to_pylist()
    assert {(p["y"], p["x"]) for p in patches} <= {
        (y, x)
        for s in squares
        for y in range(s["y"], s["y"] + s["height"], 512)
        for x in range(s["x"], s["x"] + s["width"], 512)
    }


def read_extent_of(uri: Path, slide: str) -> np.ndarray:
    found = read_marks(str(uri), **SIZE, classes=CLASSES, slide=slide)
    return rasterise(
        [*found.extent], Classes(("background", "Region*")), y=0, x=0, **SIZE
    ).astype(bool)


def test_a_run_within_the_outlines_of_another(
    folder: Path, model: Path, tmp_path: Path
) -> None:
    within = tmp_path / "within"
    within.mkdir()
    shutil.copy(outlines_uri(str(folder / "run"), "m"), within / "m.geojson")
    predictor = Predictor.from_folders([str(model)], QUALITY)
    options = Options(region=1024, prediction=QUALITY, within=str(within))
    done = serial.infer(folder / "slides", predictor, model, tmp_path / "run", options)
    assert (done.done, done.failed) == (1, {})
    # Looked at where there is something, all of it is found again.
    np.testing.assert_array_equal(mask_of(tmp_path), mask_of(folder))
    assert row_of(tmp_path)["predicted_px"] == (mask_of(folder) > 0).sum()


def test_a_slide_that_is_gone_cannot_be_reviewed(folder: Path, tmp_path: Path) -> None:
    """Without its bounds the place of the squares in QuPath is unknown."""
    shutil.copytree(folder / "run", tmp_path / "run")
    table = files.read_table(str(tmp_path / "run" / "slides.parquet"))
    gone = str(tmp_path / "gone.mrxs")
    moved = table.set_column(table.column_names.index("uri"), "uri", [[gone]])
    files.write_table(str(tmp_path / "run" / "slides.parquet"), moved)
    found = review(str(tmp_path / "run"), out=str(tmp_path / "review"))
    assert (found.squares, list(found.failed)) == (0, ["m"])
    assert "gone.mrxs: is not there, and its bounds" in found.failed["m"]
