"""Grad-CAM and attention against their definitions; a folder of images explained."""

import base64
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from medray.classes import Classes
from medray.cli import main
from medray.errors import ConfigError
from medray.evaluation.grad_cam import Explainer, overlay
from medray.evaluation.image_errors import overlays
from medray.geometry import Windows as Grid
from medray.models.classifiers import build_classifier
from medray.models.config import Architecture, ModelConfig
from medray.models.explain import attention_map, grad_cam, last_stage
from medray.models.folder import load_model, save_model
from medray.models.segmenters import build_segmenter

SIDE = 128


def write_model(folder: Path, *, classifier: bool, mpp: float | None = None) -> Path:
    """A tiny network with random weights, and batch statistics of its own."""
    torch.manual_seed(11)
    name = "classifier" if classifier else "unet"
    architecture = Architecture(
        name, "tu-test_resnet", attention=8 if classifier else 0
    )
    build = build_classifier if classifier else build_segmenter
    network = build(architecture, 3).train()
    with torch.no_grad():
        network(torch.randn(4, 3, SIDE, SIDE))
    config = ModelConfig(
        architecture=architecture,
        classes=Classes(("none", "mild", "severe")),
        window=Grid(SIDE, SIDE),
        mpp=mpp,
    )
    save_model(str(folder), config, network, {"f1": None})
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("why") / "model", classifier=True)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("why") / "model"
    return write_model(folder, classifier=False, mpp=0.5)


def inputs_of(seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(1, 3, 8, 8).repeat_interleave(16, 2).repeat_interleave(16, 3)


def scaled(coarse: torch.Tensor) -> np.ndarray:
    whole = functional.interpolate(coarse, (SIDE, SIDE), mode="bilinear")[0, 0]
    whole = whole - whole.min()
    return (whole / whole.max()).numpy()


def cam_by_hand(features: torch.Tensor, score: torch.Tensor) -> torch.Tensor:
    """Selvaraju et al. 2017, equations 1 and 2: (1, 1, h, w), not scaled."""
    (gradient,) = torch.autograd.grad(score, features, retain_graph=True)
    weights = gradient.mean(dim=(2, 3), keepdim=True)
    return torch.relu((weights * features.detach()).sum(1, keepdim=True))


def test_grad_cam_of_a_classifier_is_its_definition(classifier: Path) -> None:
    network, _ = load_model(str(classifier))
    compared = 0
    for seed in range(3):
        inputs = inputs_of(seed)
        features = network.encoder.forward_features(inputs).detach().requires_grad_()
        maps = torch.cat([features, network.attention(features)], dim=1)
        logits = network.head(maps.mean(dim=(2, 3)))[0]
        for label in range(3):
            wanted = cam_by_hand(features, logits[label])
            found = grad_cam(network, inputs, label)
            assert found.shape == (SIDE, SIDE)
            if wanted.max() > 1e-3:
                np.testing.assert_allclose(found, scaled(wanted), atol=2e-3)
                compared += 1
            elif wanted.max() == 0:
                assert not found.any()
    assert compared > 1
    assert all(weight.grad is None for weight in network.parameters())


def test_grad_cam_of_a_segmenter_is_its_definition(segmenter: Path) -> None:
    """Of the mean logit of a class over the pixels predicted as it."""
    network, _ = load_model(str(segmenter))
    compared = 0
    for seed in range(3):
        inputs = inputs_of(seed)
        features = [feature.detach() for feature in network.encoder(inputs)]
        features[-1].requires_grad_()
        logits = network.segmentation_head(network.decoder(features))[0]
        predicted = logits.argmax(0)
        for label in range(3):
            chosen = predicted == label
            if chosen.sum() < 1000:
                continue
            wanted = cam_by_hand(features[-1], logits[label][chosen].mean())
            found = grad_cam(network, inputs, label)
            if wanted.max() > 1e-3:
                np.testing.assert_allclose(found, scaled(wanted), atol=2e-3)
                compared += 1
    assert compared > 1


def test_attention_is_its_definition(classifier: Path) -> None:
    network, _ = load_model(str(classifier))
    inputs = inputs_of(3)
    with torch.no_grad():
        maps = network.encoder.forward_features(inputs)
        places = maps[0].flatten(1).T.double()  # (places, channels)

        def part(layer: torch.nn.Conv2d) -> torch.Tensor:
            return places @ layer.weight[:, :, 0, 0].T.double() + layer.bias.double()

        attention = network.attention
        products = part(attention.query) @ part(attention.key).T / np.sqrt(8)
        shares = products.exp() / products.exp().sum(1, keepdim=True)
        torch.testing.assert_close(
            attention.weights(maps)[0].double(), shares, rtol=1e-4, atol=1e-6
        )
        # These are the weights that the network itself goes by.
        torch.testing.assert_close(
            attention(maps)[0].flatten(1).T.double(),
            shares @ part(attention.value),
            rtol=1e-4,
            atol=1e-5,
        )
    received = shares.mean(0).reshape(1, 1, *maps.shape[2:]).float()
    np.testing.assert_allclose(
        attention_map(network, inputs), scaled(received), atol=1e-3
    )
    assert (
        attention_map(
            build_classifier(Architecture("classifier", "tu-test_resnet"), 2), inputs
        )
        is None
    )


def write_images(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(2):
        pixels = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8).repeat(30, 0)
        Image.fromarray(pixels.repeat(30, 1)).save(folder / f"cell_{number}.png")
    (folder / "damaged.png").write_bytes(b"\x89PNG no more")
    return folder


def test_a_folder_of_images_is_explained(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged one costs its row; what is drawn is what the network says."""
    images, out = write_images(tmp_path / "images"), tmp_path / "out"
    command = ["explain", str(classifier), str(images), "--out", str(out)]
    assert main([*command, "--json"]) == 3
    told = json.loads(capsys.readouterr().out)
    assert told["explained"] == 2
    assert list(told["failed"]) == ["damaged"]
    rows = {
        r["image"]: r for r in json.loads((out / "explain.json").read_text())["images"]
    }
    assert "expected a PNG" in rows["damaged"]["error"]
    network, _ = load_model(str(classifier))
    for name in ("cell_0", "cell_1"):
        with Image.open(images / f"{name}.png") as image:
            small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        pixels = np.asarray(small)
        inputs = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        inputs = torch.from_numpy(np.moveaxis(inputs, 2, 0)[None]).float()
        with torch.no_grad():
            shares = torch.softmax(network(inputs)[0], 0)
        row, label = rows[name], int(shares.argmax())
        assert row["class"] == row["predicted"] == ("none", "mild", "severe")[label]
        assert row["share"] == pytest.approx(float(shares[label]), abs=1e-4)
        with Image.open(out / row["overlay"]) as drawn:
            wanted = overlay(pixels, grad_cam(network, inputs, label))
            difference = np.asarray(drawn).astype(int) - wanted.astype(int)
        assert np.abs(difference).mean() < 1
        with Image.open(out / row["attention"]) as drawn:
            assert drawn.size == (SIDE, SIDE)
    page = (out / "explain.html").read_text()
    assert page.count("data:image/png") == 6
    assert "damaged" in page
    # Another class than the predicted one.
    other = next(n for n in ("none", "mild") if n != rows["cell_0"]["class"])
    command[-1] = str(tmp_path / "other")
    assert main([*command, "--class", other]) == 3
    again = json.loads((tmp_path / "other" / "explain.json").read_text())["images"]
    assert again[0]["class"] == other
    assert again[0]["predicted"] == rows["cell_0"]["predicted"]


def test_a_segmenter_says_where_a_class_is_not(segmenter: Path, tmp_path: Path) -> None:
    images, out = write_images(tmp_path / "images"), tmp_path / "out"
    network, config = load_model(str(segmenter))
    with torch.no_grad():
        network.segmentation_head[0].bias[:] = torch.tensor([0.0, 1e3, 0.0])
    save_model(str(tmp_path / "sure"), config, network, {})
    command = ["explain", str(tmp_path / "sure"), str(images), "--out", str(out)]
    assert main(command) == 3
    rows = json.loads((out / "explain.json").read_text())["images"]
    assert "give --mpp" in rows[0]["error"]
    command += ["--mpp", "0.5"]
    assert main(command) == 3
    rows = json.loads((out / "explain.json").read_text())["images"]
    assert [row.get("class") for row in rows] == ["mild", "mild", None]
    assert rows[0]["share"] == 1.0
    assert main([*command, "--class", "severe"]) == 3
    rows = json.loads((out / "explain.json").read_text())["images"]
    assert "no pixel is predicted as severe" in rows[0]["error"]


def test_wrong_requests_are_refused(
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = write_images(tmp_path / "images")

    def said(model: Path, *more: str) -> str:
        out = str(tmp_path / "out")
        assert main(["explain", str(model), str(images), "--out", out, *more]) == 2
        return capsys.readouterr().err

    assert "found 'sever'" in said(classifier, "--class", "sever")
    assert "expected a model folder" in said(tmp_path)
    exported = tmp_path / "exported"
    exported.mkdir()
    (exported / "model.yaml").write_bytes((classifier / "model.yaml").read_bytes())
    (exported / "model.onnx").write_bytes(b"")
    assert "has no gradients" in said(exported)
    transformer = build_classifier(Architecture("classifier", "tu-test_vit"), 2).eval()
    with pytest.raises(ConfigError, match="gives no feature map"):
        last_stage(transformer, torch.zeros(1, 3, 160, 160))
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    assert "extra `explain`" in said(classifier)
    assert not (tmp_path / "out").exists()


def test_reports_show_what_spoke_for_an_error(
    classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
    (uri,) = overlays(str(classifier), [(pixels, 2)])
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as drawn:
        wanted = Explainer(str(classifier)).explain(pixels, 2).overlay
        np.testing.assert_array_equal(np.asarray(drawn), wanted)
    monkeypatch.setitem(sys.modules, "pytorch_grad_cam", None)
    assert overlays(str(classifier), [(pixels, 2)]) == [None]
