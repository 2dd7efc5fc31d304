"""Images in class folders: from files to a classifier's report."""

import contextlib
import csv
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import serial
import torch
from image_cells import COLOURS, write_cells
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from sklearn.metrics import f1_score, precision_score, recall_score

from medray.apps import parse
from medray.cli import main
from medray.datasets.cells import read_resized
from medray.datasets.dataset import labels_uri, read_patches, slide_uri
from medray.datasets.find_images import find_images
from medray.datasets.image_folder import ingest_images
from medray.errors import ConfigError
from medray.evaluation.evaluate_image_folder import _for_temperature, evaluate_images
from medray.evaluation.image_metrics import Predicted, combine, score
from medray.evaluation.metrics import confusion, of_images, summary
from medray.geometry import Rectangle
from medray.inference.classify_images import ClassifiedImage, DatasetImage
from medray.models.folder import load_model
from medray.models.network import Normalise
from medray.models.seen import read_seen, write_seen
from medray.storage import files, ome_zarr
from medray.training.distillation import Teacher
from medray.training.identity import seen_of
from medray.training.recipe import Prune, Recipe, read_recipe


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cells(tmp_path_factory.mktemp("cells") / "cells")


@pytest.fixture(scope="module")
def dataset(cells: Path) -> str:
    out = cells.parent / "dataset"
    summary = ingest_images(
        str(cells),
        out=str(out),
        side=64,
        patients=r"^(P\d+)_",
        fractions=(0.5, 0.25, 0.25),
        executor="local",
    )
    assert (summary.images, summary.failed) == (96, {})
    return str(out)


def test_each_image_is_in_its_place_with_its_class(cells: Path, dataset: str) -> None:
    rows = [
        row
        for split in ("train", "val", "test")
        for row in read_patches(dataset, split)
    ]
    assert len(rows) == 96
    split_of: dict[str, set[str]] = {}
    for row in rows:
        split_of.setdefault(row["patient"], set()).add(row["split"])
        image = ome_zarr.open_level(slide_uri(dataset, row["slide"]))
        labels = ome_zarr.open_level(labels_uri(dataset, row["slide"]))
        y, x = row["y"], row["x"]
        found = np.moveaxis(image[:, y : y + 64, x : x + 64], 0, 2)
        with Image.open(cells / row["image"]) as original:
            wanted = original.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(found, np.asarray(wanted))
        label = list(COLOURS).index(row["image"].split("/")[0])
        assert (labels[y : y + 64, x : x + 64] == label).all()
    assert all(len(splits) == 1 for splits in split_of.values())
    assert {len(read_patches(dataset, s)) for s in ("train", "val", "test")} == {48, 24}


def test_ingest_again_does_nothing_until_something_changes(tmp_path: Path) -> None:
    cells = write_cells(tmp_path / "cells", patients=4, each=2)
    out = str(tmp_path / "dataset")

    def again(**changed: object) -> tuple[int, int]:
        done = ingest_images(str(cells), out=out, side=32, executor="local", **changed)
        return done.images, done.skipped

    assert again() == (16, 0)
    assert again() == (0, 16)
    # What was said of the images counts as much as they do.
    how = {"patients": r"^(P\d+)_"}
    assert again(**how) == (16, 0)
    assert again(**how) == (0, 16)
    splits = tmp_path / "splits.csv"
    names = [one.image for one in find_images(str(cells))]
    lines = [f"{name},{'test' if n < 3 else 'train'}" for n, name in enumerate(names)]
    splits.write_text("\n".join(["slide,split", *lines]) + "\n")
    assert again(splits=str(splits)) == (16, 0)
    assert {row["image"] for row in read_patches(out, "test")} == set(names[:3])
    assert sorted(p.name for p in Path(out, "slides").iterdir()) == [
        "test-0000.ome.zarr",
        "train-0000.ome.zarr",
    ]
    (cells / "sick" / "P0_cell_0.png").unlink()
    with pytest.raises(ConfigError, match="names sick/P0_cell_0.png, which is no"):
        again(splits=str(splits))
    lines = [line for line in lines if not line.startswith("sick/P0_cell_0.png")]
    splits.write_text("\n".join(["slide,split", *lines]) + "\n")
    assert again(splits=str(splits)) == (15, 0)


def test_the_copy_that_tests_is_the_one_that_stays(tmp_path: Path) -> None:
    """Also when a CSV says what tests."""
    cells = write_cells(tmp_path / "cells", patients=3, each=1)
    shutil.copy(cells / "sick" / "P0_cell_0.png", cells / "sick" / "P9_cell_0.png")
    names = [one.image for one in find_images(str(cells))]
    split_of = dict.fromkeys(names, "train") | {"sick/P9_cell_0.png": "test"}
    splits = tmp_path / "splits.csv"
    lines = [f"{name},{split}" for name, split in split_of.items()]
    splits.write_text("\n".join(["slide,split", *lines]) + "\n")
    out = str(tmp_path / "dataset")
    done = ingest_images(
        str(cells), out=out, side=32, splits=str(splits), executor="local"
    )
    assert (done.images, done.copies) == (6, 1)
    assert [row["image"] for row in read_patches(out, "test")] == ["sick/P9_cell_0.png"]
    trained = {row["image"] for row in read_patches(out, "train")}
    assert trained == set(names) - {"sick/P0_cell_0.png", "sick/P9_cell_0.png"}


def test_no_image_is_in_two_splits_and_what_is_damaged_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "xray"
    for split, patients in (("train", 6), ("test", 2)):
        write_cells(folder / split, patients=patients, each=2)
    # The sixteen drawings of the test folder are the first of the training folder too.
    tests = {p.read_bytes() for p in (folder / "test").rglob("*.*")}
    copies = [p for p in (folder / "train").rglob("*.*") if p.read_bytes() in tests]
    assert copies
    damaged = folder / "train" / "sick" / "P5_cell_1.bmp"
    damaged.write_bytes(damaged.read_bytes()[:40])
    out = str(tmp_path / "dataset")
    summary = ingest_images(
        str(folder), out=out, side=32, patients=r"^(P\d+)_", executor="local"
    )
    assert list(summary.failed) == ["train/sick/P5_cell_1.bmp"]
    assert "P5_cell_1.bmp" in summary.failed["train/sick/P5_cell_1.bmp"]
    digests = {
        split: {row["digest"] for row in read_patches(out, split)}
        for split in ("train", "val", "test")
    }
    words = "images of train are copies of images of test, such as train/"
    assert f"{len(copies)} {words}" in caplog.text
    assert len(digests["test"]) == 8
    assert not digests["test"] & (digests["train"] | digests["val"])
    assert not digests["train"] & digests["val"]
    status = {
        row["image"]: row["status"]
        for row in files.read_table(f"{out}/images.parquet").to_pylist()
    }
    assert all(status[str(p.relative_to(folder))] == "copy" for p in copies)


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    cells = write_cells(tmp_path / "cells", patients=1, each=1)
    (cells / "odd").mkdir()
    with pytest.raises(ConfigError, match=r"no image .* of the class odd"):
        find_images(str(cells))
    (cells / "odd").rmdir()
    with pytest.raises(ConfigError, match=r"of the class unheard"):
        find_images(str(cells), ("healthy", "sick", "unheard"))
    with pytest.raises(ConfigError, match="finds nothing in the name"):
        ingest_images(str(cells), out=str(tmp_path / "d"), side=32, patients="^Q")
    with pytest.raises(ConfigError, match="no regular expression"):
        ingest_images(str(cells), out=str(tmp_path / "d"), side=32, patients="(")
    with pytest.raises(ConfigError, match="sum to 1"):
        ingest_images(str(cells), out=str(tmp_path / "d"), side=32, fractions=(1, 1, 1))
    with pytest.raises(ConfigError, match="a multiple of 32"):
        ingest_images(str(cells), out=str(tmp_path / "d"), side=50)
    shutil.copy(cells / "sick" / "P0_cell_0.png", cells / "beside.png")
    with pytest.raises(ConfigError, match=r"beside\.png: expected images in a folder"):
        find_images(str(cells))


# --- scores ---------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 5])
def test_scores_are_those_of_scikit_learn(classes: int) -> None:
    rng = np.random.default_rng(classes)
    truth, guess = rng.integers(classes, size=(2, 300))
    names = [str(label) for label in range(classes)]
    found = summary(*of_images(confusion(truth, guess, classes), names))
    how = {"average": "binary" if classes == 2 else "macro"}
    assert found["f1"] == pytest.approx(f1_score(truth, guess, **how))
    assert found["precision"] == pytest.approx(precision_score(truth, guess, **how))
    assert found["recall"] == pytest.approx(recall_score(truth, guess, **how))
    assert found["accuracy"] == pytest.approx((truth == guess).mean())


def test_calibration_and_intervals_of_images() -> None:
    rng = np.random.default_rng(3)
    rows = []
    for index in range(400):
        sure = float(rng.uniform(0.5, 1.0))
        truth = int(rng.random() < sure)  # as sure as it is right
        shares = np.array([1 - sure, sure])
        rows.append(
            Predicted(
                name=f"{index}",
                digest=f"{index}",
                patient=f"P{index % 20}",
                truth=truth,
                predicted=1,
                probabilities=shares,
                log_probabilities=np.log(np.maximum(shares, 1e-12)),
            )
        )
    found = score(rows, ["no", "yes"])
    sure = np.array([row.probabilities[1] for row in rows])
    right = np.array([row.truth == 1 for row in rows])
    error = 0.0
    for low in np.arange(0.5, 1.0, 0.1):
        inside = (sure >= low - 1e-9) & (sure < low + 0.1 - 1e-9)
        error += abs(sure[inside].mean() - right[inside].mean()) * inside.mean()
    assert found["calibration_error"] == pytest.approx(error, abs=0.02)
    assert found["images"] == 400
    assert found["patients"] == 20
    low, high = found["intervals"]["accuracy"]
    assert low < found["accuracy"] < high


# --- the whole way --------------------------------------------------------------------

RECIPE = """
model: {name: classifier, encoder: resnet10t, hidden: 8, dropout: 0.1}
window: {size: 64, stride: 64}
data: {crop: 64}
loss: {dice: 0.0, focal: 0.0, cross_entropy: 1.0}
optimizer: {lr: 2.0e-3}
schedule: {epochs: 6}
augment: {flips: true, rotate: 10, brightness: 0.1, contrast: 0.0, saturation: 0.0, hue: 0.0}
batch: 8
precision: float32
"""


@pytest.fixture(scope="module")
def classifier(dataset: str) -> str:
    folder = Path(dataset).parent
    path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    out = str(folder / "model")

    result = serial.train(read_recipe(str(path)), dataset, out)
    assert result.f1 is not None
    assert result.f1 > 0.9
    return out


def test_a_classifier_is_trained_and_evaluated(
    cells: Path, classifier: str, reports: Path
) -> None:
    report = reports / "first"
    metrics = json.loads((report / "metrics.json").read_text())
    assert metrics["images"] == 24
    assert metrics["f1"] > 0.9
    assert np.trace(metrics["confusion"]) / 24 == metrics["accuracy"]
    page = (report / "report.html").read_text()
    assert "F1 of sick" in page
    assert "images of 3 patients" in page

    # Inference sees what training saw: the same image gives the same class and share.
    network, config = load_model(classifier)
    normalise = Normalise(config)
    lines = (report / "images.csv").read_text().splitlines()
    assert len(lines) == 25
    for line in lines[1:]:
        image, _, _, _, predicted, *shares = line.replace('"', "").split(",")
        pixels = torch.from_numpy(read_resized(str(cells / image), 64).copy())
        with torch.inference_mode():
            logits = network(normalise(pixels.permute(2, 0, 1)[None]))
        wanted = logits.softmax(dim=1)[0].numpy()
        assert config.classes.names[int(wanted.argmax())] == predicted
        np.testing.assert_allclose([float(s) for s in shares], wanted, atol=0.02)


def logits_of(folder: str, cells: Path, rows: list[dict]) -> np.ndarray:
    """Run a model over image files, one by one, without medray's stages."""
    network, config = load_model(folder)
    normalise = Normalise(config)
    found = []
    for row in rows:
        pixels = torch.from_numpy(read_resized(str(cells / row["image"]), 64).copy())
        with torch.inference_mode():
            found.append(network(normalise(pixels.permute(2, 0, 1)[None]))[0].numpy())
    return np.array(found, np.float64)


def altered(classifier: str, folder: Path, scale: float, shift: float) -> str:
    """Copy a model; its logits are scaled, and class 1's then shifted."""
    shutil.copytree(classifier, folder)
    weights = load_file(folder / "weights.safetensors")
    last = max(name for name in weights if name.startswith("head."))
    last = last.rpartition(".")[0]
    for part in ("weight", "bias"):
        weights[f"{last}.{part}"] = weights[f"{last}.{part}"] * scale
    weights[f"{last}.bias"] = weights[f"{last}.bias"] + torch.tensor([0.0, shift])
    save_file(weights, folder / "weights.safetensors")
    return str(folder)


@pytest.fixture(scope="module")
def models(cells: Path, dataset: str, classifier: str) -> list[str]:
    """The classifier, and two that are too sure and take some for the other class."""
    rows = read_patches(dataset, "val")
    logits = logits_of(classifier, cells, rows)
    apart = logits[:, 1] - logits[:, 0]
    is_sick = np.array([row["class_px"][1] > 0 for row in rows])
    found = [classifier]
    for name, label in (("bold", is_sick), ("rash", ~is_sick)):
        # Half of the class's images are then wrong, by far; unless all get the same.
        scale = 5 / max(apart[label].std(), 0.1 * apart.std())
        shift = -scale * np.median(apart[label])
        folder = Path(classifier).parent / name
        found.append(altered(classifier, folder, float(scale), float(shift)))
    return found


@pytest.fixture(scope="module")
def reports(dataset: str, models: list[str]) -> Path:
    """Reports `first` of the classifier and `second` of a bold one."""
    folder = Path(dataset).parent
    first, second = str(folder / "first"), str(folder / "second")
    here = ["--truth", dataset, "--executor", "local"]
    assert main(["evaluate", models[0], *here, "--out", first]) == 0
    command = ["evaluate", models[1], *here, "--out", second]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main([*command, "--beside", first]) == 0
    assert "McNemar p = " in said.getvalue()
    return folder


def test_the_temperature_is_fitted_on_validation_images(
    cells: Path, dataset: str, models: list[str], reports: Path
) -> None:
    metrics = json.loads((reports / "second" / "metrics.json").read_text())
    calibration = metrics["calibration"]
    assert calibration["images"] == 24
    rows = read_patches(dataset, "val")
    logits = torch.from_numpy(logits_of(models[1], cells, rows))
    truth = torch.tensor([int(np.argmax(row["class_px"])) for row in rows])

    def loss(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / temperature, truth))

    best = min(map(loss, np.exp(np.linspace(np.log(0.02), np.log(50), 300))))
    assert loss(calibration["temperature"]) < best + 0.02
    assert best < loss(1.0) - 0.05  # it was too sure
    page = (reports / "second" / "report.html").read_text()
    assert f"a temperature of {calibration['temperature']:.2f}, fitted on 24" in page


def test_images_that_trained_a_model_do_not_calibrate_it(
    dataset: str, models: list[str], tmp_path: Path
) -> None:
    tests, validation = read_patches(dataset, "test"), read_patches(dataset, "val")
    assert _for_temperature(models, dataset, tests) == validation
    # Scored images neither.
    assert _for_temperature(models, dataset, validation[5:]) == validation[:5]
    learned = altered(models[0], tmp_path / "learned", 1, 0)
    seen = read_seen(learned) | {row["digest"]: "train" for row in validation[:3]}
    write_seen(learned, seen)
    assert _for_temperature([models[1], learned], dataset, tests) == validation[3:]


def test_an_ensemble_votes_and_has_the_mean_probability(
    cells: Path, dataset: str, models: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "report"
    evaluate_images(models, data=dataset, out=str(out), vote=True, executor="local")
    rows = read_patches(dataset, "test")
    by_name = {row["image"]: k for k, row in enumerate(rows)}
    each = np.array([softmax(logits_of(m, cells, rows), axis=1) for m in models])
    for line in csv.DictReader((out / "images.csv").read_text().splitlines()):
        shares = each[:, by_name[line["image"]]]
        found = [float(line[f"p_{name}"]) for name in COLOURS]
        np.testing.assert_allclose(found, shares.mean(axis=0), atol=0.02)
        if np.abs(shares[:, 0] - 0.5).min() > 0.05:  # else rounding may decide
            label = Counter(shares.argmax(axis=1).tolist()).most_common(1)[0][0]
            assert line["predicted"] == list(COLOURS)[label]
    assert "3 models, majority vote" in (out / "report.html").read_text()


def test_turned_images_have_a_part_in_the_mean(
    cells: Path, dataset: str, classifier: str, tmp_path: Path
) -> None:
    """Against images that are turned and mirrored on disk."""
    out, turned = tmp_path / "report", tmp_path / "turned"
    turned.mkdir()
    rows = read_patches(dataset, "test")
    views = [{"image": f"{n}-{k}.png"} for n in range(len(rows)) for k in range(8)]
    for n, row in enumerate(rows):
        image = read_resized(str(cells / row["image"]), 64)
        for k in range(8):
            way = np.rot90(image[:, ::-1] if k % 2 else image, k // 2)
            Image.fromarray(way).save(turned / f"{n}-{k}.png")
    logits = logits_of(classifier, turned, views)
    apart = (logits[:, 1] - logits[:, 0]).reshape(-1, 8)
    # A model that is of two minds about the image whose views it tells apart most.
    beyond = np.abs(apart[:, 0] - apart.mean(axis=1))
    most = int(beyond.argmax())
    scale = float(2 / beyond[most])
    shift = float(-scale * apart[most].mean())
    model = altered(classifier, tmp_path / "wavers", scale, shift)

    command = ["evaluate", model, "--truth", dataset, "--out", str(out)]
    assert main([*command, "--tta", "all", "--executor", "local"]) == 0
    lines = list(csv.DictReader((out / "images.csv").read_text().splitlines()))
    found = {line["image"]: float(line[f"p_{list(COLOURS)[1]}"]) for line in lines}
    shares = softmax(logits_of(model, turned, views), axis=1)[:, 1].reshape(-1, 8)
    means = [found[row["image"]] for row in rows]
    np.testing.assert_allclose(means, shares.mean(axis=1), atol=1e-3)
    assert abs(means[most] - shares[most, 0]) > 0.1  # one view alone says otherwise
    assert "test-time augmentation" in (out / "report.html").read_text()


def test_equal_votes_are_decided_by_the_mean() -> None:
    image = DatasetImage(
        image="a.png",
        digest="d",
        patient="P",
        split="test",
        sheet="test-0000",
        place=Rectangle(0, 0, 64, 64),
        truth=0,
    )

    def chosen(shares: list[list[float]], *, vote: bool) -> int:
        return combine(ClassifiedImage(image, np.log(shares)), vote=vote).predicted

    assert chosen([[0.9, 0.1], [0.4, 0.6]], vote=True) == 0
    assert chosen([[0.6, 0.4], [0.1, 0.9]], vote=True) == 1
    assert chosen([[0.1, 0.9], [0.6, 0.4], [0.6, 0.4]], vote=True) == 0
    assert chosen([[0.1, 0.9], [0.6, 0.4], [0.6, 0.4]], vote=False) == 1


def test_a_report_stands_beside_another(reports: Path) -> None:
    first, second = reports / "first", reports / "second"
    texts = [Path(out, "images.csv").read_text() for out in (first, second)]
    tables = [
        {row["image"]: row for row in csv.DictReader(text.splitlines())}
        for text in texts
    ]
    right = np.array(
        [
            [t[name]["truth"] == t[name]["predicted"] for t in tables]
            for name in tables[0]
        ]
    )
    beside = json.loads(Path(second, "metrics.json").read_text())["beside"]
    assert beside["images"] == 24
    assert beside["only_this"] == (right[:, 1] & ~right[:, 0]).sum()
    assert beside["only_other"] == (right[:, 0] & ~right[:, 1]).sum()
    assert "Beside first" in (second / "report.html").read_text()


def test_images_that_any_model_has_seen_are_refused(
    dataset: str, models: list[str], tmp_path: Path
) -> None:
    test = read_patches(dataset, "test")[0]
    for how in (" train", " val", ""):  # the last as it was written before
        leaky = altered(models[0], tmp_path / f"leaky{how}", 1, 0)
        with Path(leaky, "seen.txt").open("a") as file:
            file.write(f"{test['digest']}{how}\n")
        with pytest.raises(ConfigError, match=f"leaky{how}: was .* with 1 of the 24"):
            evaluate_images([models[1], leaky], data=dataset, out=str(tmp_path / "r"))
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("how", ["weights", "teacher", "prune"])
def test_what_other_models_have_learned_from_comes_with_them(
    how: str, tmp_path: Path
) -> None:
    other = str(tmp_path / "other")
    write_seen(other, {"a": "train", "b": "val", "c": "train"})
    (tmp_path / "images.parquet").touch()
    recipe = {
        "weights": Recipe(weights=f"{other}/weights.safetensors"),
        "teacher": Recipe(teacher=Teacher(other)),
        "prune": Recipe(prune=Prune(other)),
    }[how]
    patches = {"train": [{"digest": "b"}], "val": [{"digest": "c"}, {"digest": "d"}]}
    wanted = {"a": "train", "b": "train", "c": "train", "d": "val"}
    assert seen_of(recipe, patches, str(tmp_path)) == wanted


def test_images_that_trained_the_model_are_no_test(
    dataset: str, classifier: str, cells: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="was trained or chosen with 48 of the 48"):
        evaluate_images(
            classifier, data=dataset, out=str(tmp_path / "r"), split="train"
        )
    with pytest.raises(ConfigError, match="was trained or chosen with 24 of the 24"):
        evaluate_images(classifier, data=dataset, out=str(tmp_path / "r"), split="val")
    # Another dataset of the same images, dealt out otherwise, is seen through too.
    other = str(tmp_path / "other")
    ingest_images(
        str(cells), out=other, side=64, patients=r"^(P\d+)_", seed=5, executor="local"
    )
    with pytest.raises(ConfigError, match="was trained or chosen with"):
        evaluate_images(classifier, data=other, out=str(tmp_path / "r"))


def test_what_does_not_fit_is_refused(
    dataset: str, classifier: str, training_data: str, model: Path, tmp_path: Path
) -> None:
    from medray.training.train_model import train

    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    for change, match in (
        ("data.crop=96", "model.name=classifier data.crop=64"),
        ("loss.dice=1", "cannot do with loss.dice"),
        ("model.encoder=resnet_nobody_knows", "cannot build the classifier"),
        ("model.dropout=1.5", "dropout from 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=match):
            train(str(path), data=dataset, out=str(tmp_path / "m"), overrides=[change])
    with pytest.raises(ConfigError, match="nowhere: expected a dataset"):
        evaluate_images(classifier, data="nowhere", out=str(tmp_path / "r"))
    with pytest.raises(ConfigError, match="holds slides; give"):
        evaluate_images(classifier, data=training_data, out=str(tmp_path / "r"))
    with pytest.raises(ConfigError, match="expected a classifier"):
        evaluate_images(str(model), data=dataset, out=str(tmp_path / "r"))
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "per_slide.parquet").touch()
    with pytest.raises(ConfigError, match="another kind of report"):
        evaluate_images(classifier, data=dataset, out=str(tmp_path / "slides"))
    with pytest.raises(ConfigError, match="expected several models"):
        evaluate_images(classifier, data=dataset, out=str(tmp_path / "r"), vote=True)
    with pytest.raises(ConfigError, match="one twice"):
        evaluate_images([classifier] * 2, data=dataset, out=str(tmp_path / "r"))
    for change, match in (
        (("size: 64", "size: 96"), "takes images of 96 px, those of .* have 64"),
        (("- healthy", "- well"), r"not the model's \['well', 'sick'\]"),
    ):
        other = altered(classifier, tmp_path / change[1][-2:], 1, 0)
        path = Path(other, "model.yaml")
        assert change[0] in path.read_text()
        path.write_text(path.read_text().replace(*change))
        with pytest.raises(ConfigError, match=match):
            evaluate_images([classifier, other], data=dataset, out=str(tmp_path / "r"))
    for asked in (["--vote"], ["--tta", "flips"]):
        with pytest.raises(ConfigError, match="is no model folder; several, --vote"):
            parse(["evaluate", "run", *asked, "--truth", "t", "--out", "r"]).run(print)
