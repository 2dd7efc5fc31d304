"""What is uncertain is corrected and learned from; slides annotated only in part."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import serial
from several_files import write_mrxs

from medray import cli, open_mask
from medray.annotations.rasterize import rasterise
from medray.annotations.reading import read_annotation, read_extent
from medray.classes import Classes
from medray.datasets.ingest_slides import ingest
from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.errors import ConfigError
from medray.evaluation.evaluate_run import evaluate
from medray.evaluation.review_run import SIDE, review
from medray.geometry import Rectangle
from medray.inference.run import Options, layer_uri
from medray.models.config import Prediction
from medray.models.predict import Predictor
from medray.storage.yaml_config import write_settings
from medray.training.recipe import Recipe
from medray.training.sampler import Data
from medray.training.train_model import train

HEIGHT, WIDTH = 1700, 2500


@pytest.fixture(scope="module")
def folder(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides of two sizes and a run over them."""
    folder = tmp_path_factory.mktemp("review")
    for seed, (height, width) in enumerate([(HEIGHT, WIDTH), (1000, 1200)]):
        scene = draw_scene(seed, height=height, width=width)
        write_slide(folder / "slides", f"s{seed}", scene, layout="pyramid")
    prediction = Prediction(precision="float32", quality=True)
    predictor = Predictor.from_folders([str(model)], prediction)
    options = Options(prediction=prediction, region=1024)
    done = serial.infer(folder / "slides", predictor, model, folder / "run", options)
    assert (done.done, done.failed) == (2, {})
    return folder


def by_hand(run: Path) -> list[tuple[float, str, int, int]]:
    """Every square's mean uncertainty, the highest first."""
    found = []
    for slide in ("s0", "s1"):
        layer = np.asarray(open_mask(layer_uri(str(run), slide, "uncertainty")))
        for y in range(0, layer.shape[0], SIDE):
            for x in range(0, layer.shape[1], SIDE):
                mean = layer[y : y + SIDE, x : x + SIDE].mean() / 255
                found.append((mean, slide, y, x))
    return sorted(found, key=lambda one: -one[0])


def test_the_most_uncertain_squares_come_with_their_outlines(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["review", str(folder / "run"), "--out", str(out), "--count", "3"]
    assert cli.main(command) == 0
    assert "review: 3 squares" in capsys.readouterr().out
    squares = pd.read_parquet(out / "squares.parquet")
    wanted = by_hand(folder / "run")[:3]
    assert list(zip(squares["slide"], squares["y"], squares["x"], strict=True)) == [
        one[1:] for one in wanted
    ]
    assert list(squares["uncertainty"]) == pytest.approx([one[0] for one in wanted])

    for slide, mine in squares.groupby("slide"):
        mask = np.asarray(open_mask(str(folder / f"run/masks/{slide}.ome.zarr")))
        size = {"height": mask.shape[0], "width": mask.shape[1]}
        uri = str(out / f"{slide}.geojson")
        areas = read_annotation(uri, **size, classes=Classes())
        drawn = rasterise(areas, Classes(), y=0, x=0, **size)
        inside = np.zeros(mask.shape, bool)
        for square in mine.to_dict("records"):
            rows = slice(square["y"], square["y"] + square["height"])
            columns = slice(square["x"], square["x"] + square["width"])
            inside[rows, columns] = True
        np.testing.assert_array_equal(drawn, np.where(inside, mask, 0))
        extent = read_extent(uri, **size, classes=Classes())
        assert sum(area.polygon.area for area in extent) == inside.sum()
        for feature in json.loads(Path(uri).read_text())["features"]:
            properties = feature["properties"]
            assert properties["objectType"] == "annotation"
            locked = properties["classification"]["name"] == "Region*"
            assert properties.get("isLocked", False) == locked


def test_what_was_corrected_is_learned_from_and_nothing_else(
    folder: Path, tmp_path: Path
) -> None:
    review(str(folder / "run"), out=str(tmp_path / "review"), count=7)  # of 8
    squares = pd.read_parquet(tmp_path / "review" / "squares.parquet")
    data = tmp_path / "data"
    summary = ingest(
        [str(folder / "slides")],
        annotations=str(tmp_path / "review"),
        fractions=(0.5, 0.5, 0.0),
        out=str(data),
        executor="local",
    )
    assert summary.failed == {}
    patches = pd.read_parquet(data / "patches.parquet")
    assert set(patches["split"]) == {"train", "val"}
    places = set(zip(patches["slide"], patches["y"], patches["x"], strict=True))
    wanted = {
        (s["slide"], y, x)
        for s in squares.to_dict("records")
        for y in range(s["y"], s["y"] + s["height"], 512)
        for x in range(s["x"], s["x"] + s["width"], 512)
    }
    assert places == wanted
    slides = pd.read_parquet(data / "slides.parquet").set_index("slide")
    for slide, mine in squares.groupby("slide"):
        assert slides.loc[slide, "partly"]
        known = (mine["height"] * mine["width"]).sum()
        assert slides.loc[slide, ["px_background", "px_tumour"]].sum() == known

    recipe = tmp_path / "recipe.yaml"
    write_settings(str(recipe), Recipe(data=Data(crop=1024)))
    with pytest.raises(ConfigError, match="annotated only in part"):
        train(str(recipe), data=str(data), out=str(tmp_path / "model"))
    with pytest.raises(ConfigError, match="has a truth"):
        evaluate(str(folder / "run"), truth=str(data), out=str(tmp_path / "report"))


def test_only_what_is_annotated_counts(folder: Path, tmp_path: Path) -> None:
    """A mask's own outlines in some squares: right there, and nothing else counts."""
    review(str(folder / "run"), out=str(tmp_path / "review"), count=2)
    found = evaluate(
        str(folder / "run"),
        truth=str(tmp_path / "review"),
        out=str(tmp_path / "out"),
        executor="local",
    )
    assert found.f1 == 1.0
    squares = pd.read_parquet(tmp_path / "review" / "squares.parquet")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    known = (squares["height"] * squares["width"]).sum()
    assert np.sum(metrics["confusion"]) == known


def test_a_runs_own_outlines_are_right_on_a_slide_with_bounds(
    model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("openslide")
    pixels = draw_scene(3, height=1536, width=2048).pixels
    part = Rectangle(256, 768, 1024, 1024)
    write_mrxs(tmp_path / "slides" / "m.mrxs", pixels, scanned=part)
    prediction = Prediction(precision="float32", quality=True)
    predictor = Predictor.from_folders([str(model)], prediction)
    options = Options(prediction=prediction, region=1024, outlines=True)
    run = tmp_path / "run"
    serial.infer(tmp_path / "slides", predictor, model, run, options)
    found = evaluate(
        str(run),
        truth=str(run / "outlines"),
        out=str(tmp_path / "report"),
        executor="local",
    )
    assert (found.f1, found.failed) == (1.0, {})
    review(str(run), out=str(tmp_path / "review"), count=2)
    found = evaluate(
        str(run),
        truth=str(tmp_path / "review"),
        out=str(tmp_path / "squares"),
        executor="local",
    )
    assert (found.f1, found.failed) == (1.0, {})


def test_a_run_without_uncertainty_says_what_to_do(
    model: Path, slides: Path, tmp_path: Path
) -> None:
    prediction = Prediction(precision="float32")
    predictor = Predictor.from_folders([str(model)], prediction)
    options = Options(prediction=prediction, region=512)
    one = slides / "slides"
    serial.infer(one, predictor, model, tmp_path / "run", options)
    with pytest.raises(ConfigError, match="--quality"):
        review(str(tmp_path / "run"), out=str(tmp_path / "out"))
