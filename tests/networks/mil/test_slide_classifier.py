"""A classifier over slides: patch labels of annotations, heat maps, slide labels."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import serial

from medray.evaluation.evaluate_run import evaluate
from medray.inference.infer_run import infer
from medray.inference.run import Options, probabilities_uri
from medray.models.config import Prediction
from medray.storage import ome_zarr
from medray.training.recipe import read_recipe

RECIPE = """
model: {name: classifier, encoder: resnet10t}
window: {size: 64, stride: 64}
data: {crop: 64, samples: 192, balance: true}
loss: {dice: 0.0, focal: 0.0, cross_entropy: 1.0}
optimizer: {lr: 2.0e-3}
schedule: {epochs: 4}
batch: 16
precision: float32
"""


def test_a_classifier_goes_from_annotated_slides_to_heat_maps_and_labels(
    training_data: str, slides: Path, tmp_path: Path
) -> None:
    path, model, run = tmp_path / "recipe.yaml", tmp_path / "model", tmp_path / "run"
    path.write_text(RECIPE)

    serial.train(read_recipe(str(path)), training_data, str(model))
    how = Prediction(precision="float32", probabilities=True)
    done = infer(
        [str(slides / "slides")],
        model=str(model),
        out=str(run),
        options=Options(everywhere=True, prediction=how),
        executor="local",
    )
    assert (done.done, done.failed) == (4, {})
    for row in pq.read_table(run / "slides.parquet").to_pylist():
        heat = ome_zarr.open_level(probabilities_uri(str(run), row["slide"]))[...]
        for channel, name in zip(heat, ("background", "tumour"), strict=True):
            assert row[f"mean_p_{name}"] == pytest.approx(channel.mean() / 255)
            assert row[f"max_p_{name}"] == channel.max() / 255
        shares = row["px_background"], row["px_tumour"]
        assert row["label"] == ("background", "tumour")[int(np.argmax(shares))]
        # A patch has one answer.
        patch = heat[:, 64:128, 128:192]
        assert (patch == patch[:, :1, :1]).all()
    report = tmp_path / "report"
    evaluate(str(run), truth=training_data, out=str(report), executor="local")
    metrics = json.loads((report / "metrics.json").read_text())
    assert [row["class"] for row in metrics["per_class"]] == ["background", "tumour"]
