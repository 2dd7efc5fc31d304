import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from medray import cli
from medray.errors import ConfigError
from medray.models.config import model_digest, read_config
from medray.models.folder import load_model, save_model
from medray.storage.yaml_config import write_settings
from medray.training.augment import Augment
from medray.training.distillation import Unlabelled
from medray.training.finetuning import Phase
from medray.training.identity import provenance_of
from medray.training.losses import Loss, SegmentationLoss
from medray.training.optim import Optimizer
from medray.training.recipe import Prune, Recipe, read_recipe
from medray.training.recipe_files import RECIPES
from medray.training.sampler import Data
from medray.training.schedule import Schedule


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")))
def test_every_recipe_reads(path: Path) -> None:
    assert read_recipe(str(path), ["batch=4"]).batch == 4


@pytest.mark.parametrize("words", [["train"], ["train", "--labels", "l"], ["tune"]])
def test_an_unknown_name_is_a_wrong_request(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*words, "unt", "--data", "d", "--out", "m"]) == 2
    assert "unt: no recipe" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser: {lr: 1}", "unknown key optimiser; did you mean optimizer"),
        ("data: {crp: 64}", "unknown key data.crp; did you mean data.crop"),
        ("batch: many", "r.yaml: batch: expected a whole number, found 'many'"),
        ("optimizer: 4", "optimizer: expected a mapping of keys to values, found 4"),
        ("loss: {dice: 0, focal: 0}", "loss: .* are all 0"),
        ("workers: [1, 2, 3]", "r.yaml: workers: .* a list of 2 items, found"),
        ("workers: [2]", r"r.yaml: workers: expected a list of 2 items, found \[2\]"),
        ("workers: []", r"workers: expected a list of 2 items, found \[\]"),
        ("workers: [true, 2]", r"workers\[0\]: expected a whole number, found True"),
        ("workers: true", "workers: expected a whole number or a list, found True"),
        ("batch: true", "r.yaml: batch: expected a whole number, found True"),
        ("batch: 8.0", "batch: expected a whole number, found 8.0"),
        ("seed: true", "seed: expected a whole number, found True"),
        ("micro_batch_size: true", "micro_batch_size: expected a whole number, found"),
        ("window: {size: 512.0}", "window.size: expected a whole number, found 512.0"),
        ("optimizer: {lr: true}", "optimizer.lr: expected a number, found True"),
        ("data: {balance: 1}", "data.balance: expected true or false, found 1"),
        (
            "schedule: {phases: [{epochs: 1.0}]}",
            r"schedule.phases\[0\].epochs: expected a whole number, found 1.0",
        ),
        ("{batch: x, seed: y}", "batch: expected .*'x'; seed: expected .*'y'"),
        ("data: {crop: 100}", "data.crop: expected a multiple of 32 .*found 100"),
        ("workers: 3", "multiple of workers"),
        ("- a", "expected a mapping"),
        ("a: [", "expected YAML"),
        ("a: 2024-13-45", "r.yaml: expected YAML, found month must be in 1..12"),
        pytest.param("[" * 5000, "r.yaml: .* nests too deeply", id="deep"),
        (
            "data: {crop: [64, 100]}",
            r"data.crop\[1\]: expected a multiple of 32, found 100",
        ),
        ("data: {crop: []}", "data.crop: expected .* a list of 1 items or more"),
        ("data: {hard: 2}", "data.hard: expected a number up to 1, found 2"),
        ("data: {hard: 0.5, balance: true}", "not with data.balance"),
        ("workers: [2, 1]", "fewest and most|workers"),
        ("{batch: 8, micro_batch_size: 3}", "divisor of batch"),
        ("{batch: 8, micro_batch_size: 8, workers: 2}", "set micro_batch_size to 4"),
        (
            "optimizer: {name: rmsprop}",
            "name: expected 'adamw', 'adam' or 'sgd', found",
        ),
        ("optimizer: {lr: 0}", "optimizer.lr: expected a number above 0, found 0"),
        ("optimizer: {average: 1}", "optimizer.average: expected a number below 1"),
        ("schedule: {name: linear}", "schedule"),
        ("schedule: {epochs: 0}", "schedule.epochs: expected a number of 1 or more"),
        ("schedule: {decay: 2}", "decay"),
        ("augment: {hue: 0.7}", "augment.hue: expected a number up to 0.5, found 0.7"),
        ("augment: {elastic: -1}", "elastic"),
        ("prune: {model: m, share: 1}", "prune.share"),
        ("teacher: {soft: 1}", "teacher.model: expected a value, found none"),
        ("precision: float8", "precision"),
        ("seed: -1", "seed: expected a number of 0 or more, found -1"),
        ("seed: 9223372036854775808", r"seed: expected a number below 9.22337e\+18"),
        ("optimizer: {lr: .inf}", "optimizer.lr: expected a finite number, found inf"),
        ("optimizer: {weight_decay: .nan}", "weight_decay: expected a finite number"),
        ("optimizer: {clip: .inf}", "optimizer.clip: expected a finite number"),
        ("optimizer: {lr: inf}", "optimizer.lr: expected a finite number, found 'inf'"),
        ("loss: {l2: .inf}", "loss.l2: expected a finite number"),
        ("schedule: {save_minutes: .inf}", "save_minutes: expected a finite number"),
        ("augment: {rotate: .inf}", "augment.rotate: expected a finite number"),
        ("augment: {shear: .nan}", "augment.shear: expected a finite number"),
        ("augment: {elastic: .inf}", "augment.elastic: expected a finite number"),
        ("teacher: {model: m, soft: .inf}", "teacher.soft: expected a finite number"),
        ("schedule: {phases: [{lr: .inf}]}", r"phases\[0\].lr: expected a finite"),
        ("batch: !!python/object/apply:os.system ['true']", "expected YAML"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(str(path))


@pytest.mark.parametrize(
    "kind",
    [Augment, Data, Loss, Optimizer, Phase, Prune, Recipe, Schedule, Unlabelled],
)
def test_an_unknown_argument_is_refused(kind: type[Any]) -> None:
    with pytest.raises(ValidationError, match="bacth"):
        kind(bacth=16)


def test_a_text_may_be_a_number(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("{batch: '8', optimizer: {lr: 1e-4, clip: 2}, workers: [1, '2']}")
    recipe = read_recipe(str(path))
    assert recipe.batch == 8
    assert recipe.workers == (1, 2)
    assert (recipe.optimizer.lr, recipe.optimizer.clip) == (1e-4, 2.0)


@pytest.mark.parametrize(
    "override", ["batch=[1", "batch={a", "batch=*a", "batch=2024-02-30"]
)
def test_a_wrong_override_is_explained(override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{override}: expected YAML")):
        read_recipe("unet", [override])


def test_a_file_of_bytes_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="r.yaml: expected YAML"):
        read_recipe(str(path))


def test_a_recipe_comes_back_as_it_was_written(tmp_path: Path) -> None:
    recipe = Recipe(data=Data(crop=64), loss=Loss(dice=0.5), seed=3)
    write_settings(str(tmp_path / "r.yaml"), recipe)
    assert read_recipe(str(tmp_path / "r.yaml")) == recipe
    changed = read_recipe(str(tmp_path / "r.yaml"), ["data.crop=96"])
    assert changed == replace(recipe, data=Data(crop=96))


def test_loss_falls_with_better_predictions() -> None:
    labels = torch.randint(0, 2, (2, 16, 16))
    loss = SegmentationLoss(Loss())
    right = torch.nn.functional.one_hot(labels, 2).permute(0, 3, 1, 2).float() * 10
    assert loss(right, labels) < loss(torch.zeros_like(right), labels)
    assert loss(torch.zeros_like(right), labels) < loss(-right, labels)


def test_damaged_weights_are_named(model: Path, tmp_path: Path) -> None:
    network, config = load_model(str(model))
    save_model(str(tmp_path), config, network, {"f1": 0.5})
    assert model_digest(str(tmp_path)) == model_digest(str(model))
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"\x80\x04pickled")
    with pytest.raises(Exception, match="weights.safetensors.*expected the weights"):
        load_model(str(tmp_path))
    with pytest.raises(ConfigError, match="model.yaml"):
        read_config(str(tmp_path / "absent"))


def test_the_model_card_says_what_is_handed_over(model: Path, tmp_path: Path) -> None:
    network, config = load_model(str(model))
    made = {"epochs": 3, "digest": "blake2b:1", "recipe": {"weights": "/a/lite.st"}}
    of_class = {"class": "tumour", "f1": 0.5, "precision": 0.4, "recall": None}
    metrics = {"f1": 0.5, "epoch": 1, "per_class": [of_class], "warnings": ["few"]}
    save_model(str(tmp_path), replace(config, provenance=made), network, metrics)
    lines = (tmp_path / "README.md").read_text().split("\n")
    assert "pipeline_tag: image-segmentation" in lines
    for said in (
        f"| digest | {model_digest(str(tmp_path))} |",
        f"| classes | {', '.join(config.classes.names)} |",
        "| first weights | lite.st |",
        "| epochs | 3; taken: 2 |",
        "| F1 | 0.5000 |",
        "| tumour | 0.5000 | 0.4000 | - | - |",
        "- Warning: few",
    ):
        assert said in lines


def test_a_training_keeps_the_name_that_medray_0_1_gave_it(tmp_path: Path) -> None:
    """So a finished one is known, and one that was killed goes on."""
    (tmp_path / "dataset.yaml").write_text("classes:\n  names: [a, b]\n")
    (tmp_path / "patches.parquet").write_text("patches")
    # Of images, whose patches have digests; of slides those count now, too.
    (tmp_path / "images.parquet").touch()
    named = provenance_of(read_recipe("unet"), str(tmp_path))
    assert named["digest"] == "blake2b:bdd0e1a7f8fd4d05cf04df6706323097"
    assert named["recipe"]["micro_batch_size"] is None
