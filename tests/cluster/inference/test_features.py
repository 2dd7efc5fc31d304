"""What may be asked of a run, each against the plain run of the same slides."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import serial
import tifffile
import torch
from scipy import ndimage

from medray.annotations.rasterize import rasterise
from medray.annotations.reading import read_annotation
from medray.datasets.synthetic_scene import draw_scene
from medray.geometry import Rectangle, region_windows
from medray.inference.infer_run import infer
from medray.inference.postprocess import Cleaning, clean_labels
from medray.inference.run import (
    Options,
    layer_uri,
    mask_uri,
    outlines_uri,
    probabilities_uri,
)
from medray.models.canvas import RegionPixels
from medray.models.config import Architecture, Prediction, read_config
from medray.models.folder import load_model, save_model
from medray.models.predict import Predictor
from medray.slides.opening import open_slide
from medray.storage import ome_zarr
from medray.storage.files import read_table
from medray.storage.yaml_config import write_settings

pytestmark = pytest.mark.usefixtures("cluster")
SIZE = (1100, 1400)
HOW = Prediction(precision="float32")


def write(path: Path, pixels: np.ndarray, mpp: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    resolution = (1e4 / mpp, 1e4 / mpp)
    tifffile.imwrite(
        path,
        pixels,
        tile=(256, 256),
        photometric="rgb",
        compression="deflate",
        resolution=resolution,
        resolutionunit="CENTIMETER",
        metadata=None,
    )


def run(
    slides: Path, model: Any, out: Path, *, on_ray: bool = False, **asked: Any
) -> dict[str, Any]:
    """Infer, on Ray or by the plain loop, and give the row of slide `s`."""
    options = Options(**({"prediction": HOW, "region": 512} | asked))
    if on_ray:
        summary: Any = infer([str(slides)], model=model, out=str(out), options=options)
    else:
        predictor = Predictor.from_folders([model], options.prediction)
        summary = serial.infer(slides, predictor, model, out, options)
    assert summary.failed == {}
    rows = read_table(str(out / "slides.parquet")).to_pylist()
    return next(row for row in rows if row["slide"] == "s")


def mask_of(out: Path, level: int = 0) -> np.ndarray:
    return np.asarray(ome_zarr.open_level(mask_uri(str(out), "s"), level)[:])


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    scene = draw_scene(4, height=SIZE[0], width=SIZE[1], tumour=True)
    write(folder / "s.tif", scene.pixels, 0.5)
    return folder


@pytest.fixture(scope="module")
def plain(slides: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("plain")
    run(slides, str(model), out, everywhere=True)
    return mask_of(out)


def predict(slides: Path, models: list[str], how: Prediction) -> Any:
    """Predict the slide in this process, as one region."""
    with open_slide(slides / "s.tif") as slide:
        pixels = slide.read(0, 0, *SIZE)
    predictor = Predictor.from_folders(models, how)
    windows = predictor.config.window
    plan = region_windows(Rectangle(0, 0, *SIZE), *SIZE, windows, how.stitch)
    (result,) = predictor.predict([RegionPixels(pixels, plan, *SIZE)])
    return result


def test_a_run_with_everything(
    slides: Path, model: Path, tmp_path: Path, plain: np.ndarray
) -> None:
    """Two models, flips, quality, probabilities, cleaning and outlines at once."""
    torch.manual_seed(8)
    other = str(tmp_path / "other")
    network, config = load_model(str(model))
    for weights in network.parameters():
        weights.data += 0.05 * torch.randn(weights.shape) * weights.data.abs().mean()
    save_model(other, config, network, {})
    how = Prediction(precision="float32", tta="flips", probabilities=True, quality=True)
    clean = Cleaning(smooth=1, holes=40, smallest=40)
    models, out = [str(model), other], tmp_path / "run"
    row = run(
        slides,
        models,
        out,
        on_ray=True,
        prediction=how,
        clean=clean,
        outlines=True,
        everywhere=True,
    )
    alone = predict(slides, models, how)
    mask = mask_of(out)
    assert (alone.labels != plain).mean() > 0.001  # the second model has its say
    np.testing.assert_array_equal(mask, clean_labels(alone.labels, clean, 2))
    assert (mask != alone.labels).any()
    counts = np.bincount(mask.ravel(), minlength=2)
    assert [row["px_background"], row["px_tumour"]] == counts.tolist()
    assert not (out / "raw" / "s.ome.zarr").exists()
    for level in (1, 2):
        assert mask_of(out, level).shape == tuple(-(-n // 2**level) for n in SIZE)

    stored = ome_zarr.open_level(probabilities_uri(str(out), "s"))[:]
    np.testing.assert_array_equal(stored, alone.probabilities)
    for layer, most in (("uncertainty", 255), ("disagreement", 1)):
        values = np.asarray(ome_zarr.open_level(layer_uri(str(out), "s", layer))[:])
        assert values.any()
        assert row[layer] == pytest.approx(values.mean() / most)
    uncertainty = ome_zarr.open_level(layer_uri(str(out), "s", "uncertainty"))[:]
    np.testing.assert_array_equal(uncertainty, alone.uncertainty)

    outlines = outlines_uri(str(out), "s")
    areas = read_annotation(
        outlines, height=SIZE[0], width=SIZE[1], classes=config.classes
    )
    drawn = rasterise(areas, config.classes, y=0, x=0, height=SIZE[0], width=SIZE[1])
    np.testing.assert_array_equal(drawn, mask)


def test_a_finer_slide_is_averaged_down(
    slides: Path, model: Path, tmp_path: Path, plain: np.ndarray
) -> None:
    with open_slide(slides / "s.tif") as slide:
        pixels = slide.read(0, 0, *SIZE)
    write(tmp_path / "in" / "s.tif", pixels.repeat(2, 0).repeat(2, 1), 0.25)
    row = run(tmp_path / "in", str(model), tmp_path / "run", everywhere=True)
    assert (row["mpp"], row["scale"], row["downsample"]) == (0.5, 2.0, 2.0)
    assert "averaged down" in row["note"]
    np.testing.assert_array_equal(mask_of(tmp_path / "run"), plain)


def test_only_within_an_annotation(
    slides: Path, model: Path, tmp_path: Path, plain: np.ndarray
) -> None:
    ring = [[100, 150], [700, 150], [700, 600], [100, 600], [100, 150]]
    # A small place amid foreground that the annotation leaves out.
    amid = ndimage.minimum_filter(plain, 25)[200:550, 150:650]
    y, x = (int(n[0]) for n in np.nonzero(amid))
    y, x = y + 200, x + 150
    left_out = [[x, y], [x + 8, y], [x + 8, y + 6], [x, y + 6], [x, y]]
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "s.geojson").write_text(
        '{"type": "Feature", "properties": {}, "geometry": '
        f'{{"type": "Polygon", "coordinates": [{ring}, {left_out}]}}}}'
    )
    row = run(slides, str(model), tmp_path / "run", within=str(notes), everywhere=True)
    inside = np.zeros(SIZE, bool)
    inside[150:600, 100:700] = True
    inside[y : y + 6, x : x + 8] = False
    expected = np.where(inside, plain, 0)
    np.testing.assert_array_equal(mask_of(tmp_path / "run"), expected)
    assert row["windows"] < 15 * 12
    # Cleaning neither grows past the area nor fills what it leaves out.
    clean = Cleaning(smooth=1, holes=200)
    out = tmp_path / "cleaned"
    run(slides, str(model), out, within=str(notes), everywhere=True, clean=clean)
    cleaned = clean_labels(expected, clean, 2)
    assert cleaned[~inside].any()
    np.testing.assert_array_equal(mask_of(out), np.where(inside, cleaned, 0))
    # Another annotation is another request: the same command does the slide again.
    smaller = [[100, 150], [400, 150], [400, 600], [100, 600], [100, 150]]
    (notes / "s.geojson").write_text(
        '{"type": "Feature", "properties": {}, "geometry": '
        f'{{"type": "Polygon", "coordinates": [{smaller}]}}}}'
    )
    out = tmp_path / "run"
    run(slides, str(model), out, within=str(notes), everywhere=True)
    inside = np.zeros(SIZE, bool)
    inside[150:600, 100:400] = True
    np.testing.assert_array_equal(mask_of(out), np.where(inside, plain, 0))


def test_coarse_to_fine_predicts_less_and_the_same(
    slides: Path, model: Path, tmp_path: Path, plain: np.ndarray
) -> None:
    # Of a random model's first pass anything may come, but never other classes.
    run(slides, str(model), tmp_path / "run", on_ray=True, coarse=2, everywhere=True)
    mask = mask_of(tmp_path / "run")
    first = np.asarray(
        ome_zarr.open_level(mask_uri(str(tmp_path / "run" / "coarse"), "s"))[:]
    )
    assert first.shape == tuple(n // 2 for n in SIZE)
    found = np.add.reduceat(
        np.add.reduceat(first.astype(int), range(0, SIZE[0] // 2, 256), 0),
        range(0, SIZE[1] // 2, 256),
        1,
    ).astype(bool)
    for y, x in np.argwhere(found):
        block = (slice(512 * y, 512 * y + 512), slice(512 * x, 512 * x + 512))
        np.testing.assert_array_equal(mask[block], plain[block])
    assert ((mask == plain) | (mask == 0)).all()


def test_a_classifier_gives_a_heat_map_and_a_label(
    slides: Path, model: Path, tmp_path: Path
) -> None:
    from medray.models.classifiers import build_classifier

    torch.manual_seed(1)
    architecture = Architecture("classifier", "resnet18")
    config = read_config(str(model))
    folder = str(tmp_path / "classifier")
    save_model(folder, config, build_classifier(architecture, 2), {})
    import dataclasses

    config = dataclasses.replace(config, architecture=architecture)
    write_settings(f"{folder}/model.yaml", config)
    how = Prediction(precision="float32", probabilities=True)
    out = tmp_path / "run"
    row = run(slides, folder, out, prediction=how, everywhere=True)
    mask = mask_of(out)
    heat = np.asarray(ome_zarr.open_level(probabilities_uri(str(out), "s"))[:])
    assert heat.shape == (2, *SIZE)
    # A window has one answer: it is constant over the window's core.
    core = heat[:, 112:208, 112:208]
    assert (core == core[:, :1, :1]).all()
    share = np.bincount(mask.ravel(), minlength=2)
    assert row["label"] == config.classes.names[int(share.argmax())]
    for channel, name in zip(heat, config.classes.names, strict=True):
        assert row[f"mean_p_{name}"] == pytest.approx(channel.mean() / 255)
        assert row[f"max_p_{name}"] == channel.max() / 255
