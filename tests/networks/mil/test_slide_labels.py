"""Slides' labels by the features of their tiles: trained, predicted, evaluated."""

import contextlib
import csv
import io
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from documents import lines_of
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from medray.cli import main
from medray.errors import ConfigError
from medray.mil.config import SlideHead
from medray.mil.evaluate import evaluate_slides
from medray.mil.features import (
    Encoder,
    FeatureSettings,
    features_uri,
    thumbnail_uri,
)
from medray.mil.infer import infer_slides
from medray.mil.network import SlideNetwork
from medray.mil.rehearsal import dry_train_slides
from medray.mil.train import train_slides
from medray.storage import files
from medray.storage.arrays import write_arrays
from medray.storage.yaml_config import write_settings

MIL, LINEAR = "attention-mil", "linear"
D, SIDE = 8, 64
SMALL = ("head.hidden=16", "head.attention=8", "epochs=25", "lr=0.01")
ENCODER = Encoder(
    name="test_resnet",
    weights_digest="blake2b:0",
    dimensions=D,
    tile=SIDE,
    mpp=0.5,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def write_folder(folder: Path, slides: int = 40, encoder: Encoder = ENCODER) -> str:
    """Slides of 12 tiles; two tiles of a tumour slide tell of it. One has no tissue.

    Two slides in a row are of one patient, of whom one is tumour or both are not.
    """
    settings = FeatureSettings(
        encoder=encoder, weights="/w", tissue=0.25, precision="float32", region=4
    )
    write_settings(str(folder / "features.yaml"), settings)
    rows, lines = [], ["slide,label,patient"]
    grid = np.stack(np.meshgrid(np.arange(3), np.arange(4), indexing="ij"), -1)
    for number in range(slides):
        name = f"s{number:02d}"
        rng = np.random.default_rng(number)
        features = rng.normal(size=(12, D)).astype(np.float32)
        label = "tumour" if number % 4 == 1 else "normal"
        if label == "tumour":
            features[[3, 7], 0] += 6
        if number == slides - 1:
            features = features[:0]
        coords = (grid.reshape(-1, 2)[: len(features)] * SIDE).astype(np.int32)
        attributes = {"level0_height": 3 * SIDE, "level0_width": 4 * SIDE}
        attributes |= {"level0_tile": SIDE, "downsample": 1.0}
        arrays = {"features": features, "coords": coords}
        write_arrays(features_uri(str(folder), name), arrays, attributes)
        picture = io.BytesIO()
        Image.new("RGB", (2 * SIDE, 3 * SIDE // 2), "white").save(picture, "JPEG")
        files.write_bytes(thumbnail_uri(str(folder), name), picture.getvalue())
        row = {"slide": name, "status": "done", "message": "", "mpp": 0.5}
        row |= {"digest": f"blake2b:{number}", "uri": f"/x/{name}.svs"}
        rows.append(row | {"tiles": len(features)})
        lines.append(f"{name}.svs,{label},p{number // 2}")
    pq.write_table(pa.Table.from_pylist(rows), folder / "slides.parquet")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_folder(tmp_path_factory.mktemp("features")))


@pytest.fixture(scope="module")
def labels(data: Path) -> str:
    return str(data / "labels.csv")


@pytest.fixture(scope="module")
def model(data: Path, labels: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model")
    done = train_slides(
        MIL, data=str(data), labels=labels, out=str(out), overrides=SMALL
    )
    assert done.trained
    return out


@pytest.fixture(scope="module")
def run(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    infer_slides(str(data), model=str(model), out=str(out))
    return out


def rows_of(place: Path) -> list[dict]:
    if place.suffix == ".csv":
        with place.open() as file:
            return list(csv.DictReader(file))
    return pq.read_table(place).to_pylist()


# --- the network ----------------------------------------------------------------------


def test_gated_attention_is_the_formula() -> None:
    """Ilse et al. 2018, equation 9, tile by tile."""
    torch.manual_seed(0)
    network = SlideNetwork(SlideHead(hidden=5, attention=3), 4, 2).eval()
    network.mean.copy_(torch.tensor([1.0, 0.0, -1.0, 2.0]))
    network.scale.copy_(torch.tensor([0.5, 1.0, 2.0, 1.0]))
    w = {name: value.numpy() for name, value in network.state_dict().items()}
    bag = np.random.default_rng(1).normal(size=(6, 4))
    hidden, weights = [], []
    for tile in bag:
        h = w["hidden.0.weight"] @ ((tile - w["mean"]) * w["scale"])
        h = np.maximum(h + w["hidden.0.bias"], 0)
        u = w["gate_sigmoid.weight"] @ h + w["gate_sigmoid.bias"]
        v = w["gate_tanh.weight"] @ h + w["gate_tanh.bias"]
        gate = np.tanh(v) / (1 + np.exp(-u))
        weights.append(np.exp(w["weigh.weight"][0] @ gate + w["weigh.bias"][0]))
        hidden.append(h)
    wanted = np.array(weights) / sum(weights)
    pooled = sum(a * h for a, h in zip(wanted, hidden, strict=True))
    scores = w["classify.weight"] @ pooled + w["classify.bias"]
    logits, attention = network(torch.tensor(bag, dtype=torch.float32))
    np.testing.assert_allclose(attention.detach().numpy(), wanted, rtol=1e-4)
    np.testing.assert_allclose(logits.detach().numpy(), scores, rtol=1e-4, atol=1e-5)


def test_the_linear_probe_is_linear_in_the_mean() -> None:
    torch.manual_seed(0)
    network = SlideNetwork(SlideHead("linear"), 4, 3).eval()
    bag = torch.randn(7, 4)
    logits, attention = network(bag)
    expected = network.classify.weight @ bag.mean(0) + network.classify.bias
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(attention, torch.full((7,), 1 / 7))


# --- training -------------------------------------------------------------------------


def test_the_same_command_makes_the_same_model(
    data: Path, labels: str, model: Path, tmp_path: Path
) -> None:
    how = {"data": str(data), "labels": labels, "overrides": SMALL}
    train_slides(MIL, out=str(tmp_path), **how)
    for name in ("weights.safetensors", "model.yaml", "metrics.json", "slides.csv"):
        assert (tmp_path / name).read_bytes() == (model / name).read_bytes()
    again = train_slides(MIL, out=str(model), **how)
    assert not again.trained
    assert again.f1 == json.loads((model / "metrics.json").read_text())["f1"]
    with pytest.raises(ConfigError, match="holds a model of another recipe"):
        train_slides(LINEAR, out=str(model), **how | {"overrides": ()})


def test_splits_keep_patients_together_and_hold_both_classes(model: Path) -> None:
    slides = rows_of(model / "slides.csv")
    assert len(slides) == 39  # all but the one without tissue
    split_of, classes = defaultdict(set), defaultdict(set)
    for row in slides:
        split_of[row["patient"]].add(row["split"])
        classes[row["split"]].add(row["label"])
    assert all(len(splits) == 1 for splits in split_of.values())
    assert classes == {s: {"normal", "tumour"} for s in ("train", "val", "test")}
    metrics = json.loads((model / "metrics.json").read_text())
    assert metrics["left_out"] == {"s39": "no tissue"}


def test_it_stops_early_and_keeps_the_best_epoch(
    data: Path, labels: str, tmp_path: Path
) -> None:
    train_slides(
        LINEAR,
        data=str(data),
        labels=labels,
        out=str(tmp_path / "long"),
        overrides=("lr=1", "patience=3", "epochs=60"),
    )
    metrics = json.loads((tmp_path / "long" / "metrics.json").read_text())
    losses = [row["val_loss"] for row in metrics["history"]]
    best = int(np.argmin(losses)) + 1
    assert len(losses) == best + 3 < 60
    # Training that ends there makes the very same weights.
    train_slides(
        LINEAR,
        data=str(data),
        labels=labels,
        out=str(tmp_path / "short"),
        overrides=("lr=1", "patience=3", f"epochs={best}"),
    )
    name = "weights.safetensors"
    ours, theirs = (tmp_path / k / name for k in ("long", "short"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_wrong_labels_are_answered(data: Path, labels: str, tmp_path: Path) -> None:
    def train(text: str, *overrides: str) -> None:
        path = tmp_path / "labels.csv"
        path.write_text(text)
        train_slides(
            MIL,
            data=str(data),
            labels=str(path),
            out=str(tmp_path / "out"),
            overrides=overrides,
        )

    text = Path(labels).read_text()
    with pytest.raises(ConfigError, match=r"expected the columns slide and label"):
        train(text.replace("label", "class"))
    with pytest.raises(
        ConfigError, match=r"line 42: names s04x, .* nearest: s04.svs.*1 of 41 rows"
    ):
        train(text + "s04x,normal,p9\n")
    with pytest.raises(ConfigError, match=r"lines 2 and 3: label 'Normal' and 'norm"):
        train("slide,label\ns00,Normal\ns02,normal\ns01,tumour\n")
    with pytest.raises(ConfigError, match="two classes or more.*'normal'"):
        train(text.replace("tumour", "normal"))
    with pytest.raises(ConfigError, match="line 42: slide s03: has no label"):
        train(text + "s03,,p1\n")
    with pytest.raises(ConfigError, match="lines 5 and 42: say of slide"):
        train(text + "s03,tumour,p1\n")
    with pytest.raises(ConfigError, match=r"classes: the recipe has \['a', 'b'\]"):
        train(text, "classes=[a,b]")
    with pytest.raises(ConfigError, match="too few for a validation split"):
        train("slide,label,patient\ns00,normal,p\ns01,tumour,p\n")
    with pytest.raises(
        ConfigError, match=r"no slide of \['tumour'\] is in split train"
    ):
        train("slide,label\ns00,normal\ns01,tumour\n", "seed=1")
    with pytest.raises(ConfigError, match="did you mean epochs"):
        train(text, "epoch=3")
    with pytest.raises(ConfigError, match="expected a folder of features"):
        train_slides(MIL, data=str(tmp_path), labels=labels, out=str(tmp_path / "o"))


# --- inference ------------------------------------------------------------------------


def test_predictions_beat_chance_and_attention_finds_the_tiles(
    data: Path, model: Path, run: Path
) -> None:
    rows = {row["slide"]: row for row in rows_of(run / "slides.parquet")}
    test = [r for r in rows_of(model / "slides.csv") if r["split"] == "test"]
    right = [rows[row["slide"]]["label"] == row["label"] for row in test]
    assert np.mean(right) >= 0.8
    found = [row for row in test if row["label"] == "tumour"]
    for row in found:
        tiles = rows_of(run / "attention" / f"{row['slide']}.parquet")
        attention = np.array([tile["attention"] for tile in tiles])
        assert attention.sum() == pytest.approx(1, abs=1e-4)
        assert {*np.argsort(attention)[-2:].tolist()} == {3, 7}
        # Where attention is greatest the picture is lightest: y, x of tile 3 or 7.
        top = tiles[int(attention.argmax())]
        assert (top["y"] // SIDE, top["x"] // SIDE) in {(0, 3), (1, 3)}
        with Image.open(run / "heatmaps" / f"{row['slide']}.png") as picture:
            assert picture.size == (2 * SIDE, 3 * SIDE // 2)
            light = np.asarray(picture).sum(axis=2)
        y, x = top["y"] // 2 + SIDE // 4, top["x"] // 2 + SIDE // 4
        assert light[y, x] == light.max()


def test_a_slide_without_tissue_costs_its_row(run: Path, data: Path) -> None:
    rows = {row["slide"]: row for row in rows_of(run / "slides.parquet")}
    assert rows["s39"]["status"] == "failed"
    assert "no tissue" in rows["s39"]["message"]
    assert sum(row["status"] == "done" for row in rows.values()) == 39


def test_features_of_another_encoder_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = replace(ENCODER, weights_digest="blake2b:1")
    folder = write_folder(tmp_path / "other", 4, other)
    with pytest.raises(
        ConfigError, match=r"not those .*weights_digest: blake2b:1 here, blake2b:0"
    ):
        infer_slides(folder, model=str(model), out=str(tmp_path / "run"))


# --- evaluation -----------------------------------------------------------------------


def test_scores_are_those_of_scikit_learn_on_unseen_slides(
    run: Path, model: Path, labels: str, tmp_path: Path
) -> None:
    found = evaluate_slides(str(run), truth=labels, out=str(tmp_path))
    seen = rows_of(model / "slides.csv")
    test = {row["slide"]: row["label"] for row in seen if row["split"] == "test"}
    table = {row["slide"]: row for row in rows_of(tmp_path / "slides.csv")}
    # The slide without tissue has no prediction; its patient's other slide decides
    # whether that counts as a failure or was seen.
    assert table.keys() == test.keys()
    assert found.unseen == len(test)
    assert found.unseen + found.seen + len(found.failed) == 40
    predicted = {r["slide"]: r for r in rows_of(run / "slides.parquet")}
    truth = [test[slide] for slide in sorted(test)]
    guess = [predicted[slide]["label"] for slide in sorted(test)]
    share = [predicted[slide]["p_tumour"] for slide in sorted(test)]
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    wanted = f1_score(truth, guess, average="macro")
    assert metrics["macro_f1"] == pytest.approx(wanted)
    assert metrics["accuracy"] == pytest.approx(accuracy_score(truth, guess))
    auc = roc_auc_score([label == "tumour" for label in truth], share)
    assert metrics["macro_auc"] == pytest.approx(auc)
    low, high = metrics["intervals"]["macro_f1"]
    assert low <= metrics["macro_f1"] <= high
    assert np.sum(metrics["confusion"]) == len(test)
    assert metrics["patients"] == len(
        {r["patient"] for r in seen if r["slide"] in test}
    )


def test_errors_are_shown_with_what_was_attended(
    run: Path, labels: str, tmp_path: Path
) -> None:
    """Labels turned round: all are errors; their slides cannot be read any more."""
    text = Path(labels).read_text().replace("normal", "x")
    text = text.replace("tumour", "normal").replace("x,p", "tumour,p")
    turned = tmp_path / "labels.csv"
    turned.write_text(text)
    evaluate_slides(str(run), truth=str(turned), out=str(tmp_path / "report"))
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("taken for") >= 2
    assert page.count("data:image/png") >= 2


def test_slides_that_the_model_has_seen_are_refused(
    run: Path, model: Path, tmp_path: Path
) -> None:
    seen = [row for row in rows_of(model / "slides.csv") if row["split"] == "train"]
    path = tmp_path / "labels.csv"
    # Without patients: the slides' contents are known all the same.
    lines = [f"{row['slide']},{row['label']}" for row in seen]
    path.write_text("\n".join(["slide,label", *lines]) + "\n")
    with pytest.raises(ConfigError, match="has seen all of its"):
        evaluate_slides(str(run), truth=str(path), out=str(tmp_path / "report"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "images.csv").touch()
    with pytest.raises(ConfigError, match="another kind of report"):
        evaluate_slides(str(run), truth=str(path), out=str(tmp_path / "images"))
    path.write_text("slide,label\ns00,cyst\n")
    with pytest.raises(ConfigError, match=r"knows the classes .* not \['cyst'\]"):
        evaluate_slides(str(run), truth=str(path), out=str(tmp_path / "report"))


def test_the_commands(
    data: Path, labels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run, report = (str(tmp_path / name) for name in ("model", "run", "report"))
    more = tmp_path / "more.csv"
    more.write_text(Path(labels).read_text() + "elsewhere,normal,p77\n")
    train = ["train", LINEAR, "epochs=5", "--data", str(data), "--labels", str(more)]
    assert main([*train, "--out", model]) == 2
    assert "line 42: names elsewhere" in capsys.readouterr().err
    assert main([*train, "--out", model, "--ignore-unknown"]) == 0
    assert main(["evaluate", model, "--truth", labels, "--out", report]) == 2
    assert "give `medray evaluate` the RUN" in capsys.readouterr().err
    assert main(["infer", str(data), "--model", model, "--out", run]) == 3
    assert "39 slides done" in capsys.readouterr().out
    assert main(["evaluate", run, "--truth", labels, "--out", report, "--json"]) in (
        0,
        3,
    )
    assert json.loads(capsys.readouterr().out)["unseen"] > 0
    assert main(["infer", "a", "b", "--model", model, "--out", run]) == 2
    assert "one folder of features" in capsys.readouterr().err


def test_the_page(data: Path, labels: str, tmp_path: Path) -> None:
    """What docs/slide-labels.md says, from the features on."""
    places = {"features": data, "labels.csv": labels}
    for name, place in places.items():
        (tmp_path / name).symlink_to(place)
    embed, train, infer, evaluate = lines_of("docs/slide-labels.md")
    assert embed[:2] == ["medray", "embed"]
    with contextlib.chdir(tmp_path):
        assert main([*train[1:], *SMALL]) == 0
        assert main(infer[1:]) == 3  # one has no tissue
        assert main(evaluate[1:]) == 0
    assert (tmp_path / "report" / "report.html").exists()


# --- before it costs ------------------------------------------------------------------


def test_a_dry_run_tells_what_a_training_does(
    data: Path, labels: str, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "model"
    given: dict = {"data": str(data), "labels": labels, "overrides": SMALL}
    plan = dry_train_slides(MIL, out=str(out), **given)
    assert not out.exists()
    assert (plan.state, plan.epochs) == ("new", 25)
    assert plan.left_out == {"s39": "no tissue"}
    assert 0 < plan.seconds[0] <= plan.seconds[1]
    rows = rows_of(model / "slides.csv")
    for row in plan.splits:
        some = [one for one in rows if one["split"] == row["split"]]
        assert row["slides"] == len(some)
        assert row["patients"] == len({one["patient"] for one in some})
        assert row["tiles"] == 12 * len(some)
        for label in ("normal", "tumour"):
            assert row[f"slides_{label}"] == sum(one["label"] == label for one in some)
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    over = dry_train_slides(MIL, out=str(model), **given)
    assert (over.state, over.splits) == ("was there already", [])
    assert {path: path.stat().st_mtime_ns for path in model.rglob("*")} == before
    with pytest.raises(ConfigError, match="another recipe"):
        dry_train_slides(MIL, out=str(model), **given | {"overrides": ["lr=0.5"]})
