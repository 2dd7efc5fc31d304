"""Real fields from file to F1: see ../shared/data/INVENTORY.md for what they are."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from medray.datasets.ingest_slides import ingest
from medray.evaluation.evaluate_run import evaluate
from medray.geometry import Windows
from medray.inference.infer_run import infer
from medray.inference.run import Options
from medray.models.config import read_config
from medray.storage.yaml_config import write_settings
from medray.training.recipe import Recipe
from medray.training.sampler import Data
from medray.training.schedule import Schedule
from medray.training.train_model import train

pytestmark = pytest.mark.usefixtures("cluster")


def test_real_outlines_and_masks_make_the_same_dataset(
    shared_data: Path, tmp_path: Path
) -> None:
    fields = shared_data / "he_seg" / "bcss"
    shares = []
    for kind in ("svg", "masks"):
        out = tmp_path / kind
        summary = ingest(
            [str(fields / "images")],
            annotations=str(fields / kind),
            out=str(out),
            mpp=0.5,
        )
        assert (summary.done, summary.failed) == (2, {})
        rows = pq.read_table(out / "slides.parquet").to_pylist()
        shares.append([row["px_tumour"] for row in rows])
    assert shares[0] == pytest.approx(shares[1], rel=0.03)


def test_real_whole_slides_go_through_inference(
    shared_data: Path, model: Path, tmp_path: Path
) -> None:
    summary = infer(
        [str(shared_data / "wsi")], model=str(model), out=str(tmp_path / "run")
    )
    rows = pq.read_table(tmp_path / "run" / "slides.parquet").to_pylist()
    by_name = {row["slide"]: row for row in rows}
    assert by_name["CMU-1-Small-Region"]["status"] == "done"
    assert by_name["CMU-1-Small-Region.derived-pyramid"]["status"] == "done"
    # Without mpp in the file: taken as the model's, and said so.
    assert "--mpp" in by_name["TCGA-CR-7395-01A-01-TS1"]["note"]
    # 0.228 um per pixel: its level 1 is nearest to the model's 0.5.
    assert by_name["hamamatsu-test3-DAPI-387"]["level"] == 1
    assert summary.failed == {}


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("trained_here")
def test_nuclei_are_found_on_fields_never_seen(
    shared_data: Path, tmp_path: Path
) -> None:
    """Pixel F1 of at least 0.70 after a short training from random weights."""
    fields = tmp_path / "fields"
    shutil.copytree(shared_data / "nuclei_he" / "images", fields)
    data, model, run = (str(tmp_path / name) for name in ("data", "model", "run"))
    summary = ingest(
        [str(fields)],
        annotations=str(shared_data / "nuclei_he" / "instances"),
        classes=("background", "nucleus"),
        fractions=(0.7, 0.1, 0.2),
        out=data,
    )
    assert (summary.done, summary.failed) == (86, {})
    recipe = Recipe(
        window=Windows(256, 192),
        data=Data(crop=128, min_tissue=0.0),
        schedule=Schedule(epochs=2),
        scaling="zscore",
    )
    write_settings(str(tmp_path / "recipe.yaml"), recipe)
    training = train(str(tmp_path / "recipe.yaml"), data=data, out=model)
    assert read_config(model).zscore
    rows = pq.read_table(f"{data}/slides.parquet").to_pylist()
    unseen = [row["uri"] for row in rows if row["split"] == "test"]
    infer(unseen, model=model, out=run, options=Options(everywhere=True))
    result = evaluate(run, truth=data, out=str(tmp_path / "report"), split="test")
    print(f"F1 {result.f1} {result.interval}, trained {training.seconds:.0f} s")
    assert result.evaluated >= 15
    assert result.f1 is not None
    assert result.f1 >= 0.70
