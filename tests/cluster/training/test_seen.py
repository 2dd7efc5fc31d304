"""What a training has seen goes along: with the model, its runs and their reports."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import serial

import medray
from medray.datasets.ingest_slides import ingest
from medray.errors import ConfigError
from medray.evaluation.evaluate_run import Evaluation, evaluate
from medray.inference.run import Options
from medray.models.config import Architecture
from medray.models.seen import read_seen
from medray.slides.fingerprint import slide_digest
from medray.training.recipe import Recipe
from medray.training.sampler import Data
from medray.training.schedule import Schedule

RECIPE = Recipe(
    model=Architecture("unet", "tu-test_resnet"),
    data=Data(crop=64, samples=8),
    batch=4,
    schedule=Schedule(epochs=3),
    precision="float32",
)
SPLITS = {0: "train", 1: "test", 2: "train", 3: "val"}


def name(number: int) -> str:
    return f"slide_{number:03d}"


def ingest_all(folder: Path) -> None:
    lines = ["slide,split", *(f"{name(n)},{split}" for n, split in SPLITS.items())]
    (folder / "splits.csv").write_text("\n".join(lines))
    done = ingest(
        [str(folder / "slides")],
        annotations=str(folder / "annotations"),
        splits=str(folder / "splits.csv"),
        out=str(folder / "data"),
        executor="local",
    )
    assert done.failed == {}


@pytest.fixture(scope="module")
def trained(
    cluster: None, slides: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Slides, a dataset whose validation slide has no tumour, and a model of it."""
    folder = tmp_path_factory.mktemp("trained")
    for part in ("slides", "annotations"):
        shutil.copytree(slides / part, folder / part)
    (folder / "annotations" / f"{name(3)}.svg").unlink()
    nothing = '{"type": "FeatureCollection", "features": []}'
    (folder / "annotations" / f"{name(3)}.geojson").write_text(nothing)
    ingest_all(folder)
    serial.train(RECIPE, str(folder / "data"), str(folder / "model"))
    return folder


def test_the_least_loss_is_kept_and_said_where_validation_has_no_tumour(
    trained: Path,
) -> None:
    metrics = json.loads((trained / "model" / "metrics.json").read_text())
    losses = [entry["val_loss"] for entry in metrics["history"]]
    assert metrics["epoch"] == losses.index(min(losses))
    (said,) = metrics["warnings"]
    assert "split val holds nothing of tumour" in said
    assert "least validation loss" in (trained / "model" / "training.html").read_text()


def evaluation(
    trained: Path, to: Path, *slides: Path, truth: str = "annotations"
) -> Evaluation:
    medray.infer(
        [str(slide) for slide in slides],
        model=str(trained / "model"),
        out=str(to / "run"),
        options=Options(everywhere=True),
        executor="local",
    )
    return evaluate(
        str(to / "run"),
        truth=str(trained / truth),
        out=str(to / "report"),
        executor="local",
    )


def test_a_report_says_which_slides_the_model_has_seen(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the bytes of the scans, whatever they are called now."""
    renamed = tmp_path / "renamed"
    renamed.mkdir()
    (tmp_path / "truth").mkdir()
    for number in SPLITS:
        shutil.copy(
            trained / "slides" / f"{name(number)}.tif", renamed / f"{number}.tif"
        )
    seen = read_seen(str(trained / "model"))
    assert seen == {
        slide_digest(str(renamed / f"{n}.tif")): split
        for n, split in SPLITS.items()
        if split != "test"
    }
    found = evaluation(trained, tmp_path, trained / "slides")
    assert found.seen is not None
    assert (found.seen.train, found.seen.val) == ([name(0), name(2)], [name(3)])
    words = "2 of these slides trained the model and 1 of these slides chose the epoch"
    page = (tmp_path / "report" / "report.html").read_text()
    for text in (str(found), caplog.text, page):
        assert words in text
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["unseen"]["slides"] == 1
    assert metrics["unseen"]["f1"] == found.unseen_f1
    # The same report again says the same.
    again = evaluation(trained, tmp_path, trained / "slides")
    assert again == found


def test_what_was_inferred_on_the_dataset_itself_is_known_too(
    trained: Path, tmp_path: Path
) -> None:
    for number, truth in enumerate(("data", "annotations")):
        to = tmp_path / truth
        found = evaluation(trained, to, trained / "data", truth=truth)
        assert found.seen is not None, number
        assert (found.seen.train, found.seen.val) == ([name(0), name(2)], [name(3)])
        metrics = json.loads((to / "report" / "metrics.json").read_text())
        expected = "1 of test, 2 of train, 1 of val, nobody said of which patients"
        said = "nobody said of which patients" if number else expected
        assert metrics["provenance"]["slides"] == said


def test_slides_that_are_new_to_the_model_need_no_warning(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = evaluation(trained, tmp_path, trained / "slides" / f"{name(1)}.tif")
    assert found.seen is not None
    assert (found.seen.train, found.seen.val, found.unseen_f1) == ([], [], None)
    assert "seen" not in str(found)
    assert "trained the model" not in caplog.text
    assert "None of these slides" in (tmp_path / "report" / "report.html").read_text()


def test_what_a_model_does_not_tell_is_not_taken_for_unseen(
    trained: Path, model: Path, tmp_path: Path
) -> None:
    """Random weights of the tests, as an older medray left them: without seen.txt."""
    medray.infer(
        [str(trained / "slides")],
        model=[str(model)],
        out=str(tmp_path / "run"),
        executor="local",
    )
    found = evaluate(
        str(tmp_path / "run"),
        truth=str(trained / "data"),
        out=str(tmp_path / "report"),
        executor="local",
    )
    assert found.seen is None
    assert "is not known" in (tmp_path / "report" / "report.html").read_text()


@pytest.mark.parametrize("what", ["scan", "outline"])
def test_a_dataset_of_other_pixels_or_outlines_is_another_one(
    what: str, trained: Path, tmp_path: Path
) -> None:
    """With as many pixels of each class, so that the table of patches says nothing."""
    for part in ("slides", "annotations", "model"):
        shutil.copytree(trained / part, tmp_path / part)
    ingest_all(tmp_path)
    data, out = str(tmp_path / "data"), tmp_path / "model"
    # The same scans and outlines elsewhere are the same dataset.
    assert not serial.train(RECIPE, data, str(out)).trained
    patches = (tmp_path / "data" / "patches.parquet").read_bytes()
    if what == "scan":
        with (tmp_path / "slides" / f"{name(0)}.tif").open("ab") as file:
            file.write(b"another scan")
    else:
        outline = tmp_path / "annotations" / f"{name(0)}.svg"
        outline.write_text(outline.read_text().replace("</svg>", "<!-- --></svg>"))
    ingest_all(tmp_path)
    assert (tmp_path / "data" / "patches.parquet").read_bytes() == patches
    with pytest.raises(ConfigError, match="another recipe or dataset"):
        serial.train(RECIPE, data, str(out))
    # An interrupted training of it does not go on with the new pixels either.
    (out / "model.yaml").unlink()
    with pytest.raises(ConfigError, match="interrupted training of another"):
        serial.train(RECIPE, data, str(out))


def test_what_other_weights_have_learned_from_comes_along(
    trained: Path, tmp_path: Path
) -> None:
    """A training of other slides that starts from a model: its slides are no test."""
    folder = tmp_path / "student"
    for part in ("slides", "annotations"):
        shutil.copytree(trained / part, folder / part)
    for number in (0, 2):
        (folder / "slides" / f"{name(number)}.tif").unlink()
        (folder / "annotations" / f"{name(number)}.svg").unlink()
    (folder / "splits.csv").write_text(f"slide,split\n{name(1)},train\n{name(3)},val\n")
    ingest(
        [str(folder / "slides")],
        annotations=str(folder / "annotations"),
        splits=str(folder / "splits.csv"),
        out=str(folder / "data"),
        executor="local",
    )
    model = folder / "model"
    recipe = replace(
        RECIPE,
        schedule=Schedule(epochs=1),
        weights=str(trained / "model" / "weights.safetensors"),
    )
    serial.train(recipe, str(folder / "data"), str(model))
    scans = [str(trained / "slides" / f"{name(n)}.tif") for n in SPLITS]
    hows = [read_seen(str(model))[slide_digest(scan)] for scan in scans]
    assert hows == ["train", "train", "train", "val"]
