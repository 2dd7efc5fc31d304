"""Measures of cells as a classifier's second input, from the table to the report."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import serial
import torch
from scipy.special import softmax

from medray.annotations.morphology import FEATURES, feature_names
from medray.apps.export import export
from medray.classes import Classes
from medray.datasets.dataset import read_morphology, read_patches
from medray.datasets.image_folder import ingest_images
from medray.datasets.synthetic_cells import generate_cells
from medray.errors import ConfigError
from medray.evaluation.evaluate_image_folder import evaluate_images
from medray.geometry import Windows
from medray.inference.classify_images import load_classifier
from medray.inference.infer_run import infer
from medray.models.config import Architecture, ModelConfig, Morphology
from medray.models.folder import load_model
from medray.models.network import Normalise
from medray.training.checkpoint import read_best
from medray.training.crops import Batch, read_val
from medray.training.recipe import Recipe, read_recipe
from medray.training.sampler import usable_patches
from medray.training.train_model import train
from medray.training.trainer import Trainer
from medray.training.world import World

RECIPE = """
model: {name: classifier, encoder: resnet10t, morphology: true}
window: {size: 64, stride: 64}
data: {crop: 64}
loss: {dice: 0.0, focal: 0.0, cross_entropy: 1.0}
optimizer: {lr: 2.0e-3}
schedule: {epochs: 3, phases: [{epochs: 2}, {train: adaptive, share: 0.5}]}
augment: {flips: true, brightness: 0.0, contrast: 0.0, saturation: 0.0, hue: 0.0}
batch: 12
precision: float32
"""
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("cells")
    generate_cells(folder / "cells", clusters=3, each=4)
    done = ingest_images(
        str(folder / "cells"),
        out=str(folder / "data"),
        side=64,
        fractions=(0.6, 0.2, 0.2),
        contours=True,
        executor="local",
    )
    assert (done.images, done.failed) == (60, {})
    return str(folder / "data")


@pytest.fixture(scope="module")
def classifier(dataset: str) -> str:
    folder = Path(dataset).parent
    (folder / "recipe.yaml").write_text(RECIPE)
    out = str(folder / "model")

    serial.train(read_recipe(str(folder / "recipe.yaml")), dataset, out)
    return out


def table_of(dataset: str) -> pd.DataFrame:
    """What the dataset measures, with the splits, read by other means."""
    images = pd.read_parquet(f"{dataset}/images.parquet").set_index("image")
    found = pd.read_parquet(f"{dataset}/morphology.parquet").set_index("image")
    return found.join(images["split"])


def test_training_images_alone_say_how_measures_are_standardised(
    dataset: str, classifier: str
) -> None:
    table = table_of(dataset)
    trained = table[table["split"] == "train"].drop(columns="split")
    how = load_model(classifier)[1].morphology
    assert how is not None
    assert how.names == tuple(trained.columns) == feature_names()
    np.testing.assert_allclose(how.mean, trained.mean(), rtol=1e-9)
    np.testing.assert_allclose(how.std, trained.std(ddof=0), rtol=1e-9)


def test_evaluation_feeds_a_model_as_training_did(
    dataset: str, classifier: str, tmp_path: Path
) -> None:
    """The same image and measures give the same logits; other measures, others."""
    # As training did: the trainer, with the weights that it kept.
    recipe = read_recipe(f"{Path(dataset).parent}/recipe.yaml")
    network, config = load_model(classifier)
    patches = usable_patches(dataset, "val", recipe.data)
    measures = read_morphology(dataset, patches)[1]
    model = Trainer(ALONE, recipe, config, 1, 1, {"val": measures}).model
    name = config.provenance["digest"].removeprefix("blake2b:")
    model.network.load_state_dict(read_best(classifier, name)["model"])
    batch = read_val(dataset, recipe.sampling, 2, 7)  # not from the first patch on
    beside = model.beside("val", batch)
    with torch.inference_mode():
        inputs = model.normalise(torch.from_numpy(batch.images.copy()))
        logits = model.arithmetic.forward(model.kept.eval(), inputs, *beside)
    trained = logits[:, :, 0, 0].softmax(dim=1).numpy()
    predicted, _ = model.predict(batch)
    np.testing.assert_array_equal(predicted[:, 0, 0], trained.argmax(axis=1))

    # As evaluation does, for the same images by their names.
    table = table_of(dataset).drop(columns="split")
    own = table.loc[[patches[i]["image"] for i in batch.patches]].to_numpy()
    classify = load_classifier(classifier)
    pixels = np.moveaxis(batch.images, 1, 3)
    found = softmax(classify(pixels, own), axis=1)
    np.testing.assert_allclose(found, trained, atol=2e-3)
    swapped = softmax(classify(pixels, own[::-1].copy()), axis=1)
    assert np.abs(swapped - trained).max() > 0.02

    # The report's numbers, by hand.
    found = evaluate_images(
        classifier, data=dataset, out=str(tmp_path / "report"), executor="local"
    )
    assert found.images == len(read_patches(dataset, "test"))
    lines = pd.read_csv(tmp_path / "report" / "images.csv").set_index("image")
    how = config.morphology
    standard = (table.loc[lines.index].to_numpy() - how.mean) / np.array(how.std)
    images = [
        pixels_of(dataset, row)
        for name in lines.index
        for row in read_patches(dataset, "test")
        if row["image"] == name
    ]
    with torch.inference_mode():
        wanted = network(
            Normalise(config)(torch.from_numpy(np.stack(images))),
            torch.tensor(standard, dtype=torch.float32),
        ).softmax(dim=1)
    shares = lines[[f"p_{name}" for name in config.classes.names]]
    np.testing.assert_allclose(shares.to_numpy(), wanted.numpy(), atol=2e-3)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert np.sum(metrics["confusion"]) == found.images


def pixels_of(dataset: str, row: dict) -> np.ndarray:
    import zarr

    sheet = zarr.open_array(f"{dataset}/slides/{row['slide']}.ome.zarr/0", mode="r")
    return np.asarray(sheet)[:, row["y"] : row["y"] + 64, row["x"] : row["x"] + 64]


def test_each_crop_learns_with_its_own_measures() -> None:
    """Equal pixels: only the measures of a crop's patch tell its class."""
    recipe = Recipe(
        model=Architecture("classifier", "resnet10t", morphology=True),
        window=Windows(32, 32),
        data=replace(Recipe().data, crop=32),
        loss=replace(Recipe().loss, dice=0.0, focal=0.0, cross_entropy=1.0),
        optimizer=replace(Recipe().optimizer, lr=0.02),
        precision="float32",
    )
    names = feature_names()
    model_config = ModelConfig(
        architecture=recipe.model,
        classes=Classes(("one", "other")),
        window=recipe.window,
        mpp=None,
        morphology=Morphology(names, (5.0,) * FEATURES, (2.0,) * FEATURES),
    )
    labels = np.arange(24) % 2
    measures = np.where(labels[:, None] == 1, 7.0, 3.0) * np.ones((24, FEATURES))
    trainer = Trainer(ALONE, recipe, model_config, 24, 100, {"train": measures})
    images = np.full((8, 3, 32, 32), 120, np.uint8)
    rng = np.random.default_rng(0)
    for _ in range(40):
        chosen = rng.permutation(24)[:8]
        masks = np.broadcast_to(labels[chosen][:, None, None], (8, 32, 32))
        batch = Batch(images, masks.astype(np.uint8), chosen, np.full((8, 2), 32), {})
        loss, failure = trainer.train_step([batch])
        assert failure is None
    assert loss < 0.2  # log(2) = 0.69 is what pixels alone can reach


def test_what_does_not_fit_is_refused(
    dataset: str, classifier: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    out = str(tmp_path / "out")
    other = str(tmp_path / "data")
    shutil.copytree(dataset, other)
    table = pd.read_parquet(f"{other}/morphology.parquet")
    microns = {name: name.replace("px", "um") for name in table.columns}
    table.rename(columns=microns).to_parquet(f"{other}/morphology.parquet")
    with pytest.raises(ConfigError, match="nucleus_area_um2") as caught:
        evaluate_images(classifier, data=other, out=out)
    assert "--mpp" in str(caught.value)
    Path(other, "morphology.parquet").unlink()
    for call in (
        lambda: train(str(path), data=other, out=out),
        lambda: evaluate_images(classifier, data=other, out=out),
    ):
        with pytest.raises(ConfigError, match="medray ingest --side PX --contours"):
            call()
    with pytest.raises(ConfigError, match="which slides do not have"):
        infer([f"{dataset}/slides"], model=classifier, out=out)
    with pytest.raises(ConfigError, match="no export has an input for"):
        export(classifier, format="pt2", out=out)
    with pytest.raises(ConfigError, match="unet has no .* morphology"):
        read_recipe(str(path), ["model.name=unet"])
