"""Fine-tuning in phases: what learns when, and which stages matter."""

import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional

from medray.classes import Classes
from medray.datasets.image_folder import ingest_images
from medray.errors import ConfigError
from medray.evaluation.evaluate_image_folder import evaluate_images
from medray.models.classifiers import build_classifier
from medray.models.config import Architecture, ModelConfig
from medray.models.folder import load_model
from medray.models.network import Normalise
from medray.training import trainer as trainer_module
from medray.training.crops import Batch
from medray.training.encoder_stages import (
    find_stages,
    importance,
    most_important,
    weigh_stages,
)
from medray.training.network import build_network
from medray.training.recipe import Recipe, read_recipe
from medray.training.train_model import train, train_with
from medray.training.trainer import Trainer
from medray.training.worker import train_as
from medray.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
HEAD, REST = "{epochs: 1, train: head}", "{epochs: 1, train: all, lr: 0.1}"
TEXT = """
model: {name: classifier, encoder: resnet10t, hidden: 8, norm: true, dropout: 0.1}
scaling: unit
window: {size: 64, stride: 64}
data: {crop: 64}
loss: {dice: 0.0, focal: 0.0, cross_entropy: 1.0}
optimizer: {lr: 2.0e-3}
schedule: {epochs: 3, warmup: 0.0}
augment: {flips: true, rotate: 10, shift: 0.1, fill: reflect}
batch: 8
precision: float32
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of an encoder: as if it had learned something before."""
    path = tmp_path_factory.mktemp("weights") / "encoder.pth"
    torch.manual_seed(4)
    encoder: Any = build_classifier(Architecture("classifier", "resnet10t"), 2).encoder
    torch.save(encoder.state_dict(), path)
    return path


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(TEXT)
    return read_recipe(str(path), overrides)


def trainer_of(recipe: Recipe) -> Trainer:
    contract = ModelConfig(
        architecture=recipe.model, classes=Classes(), window=recipe.window, mpp=None
    )
    return Trainer(ALONE, recipe, contract, 1, 1)


def end_epoch(trainer: Trainer) -> None:
    scores = {"f1": 0.5} | trainer.phases.entry()
    trainer.progress.end_epoch(1, 8, 1.0, scores, "f1")


def some_crops() -> Batch:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (8, 3, 64, 64), dtype=np.uint8)
    masks = np.zeros((8, 64, 64), np.uint8)
    masks[4:] = 1
    return Batch(images, masks, np.zeros(8, np.int64), np.full((8, 2), 64), {})


# --- what learns when -----------------------------------------------------------------


def test_each_phase_changes_its_part_and_nothing_else(
    weights: Path, tmp_path: Path
) -> None:
    phases = f"[{HEAD}, {{epochs: 1, train: last, stages: 2, lr: 0.5}}, {REST}]"
    recipe = recipe_of(tmp_path, f"weights={weights}", f"schedule.phases={phases}")
    trainer = trainer_of(recipe)
    start = {k: v.clone() for k, v in trainer.model.network.state_dict().items()}
    encoder = {k: v for k, v in start.items() if k.startswith("encoder.")}
    read = {f"encoder.{k}": v for k, v in torch.load(weights).items()}
    torch.testing.assert_close(encoder, read)

    def changed() -> set[str]:
        """Parts of which anything differs: weights, or statistics."""
        now = trainer.model.network.state_dict()
        names = (k.split(".") for k, v in now.items() if not torch.equal(v, start[k]))
        return {name[1] if name[0] == "encoder" else name[0] for name in names}

    deep = {"layer3", "layer4"}
    every = {"head", "conv1", "bn1", "layer1", "layer2"} | deep
    rates = []
    for epoch, wanted in enumerate(({"head"}, {"head"} | deep, every)):
        trainer.progress.epoch, trainer.progress.step = epoch, 0
        trainer.train_step([some_crops()])
        assert changed() == wanted
        rates.append(trainer.progress.rate)
        end_epoch(trainer)
    cosine = [1 + np.cos(np.pi * epoch / 3) for epoch in range(3)]
    np.testing.assert_allclose(rates, 1e-3 * np.array([1, 0.5, 0.1]) * cosine)
    assert [entry["train"] for entry in trainer.progress.history] == [
        "head",
        "last",
        "all",
    ]
    assert trainer.progress.history[1]["learning"] == ["layer3", "layer4"]


def test_what_rests_again_stays_as_it_was_left(weights: Path, tmp_path: Path) -> None:
    """Neither momentum nor decay moves it."""
    phases = f"[{REST}, {HEAD}, {{train: all}}]"
    recipe = recipe_of(tmp_path, f"weights={weights}", f"schedule.phases={phases}")
    trainer = trainer_of(recipe)
    trainer.train_step([some_crops()])
    trainer.progress.epoch, trainer.progress.step = 1, 0
    left = {k: v.clone() for k, v in trainer.model.network.state_dict().items()}
    trainer.train_step([some_crops()])
    now = trainer.model.network.state_dict()
    for name, value in left.items():
        if name.startswith("encoder."):
            assert torch.equal(now[name], value), name
    assert not torch.equal(now["head.0.weight"], left["head.0.weight"])


def test_the_head_of_a_segmenter_is_its_decoder(tmp_path: Path) -> None:
    path = tmp_path / "encoder.pth"
    model = "model={name: unet, encoder: tu-mobilenetv3_small_050}"
    plain = recipe_of(tmp_path, model)
    source: Any = build_network(plain, 2)
    torch.save(source.encoder.state_dict(), path)
    phases = f"schedule.phases=[{HEAD}, {{train: all}}]"
    trainer = trainer_of(recipe_of(tmp_path, model, f"weights={path}", phases))
    start = {k: v.clone() for k, v in trainer.model.network.state_dict().items()}
    trainer.train_step([some_crops()])
    now = trainer.model.network.state_dict()
    changed = {k.split(".")[0] for k, v in now.items() if not torch.equal(v, start[k])}
    assert changed == {"decoder", "segmentation_head"}


def test_it_does_not_stop_before_the_last_phase(weights: Path, tmp_path: Path) -> None:
    def epochs(phases: str) -> int:
        recipe = recipe_of(
            tmp_path,
            "schedule.patience=2",
            "schedule.epochs=20",
            f"weights={weights}",
            f"schedule.phases={phases}",
        )
        trainer = trainer_of(recipe)
        while not trainer.progress.is_over(recipe.schedule):
            trainer.progress.loss_sum = 1.0
            end_epoch(trainer)
        return trainer.progress.epoch

    assert epochs("[]") == 3
    assert epochs("[{epochs: 5, train: head}, {train: all}]") == 7
    three = "[{epochs: 5, train: head}, {epochs: 4, train: last, stages: 1}, {lr: 0.1}]"
    assert epochs(three) == 11


# --- stages ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("encoder", "count"),
    [
        ("resnet18", 4),
        ("resnetv2_50", 4),
        ("densenet121", 4),
        ("efficientnet_b0", 7),
        ("vit_tiny_patch16_224", 12),
    ],
)
def test_stages_hold_every_parameter_once_and_in_order(
    encoder: str, count: int
) -> None:
    network = timm.create_model(encoder, num_classes=0).eval()
    stages = find_stages(network)
    assert len(stages) == count
    names = [name for stage in stages for name in stage.parameters]
    assert sorted(names) == sorted(name for name, _ in network.named_parameters())
    seen: list[str] = []
    for stage in stages:
        network.get_submodule(stage.name).register_forward_hook(
            lambda *_, name=stage.name: seen.append(name)
        )
    with torch.inference_mode():
        network(torch.zeros(1, 3, 224, 224))
    assert seen == [stage.name for stage in stages]


def test_importance_is_that_of_a_plain_computation() -> None:
    """Stage after stage by hand, with channels set to their mean by NumPy."""
    torch.manual_seed(0)
    encoder: Any = timm.create_model("resnet10t", num_classes=0).double().eval()
    head = torch.randn(512, 3, dtype=torch.float64)
    images = torch.randn(7, 3, 32, 32, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    parts = ((images[:4], labels[:4]), (images[4:], labels[4:]))

    def loss() -> float:
        each = [
            functional.cross_entropy(encoder(x) @ head, y, reduction="sum").item()
            for x, y in parts
        ]
        return sum(each) / 7

    names = ["layer1", "layer2", "layer3", "layer4"]

    def by_hand(ablated: str | None, half: int) -> float:
        x = encoder.maxpool(encoder.act1(encoder.bn1(encoder.conv1(images))))
        for name in names:
            x = getattr(encoder, name)(x)
            if name == ablated:
                values = x.numpy().copy()
                for channel in range(half, values.shape[1], 2):
                    values[:, channel] = values[:, channel].mean()
                x = torch.from_numpy(values)
        logits = (x.mean(dim=(2, 3)) @ head).numpy()
        shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        return float(-np.log(shares[np.arange(7), labels]).mean())

    found = importance(encoder, find_stages(encoder), loss)
    assert list(found) == names
    with torch.inference_mode():
        whole = by_hand(None, 0)
        for name, value in found.items():
            wanted = (by_hand(name, 0) + by_hand(name, 1)) / 2 - whole
            assert value == pytest.approx(wanted, abs=1e-8), name
            assert abs(value) > 1e-6
        assert loss() == pytest.approx(whole)  # nothing of it stays behind


def test_a_stage_that_tells_nothing_of_an_image_does_not_matter() -> None:
    torch.manual_seed(0)
    encoder: Any = timm.create_model("resnet10t", num_classes=0).eval()
    for parameter in encoder.layer3.parameters():
        torch.nn.init.zeros_(parameter)
    head, images = torch.randn(512, 2), torch.randn(6, 3, 32, 32)

    def loss() -> float:
        labels = torch.tensor([0, 1] * 3)
        return float(functional.cross_entropy(encoder(images) @ head, labels))

    found = importance(encoder, find_stages(encoder), loss)
    assert found["layer3"] == pytest.approx(0, abs=1e-6)


def test_the_most_important_learn() -> None:
    found = {"a": 0.3, "b": -0.1, "c": 0.5, "d": 0.3}
    assert most_important(found, 0.5) == ("c", "d")
    assert most_important(found, 0.75) == ("a", "c", "d")
    assert most_important(found, 0.01) == ("c",)
    assert most_important(found, 0.99) == ("a", "b", "c", "d")


# --- the whole way --------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """32 images of two classes: bright and dark discs on black."""
    folder = tmp_path_factory.mktemp("discs")
    rng = np.random.default_rng(0)
    y, x = np.indices((64, 64))
    for (name, bright), number in itertools.product(
        (("dim", 90), ("lit", 200)), range(16)
    ):
        pixels = np.zeros((64, 64, 3))
        pixels[np.hypot(y - 32, x - 32) < rng.uniform(18, 26)] = bright
        pixels = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255)
        path = folder / "images" / name / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    out = str(folder / "dataset")
    ingest_images(
        str(folder / "images"),
        out=out,
        side=64,
        fractions=(0.5, 0.5, 0),
        executor="local",
    )
    return out


class DeadError(Exception):
    """The process is gone."""


def test_what_was_killed_in_an_adaptive_phase_goes_on_bit_for_bit(
    dataset: str, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = f"[{HEAD}, {{epochs: 1, train: adaptive, share: 0.5}}, {REST}]"
    recipe = recipe_of(
        tmp_path,
        f"weights={weights}",
        f"schedule.phases={phases}",
        "schedule.save_minutes=1e-6",  # after every step
    )

    def trained(out: Path) -> dict[str, Any]:
        def run(recipe: Recipe, contract: ModelConfig, name: str) -> None:
            torch.set_num_threads(1)
            train_as(ALONE, recipe, contract, dataset, str(out), name)

        train_with(run, recipe, dataset, str(out))
        return last(out)

    def last(out: Path) -> dict[str, Any]:
        (path,) = (out / "checkpoints").glob("*-last.pt")
        return torch.load(path, weights_only=True)  # type: ignore[no-any-return]

    whole = trained(tmp_path / "whole")
    train_step = Trainer.train_step

    def dying(self: Trainer, *given: Any) -> Any:
        if (self.progress.epoch, self.progress.step) == (1, 1):
            raise DeadError
        return train_step(self, *given)

    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", dying)
        with pytest.raises(DeadError):
            trained(out)
    state = last(out)
    assert (state["epoch"], state["step"]) == (1, 1)
    weighed = state["decided"][1]
    assert list(weighed) == ["layer1", "layer2", "layer3", "layer4"]
    resting = sorted(weighed, key=lambda name: weighed[name])[:2]
    read = torch.load(weights)
    moved = {
        name.split(".")[0]
        for name, value in read.items()
        if not torch.equal(value, state["network"][f"encoder.{name}"])
    }
    # The stem goes with the first stage.
    wanted = set(weighed) - set(resting)
    assert moved == wanted | ({"conv1", "bn1"} if "layer1" in wanted else set())

    def again(*_: Any) -> Any:
        raise AssertionError("what was decided is decided again")

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "weigh_stages", again)
        resumed = trained(out)
    for name, value in whole["network"].items():
        assert torch.equal(value, resumed["network"][name]), name
    lines = [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["train"] for line in lines] == ["head", "adaptive", "all"]
    assert lines[1]["importance"] == weighed
    assert set(lines[1]["learning"]) == wanted
    page = (out / "training.html").read_text()
    assert "How much each stage mattered" in page
    assert f"{resting[0]} {weighed[resting[0]]:+.3g}" in page

    # Inference scales pixels as training did.
    _, config = load_model(str(out))
    pixels = (
        torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, -1, -1)
    )
    torch.testing.assert_close(Normalise(config)(pixels), pixels / 255)


@pytest.mark.usefixtures("trained_here")
def test_real_x_ray_images_go_through_the_phases_of_their_recipe(
    shared_data: Path, tmp_path: Path
) -> None:
    """With a random encoder in place of ImageNet's."""
    with zipfile.ZipFile(shared_data / "chest_xray.zip") as archive:
        for split, label in itertools.product(
            ("train", "test"), ("NORMAL", "PNEUMONIA")
        ):
            inside = f"chest_xray/{split}/{label}/"
            names = [name for name in archive.namelist() if name.startswith(inside)]
            for name in names[:: len(names) // (40 if split == "train" else 12)]:
                archive.extract(name, tmp_path)
    data = str(tmp_path / "dataset")
    found = ingest_images(
        str(tmp_path / "chest_xray"),
        out=data,
        side=64,
        classes=("NORMAL", "PNEUMONIA"),
        patients=r"^(person\d+|(?:NORMAL2-)?IM-\d+)",
        executor="local",
    )
    assert found.failed == {}
    torch.manual_seed(3)
    encoder: Any = build_classifier(Architecture("classifier", "resnet18"), 2).encoder
    torch.save(encoder.state_dict(), tmp_path / "resnet18.pth")
    phases = "{epochs: 1, train: head}, {epochs: 1, train: last, stages: 2, lr: 0.1}"
    phases += ", {epochs: 1, train: adaptive, share: 0.25}, {train: all, lr: 0.1}"
    done = train(
        "pneumonia-transfer",
        data=data,
        out=str(tmp_path / "model"),
        overrides=[
            "model.encoder=resnet18",
            f"weights={tmp_path / 'resnet18.pth'}",
            "data.crop=64",
            "window.size=64",
            "window.stride=64",
            "schedule.epochs=4",
            f"schedule.phases=[{phases}]",
        ],
    )
    assert done.epochs == 4
    lines = (tmp_path / "model" / "metrics.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    names = ["layer1", "layer2", "layer3", "layer4"]
    assert [entry["train"] for entry in entries] == ["head", "last", "adaptive", "all"]
    assert entries[1]["learning"] == ["layer3", "layer4"]
    weighed = entries[2]["importance"]
    assert list(weighed) == names
    assert entries[2]["learning"] == [max(names, key=weighed.__getitem__)]
    report = evaluate_images(
        str(tmp_path / "model"),
        data=data,
        out=str(tmp_path / "report"),
        executor="local",
    )
    assert report.images == sum(
        1 for _ in (tmp_path / "chest_xray" / "test").rglob("*.jpeg")
    )


# --- head -----------------------------------------------------------------------------


def test_the_head_has_two_layers_and_normalises_between_them() -> None:
    torch.manual_seed(2)
    how = Architecture("classifier", "resnet10t", hidden=6, norm=True, dropout=0.5)
    model: Any = build_classifier(how, 3)
    with torch.inference_mode():
        for _ in range(3):  # statistics of its own
            model.train()(torch.randn(4, 3, 32, 32))
        image = torch.randn(2, 3, 32, 32)
        found = model.eval()(image)
        features = model.encoder(image).double().numpy()
    state = {k: v.double().numpy() for k, v in model.head.state_dict().items()}
    hidden = features @ state["0.weight"].T + state["0.bias"]
    hidden = (hidden - state["1.running_mean"]) / np.sqrt(state["1.running_var"] + 1e-5)
    hidden = np.maximum(hidden * state["1.weight"] + state["1.bias"], 0)
    wanted = hidden @ state["4.weight"].T + state["4.bias"]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


# --- what cannot be -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ("[{epochs: 1, train: tail}]", r"'head', 'last', 'adaptive' or 'all'.*tail"),
        ("[{epoch: 1}]", r"unknown key schedule\.phases\[0\]\.epoch; did you mean"),
        ("{epochs: 1}", "expected a list, each item a mapping"),
        ("[1]", "expected a list, each item a mapping"),
        ("[{epochs: 0}]", r"phases\[0\]\.epochs: expected a number of 1 or more"),
        ("[{lr: 0}]", r"phases\[0\]\.lr: expected a number above 0"),
        ("[{epochs: 2}]", "take 2 epochs, schedule.epochs are 3"),
        ("[{epochs: 3}, {lr: 0.1}]", "take 3 epochs before the last one"),
        ("[{lr: 0.1}, {epochs: 2}]", "only the last phase may do without epochs"),
        ("[{train: last}]", "`stages` of 1 or more"),
        ("[{train: head, stages: 2}]", "`stages` of 1 or more"),
        ("[{epochs: 1}, {train: adaptive}]", "a `share` of the stages"),
        ("[{epochs: 1}, {train: adaptive, share: 1.5}]", r"\[1\]\.share: .* below 1"),
        ("[{epochs: 1}, {share: 0.5}]", "a `share` of the stages"),
        ("[{train: adaptive, share: 0.5}]", "the first cannot be adaptive"),
        ("[{train: head}]", "an encoder of random weights teaches nothing"),
        ("[{train: last, stages: 2}]", r"schedule\.phases=\[\] to train all"),
    ],
)
def test_wrong_phases_are_explained(phases: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(tmp_path, f"schedule.phases={phases}")


@pytest.mark.parametrize(
    ("model", "phase", "message"),
    [
        ("{encoder: resnet18}", "last, stages: 1", "resnet18 of unet has none"),
        (
            "{name: classifier, encoder: resnet10t}",
            "last, stages: 5",
            "the last 5 stages .* resnet10t has 4: layer1, layer2",
        ),
        (
            "{name: classifier, encoder: vit_tiny_patch16_224}",
            "adaptive, share: 0.5",
            "those of vit_tiny_patch16_224 do not",
        ),
    ],
)
def test_phases_that_an_encoder_cannot_go_through_are_explained(
    model: str, phase: str, message: str, tmp_path: Path
) -> None:
    changes = [f"model={model}", f"schedule.phases=[{{epochs: 1}}, {{train: {phase}}}]"]
    recipe = recipe_of(tmp_path, *changes, "data.crop=224")
    with pytest.raises(ConfigError, match=message):
        build_network(recipe, 2)


def test_adaptive_needs_images_that_can_be_read(tmp_path: Path) -> None:
    phases = "schedule.phases=[{epochs: 1}, {train: adaptive, share: 0.5}]"
    trainer = trainer_of(recipe_of(tmp_path, phases))
    batch = some_crops()
    none = np.zeros(0, np.int64)
    empty = Batch(batch.images[:0], batch.masks[:0], none, none.reshape(0, 2), {})
    model, stages = trainer.model, trainer.phases.stages
    encoder: Any = model.network.encoder
    with pytest.raises(ConfigError, match="none could be read"):
        weigh_stages(encoder, stages, model.predict, [empty])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.hidden=0", "set model.hidden"),
        ("scaling=half", "imagenet"),
        ("augment.fill=pink", "border"),
    ],
)
def test_wrong_options_are_explained(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(tmp_path, change)
