"""Exports: what other runtimes say of a model's windows, and what is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from image_cells import write_cells
from sklearn.metrics import f1_score
from wsinfer_zoo.client import validate_config_json

from medray.apps.export import export
from medray.apps.export_agreement import compare, keep
from medray.apps.probe_windows import ProbeWindows
from medray.classes import Classes
from medray.cli import main
from medray.errors import ConfigError, FormatError, MedrayError
from medray.geometry import Rectangle, region_windows
from medray.geometry import Windows as Grid
from medray.inference.infer_run import infer
from medray.inference.run import Options, mask_uri
from medray.models.canvas import RegionPixels
from medray.models.classifiers import build_classifier
from medray.models.config import Architecture, ModelConfig, Prediction, model_digest
from medray.models.folder import load_model, save_model
from medray.models.network import Network
from medray.models.predict import Predictor
from medray.models.seen import write_seen
from medray.models.segmenters import build_segmenter
from medray.storage import ome_zarr

MEAN, STD = (0.7, 0.5, 0.6), (0.2, 0.25, 0.3)


def write_model(folder: Path, *, seed: int, classifier: bool = False) -> Path:
    """A tiny network with random weights, and batch statistics of its own."""
    torch.manual_seed(seed)
    name = "classifier" if classifier else "unet"
    architecture = Architecture(
        name, "tu-test_resnet", attention=8 if classifier else 0
    )
    build = build_classifier if classifier else build_segmenter
    network = build(architecture, 2).train()
    with torch.no_grad():
        network(torch.randn(4, 3, 64, 64))
    config = ModelConfig(
        architecture=architecture,
        classes=Classes(("healthy", "sick")),
        window=Grid(64, 64 if classifier else 48),
        mpp=0.5,
        mean=MEAN,
        std=STD,
    )
    save_model(str(folder), config, network, {"f1": None})
    write_seen(str(folder), {"blake2b:1": "train"})
    return folder


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("export") / "segmenter", seed=3)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "classifier"
    return write_model(folder, seed=4, classifier=True)


@pytest.fixture(scope="module")
def slide(slides: Path) -> str:
    return str(next(iter(sorted((slides / "slides").iterdir()))))


@pytest.fixture(scope="module")
def exported(
    segmenter: Path, slide: str, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for name in ("pt2", "onnx"):
        export(str(segmenter), format=name, out=str(folder / name), data=slide)
    return {name: folder / name for name in ("pt2", "onnx")}


def pixels_of(count: int, seed: int = 0) -> np.ndarray:
    """Blobs of colour: noise alone would all look the same to a network."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return coarse.repeat(8, 1).repeat(8, 2)


def by_hand(model: Path, pixels: np.ndarray) -> torch.Tensor:
    """Logits of the model as it was trained, its inputs normalised by the textbook."""
    inputs = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    network, _ = load_model(str(model))
    with torch.inference_mode():
        return network(torch.from_numpy(np.moveaxis(inputs, 3, 1)).float())


def normalised(pixels: np.ndarray) -> np.ndarray:
    inputs = (pixels / 255 - np.array(MEAN)) / np.array(STD)
    return np.ascontiguousarray(np.moveaxis(inputs, 3, 1), np.float32)


@pytest.mark.parametrize("count", [1, 3])
def test_other_runtimes_give_the_models_logits(
    segmenter: Path, exported: dict[str, Path], count: int
) -> None:
    """Each read by its own runtime alone, for any number of windows."""
    pixels = pixels_of(count)
    wanted = by_hand(segmenter, pixels)
    program = torch.export.load(exported["pt2"] / "model.pt2").module()
    session = onnxruntime.InferenceSession(exported["onnx"] / "model.onnx")
    found = {
        "pt2": program(torch.from_numpy(normalised(pixels))).detach(),
        "onnx": torch.from_numpy(
            session.run(["logits"], {"images": normalised(pixels)})[0]
        ),
    }
    for logits in found.values():
        torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)


def test_an_exported_folder_is_a_model_folder(
    segmenter: Path, exported: dict[str, Path]
) -> None:
    """Its configuration is the model's, and so is what the predictor makes of
    windows."""
    before, contract = load_model(str(segmenter))
    cpu = torch.device("cpu")
    pixels = torch.from_numpy(pixels_of(4))
    wanted = Network(before, contract, cpu, torch.float32)(pixels)
    for folder in exported.values():
        network, config = load_model(str(folder))
        assert config == contract
        with torch.inference_mode():
            found = Network(network, config, cpu, torch.float32)(pixels)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
        assert (folder / "seen.txt").read_text() == "blake2b:1 train\n"
    digests = {model_digest(str(folder)) for folder in (segmenter, *exported.values())}
    assert len(digests) == 3
    metadata = onnx.load(exported["onnx"] / "model.onnx").metadata_props
    contract_there = json.loads({p.key: p.value for p in metadata}["medray"])
    assert (contract_there["mpp"], contract_there["mean"]) == (0.5, list(MEAN))


def test_masks_of_exports_are_the_models(
    segmenter: Path, exported: dict[str, Path]
) -> None:
    """Predicted as a GPU worker does it: threads that each take batches of their
    own."""
    pixels = pixels_of(12, seed=1).reshape(2, 6, 64, 64, 3)
    pixels = pixels.transpose(0, 2, 1, 3, 4).reshape(128, 384, 3)
    grid = Grid(64, 48)
    plan = region_windows(Rectangle(0, 0, 128, 384), 128, 384, grid, "crop")
    halo = plan.halo
    source = np.pad(
        pixels, ((0, halo.bottom - 128), (0, halo.right - 384), (0, 0)), "symmetric"
    )
    masks = []
    for folder in (segmenter, *exported.values()):
        how = Prediction(precision="float32")
        predictor = Predictor.from_folders([str(folder)], how, batch=4, threads=2)
        found = list(predictor.predict([RegionPixels(source, plan, 128, 384)] * 3))
        masks.append(np.stack([part.labels for part in found]))
    assert 0 < masks[0].mean() < 1
    for mask in masks[1:]:
        assert (mask == masks[0]).mean() > 0.999


def test_what_was_found_is_told(
    segmenter: Path, exported: dict[str, Path], slide: str
) -> None:
    for name, folder in exported.items():
        told = json.loads((folder / "export.json").read_text())
        assert (told["format"], told["compared"]) == (name, 32)
        assert told["source"] == f"slide {Path(slide).name}"
        assert told["agreement"] >= 0.999
        assert told["largest_difference"] < 0.01
        assert told["speed_up"] > 0
        assert told["file_bytes"] == (folder / told["file"]).stat().st_size
        assert told["model_bytes"] == (
            (segmenter / "weights.safetensors").stat().st_size
        )
        assert (told["f1"], told["model_f1"]) == (None, None)


def test_an_export_of_another_network_is_refused(
    segmenter: Path, exported: dict[str, Path], tmp_path: Path
) -> None:
    """A whole export, but of other weights; nothing of it is left."""
    network, config = load_model(str(segmenter))
    with torch.no_grad():  # the classes change places everywhere
        last = network.segmentation_head[0]
        last.weight.neg_()
        last.bias.neg_()
    other = Network(network, config, torch.device("cpu"), torch.float32)
    out = tmp_path / "out"
    windows = ProbeWindows(pixels_of(3), None, "blobs")
    with pytest.raises(
        MedrayError, match=r"out: the export has .* \d\.\d\d% of pixels"
    ):
        keep(str(exported["onnx"]), str(out), other, config, windows, 0.999)
    assert not out.exists()


@pytest.mark.parametrize("classifies", [True, False])
def test_a_comparison_is_right(classifies: bool) -> None:
    """Of two made-up runs, against scikit-learn and NumPy."""
    rng = np.random.default_rng(5)
    shape = (7, 3, 1, 1) if classifies else (7, 3, 64, 64)
    one = rng.normal(size=shape).astype(np.float32)
    two = one + rng.normal(0, 0.5, size=shape).astype(np.float32)
    truth = one.argmax(1).astype(np.uint8)
    truth[::2] = rng.integers(0, 3, truth[::2].shape)
    pixels = np.zeros((7, 64, 64, 3), np.uint8)
    pixels[:, 0, 0, 0] = range(7)  # so that a run knows which it is given

    def run(logits: np.ndarray) -> Callable[[torch.Tensor], torch.Tensor]:
        whole = np.broadcast_to(logits, (7, 3, 64, 64))
        return lambda windows: torch.from_numpy(whole[windows[:, 0, 0, 0].numpy()])

    config = ModelConfig(
        architecture=Architecture("classifier" if classifies else "unet"),
        classes=Classes(("a", "b", "c")),
        window=Grid(64, 64),
        mpp=None,
    )
    found = compare(run(one), run(two), config, ProbeWindows(pixels, truth, ""))

    def shares(logits: np.ndarray) -> np.ndarray:
        powers = np.exp(logits)
        return powers / powers.sum(1, keepdims=True)

    def f1(logits: np.ndarray) -> float:
        labels = None if classifies else [1, 2]
        args = (truth.ravel(), logits.argmax(1).ravel())
        return float(f1_score(*args, labels=labels, average="macro"))

    assert found.agreement == pytest.approx((one.argmax(1) == two.argmax(1)).mean())
    largest = np.abs(shares(one) - shares(two)).max()
    assert found.largest_difference == pytest.approx(largest, abs=1e-5)
    assert (found.model_f1, found.f1) == pytest.approx((f1(one), f1(two)))
    # What is no number agrees with nothing.
    broken = compare(
        run(one), run(np.full_like(one, np.nan)), config, ProbeWindows(pixels, None, "")
    )
    assert broken.largest_difference == np.inf


def test_wsinfer_finds_what_it_needs(classifier: Path, tmp_path: Path) -> None:
    """Against WSInfer's own check of its configuration, and its steps by hand."""
    out = tmp_path / "wsinfer"
    export(str(classifier), format="wsinfer", out=str(out))
    config = json.loads((out / "config.json").read_text())
    validate_config_json(config)
    assert config["class_names"] == ["healthy", "sick"]
    assert (config["patch_size_pixels"], config["spacing_um_px"]) == (64, 0.5)
    names = [step["name"] for step in config["transform"]]
    assert names == ["Resize", "ToTensor", "Normalize"]
    arguments = config["transform"][2]["arguments"]
    assert (arguments["mean"], arguments["std"]) == (list(MEAN), list(STD))
    script = torch.jit.load(out / "torchscript_model.pt")
    pixels = pixels_of(5)
    found = script(torch.from_numpy(normalised(pixels)))
    torch.testing.assert_close(found, by_hand(classifier, pixels), rtol=1e-3, atol=1e-3)
    told = json.loads((out / "export.json").read_text())
    assert told["source"].startswith("a generated slide")


def test_wrong_requests_are_refused(
    segmenter: Path,
    classifier: Path,
    exported: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    def said(model: Path, format: str, to: Path = out) -> str:
        arguments = ["export", str(model), "--format", format, "--out", str(to)]
        assert main(arguments) == 2
        return capsys.readouterr().err

    assert "expected a model folder" in said(tmp_path, "onnx")
    assert "expected one of ['pt2', 'onnx'" in said(segmenter, "tflite")
    assert "WSInfer classifies patches" in said(segmenter, "wsinfer")
    assert "comes from `medray export`" in said(exported["pt2"], "onnx")
    assert "holds a model" in said(segmenter, "onnx", exported["pt2"])
    if not torch.cuda.is_available():
        assert "needs an NVIDIA GPU" in said(segmenter, "tensorrt")
    config = load_model(str(classifier))[1]
    for problem, changed in (
        ("microns per pixel", replace(config, mpp=None)),
        ("its own mean and deviation", replace(config, zscore=True)),
    ):
        folder = tmp_path / problem[:5]
        save_model(str(folder), changed, load_model(str(classifier))[0], {})
        assert problem in said(folder, "wsinfer")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "extra `export`" in said(segmenter, "int8")
    with pytest.raises(ConfigError, match=r"model\.onnx: needs onnxruntime.*`export`"):
        load_model(str(exported["onnx"]))
    assert not out.exists()


@pytest.mark.parametrize("name", ["pt2", "onnx"])
def test_damaged_and_ill_fitting_files_are_named(
    exported: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(exported[name], folder)
    contract = yaml.safe_load((folder / "model.yaml").read_text())
    contract["classes"]["names"] = ["healthy", "ill", "sick"]
    (folder / "model.yaml").write_text(yaml.safe_dump(contract))
    with pytest.raises(FormatError, match=rf"model\.{name}: .*64 px.*3 classes.*found"):
        load_model(str(folder))
    file = folder / f"model.{name}"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(FormatError, match=rf"model\.{name}: expected a network"):
        load_model(str(folder))


def test_workers_take_exports(
    cluster: None,
    segmenter: Path,
    exported: dict[str, Path],
    slides: Path,
    tmp_path: Path,
) -> None:
    """Each in a process of Ray, as every run has it."""
    options = Options(everywhere=True, prediction=Prediction(precision="float32"))
    masks = {}
    for name, folder in {"model": segmenter, **exported}.items():
        out = tmp_path / name
        found = [str(slides / "slides")]
        done = infer(found, model=str(folder), out=str(out), options=options)
        assert (done.done, done.failed) == (4, {})
        rows = pq.read_table(out / "slides.parquet").to_pylist()
        masks[name] = [
            np.asarray(ome_zarr.open_level(mask_uri(str(out), row["slide"]))[:])
            for row in sorted(rows, key=lambda row: row["slide"])
        ]
    for name in exported:
        for mask, plain in zip(masks[name], masks["model"], strict=True):
            assert (mask == plain).mean() > 0.999
    assert all(0 < mask.mean() < 1 for mask in masks["model"])


def test_inference_and_evaluation_take_exports(
    classifier: Path, tmp_path: Path
) -> None:
    """Images through the model, and through int8 and pt2 exports of it."""
    from medray.datasets.dataset import read_patches, slide_uri
    from medray.datasets.image_folder import ingest_images
    from medray.evaluation.evaluate_image_folder import evaluate_images

    cells = write_cells(tmp_path / "cells", patients=20, each=6)
    data = str(tmp_path / "data")
    ingest_images(
        str(cells), out=data, side=64, fractions=(0.4, 0.1, 0.5), executor="local"
    )
    found = {}
    for name in ("int8", "pt2"):
        out = str(tmp_path / name)
        done = export(str(classifier), format=name, out=out, data=data, agreement=0.5)
        found[name] = evaluate_images(
            out, data=data, out=str(tmp_path / f"r-{name}"), executor="local"
        )
        rows = read_patches(data, "test")
        assert done.source == "split test of dataset data"
        assert done.compared == (len(rows) if name == "pt2" else len(rows) * 2 // 3)
    assert done.file_bytes > 0
    before = evaluate_images(
        str(classifier), data=data, out=str(tmp_path / "before"), executor="local"
    )
    assert found["pt2"].f1 == pytest.approx(before.f1, abs=0.02)
    assert found["pt2"].images == found["int8"].images == before.images
    # The same images by hand, against what the export said of the model.
    pixels, truth = [], []
    for row in rows:
        sheet = ome_zarr.open_level(slide_uri(data, row["slide"]))
        y, x = row["y"], row["x"]
        pixels.append(np.moveaxis(sheet[:, y : y + 64, x : x + 64], 0, 2))
        truth.append(int(np.argmax(row["class_px"])))
    labels = by_hand(classifier, np.stack(pixels)).argmax(1).numpy()
    assert done.model_f1 == pytest.approx(f1_score(truth, labels), abs=0.02)
    other = tmp_path / "other"
    shutil.copytree(classifier, other)
    contract = yaml.safe_load((other / "model.yaml").read_text())
    contract["classes"]["names"] = ["sick", "healthy"]
    (other / "model.yaml").write_text(yaml.safe_dump(contract))
    with pytest.raises(ConfigError, match="its classes"):
        export(str(other), format="pt2", out=str(tmp_path / "no"), data=data)
    assert not (tmp_path / "no").exists()
