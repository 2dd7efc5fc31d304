from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medray.errors import ConfigError
from medray.ingest import ingest
from medray.models.augment import augment_batch, build_augmentation
from medray.models.config import model_digest, read_config
from medray.models.folder import load_model, save_model
from medray.models.losses import SegmentationLoss
from medray.patches import read_train, usable_patches
from medray.recipe import Augment, Data, Loss, Recipe, Schedule, read_recipe
from medray.settings import write_settings
from medray.train import train

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")))
def test_every_recipe_reads(path: Path) -> None:
    assert read_recipe(str(path), ["batch=4"]).batch == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optimiser: {lr: 1}", "unknown key optimiser; did you mean optimizer"),
        ("data: {crp: 64}", "unknown key data.crp; did you mean data.crop"),
        ("batch: many", "r.yaml.*batch"),
        ("data: {crop: 100}", "multiple of 32"),
        ("workers: 3", "multiple of workers"),
        ("- a", "expected a mapping"),
        ("a: [", "expected YAML"),
        ("batch: !!python/object/apply:os.system ['true']", "expected YAML"),
    ],
)
def test_a_wrong_recipe_is_explained(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_recipe(str(path))


def test_a_recipe_comes_back_as_it_was_written(tmp_path: Path) -> None:
    recipe = Recipe(data=Data(crop=64), loss=Loss(dice=0.5), seed=3)
    write_settings(str(tmp_path / "r.yaml"), recipe)
    assert read_recipe(str(tmp_path / "r.yaml")) == recipe
    changed = read_recipe(str(tmp_path / "r.yaml"), ["data.crop=96"])
    assert changed == replace(recipe, data=Data(crop=96))


def test_image_and_mask_are_changed_together() -> None:
    rng = torch.Generator().manual_seed(0)
    masks = torch.randint(0, 2, (16, 32, 32), generator=rng, dtype=torch.uint8)
    images = (masks * 255)[:, None].repeat(1, 3, 1, 1)
    only_flips = Augment(brightness=0, contrast=0, saturation=0, hue=0)
    transform = build_augmentation(only_flips)
    changed, labels = augment_batch(transform, images, masks, seed=1)
    torch.testing.assert_close(changed[:, 0] > 0, labels > 0)
    assert not torch.equal(labels, masks)
    again = augment_batch(transform, images, masks, seed=1)[1]
    torch.testing.assert_close(again, labels)
    other = augment_batch(transform, images, masks, seed=2)[1]
    assert not torch.equal(other, labels)


def test_augmentation_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    images, masks = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, 8, 8)
    augment_batch(build_augmentation(Augment()), images, masks.byte(), seed=1)
    torch.testing.assert_close(torch.rand(3), expected)


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


@pytest.fixture(scope="module")
def dataset(
    cluster: None, slides: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("data")
    ingest(
        [str(slides / "slides")],
        annotations=str(slides / "annotations"),
        groups=str(slides / "groups.csv"),
        fractions=(0.5, 0.5, 0.0),
        out=str(out),
    )
    return out


def test_the_order_is_a_function_of_the_seed_alone(dataset: Path) -> None:
    recipe = Recipe(data=Data(crop=64))
    patches = len(usable_patches(str(dataset), "train", recipe))
    ids = np.arange(2 * patches)

    def read(recipe: Recipe, rank: int, ids: np.ndarray) -> np.ndarray:
        part = read_train({"id": ids}, recipe=recipe, data=str(dataset), rank=rank)
        assert part["image"].shape[1:] == (3, 64, 64)
        return part["image"]

    alone = read(recipe, 0, ids)
    np.testing.assert_array_equal(alone, read(recipe, 0, ids))
    two = replace(recipe, workers=2)
    np.testing.assert_array_equal(alone[0::2], read(two, 0, ids[: len(alone[0::2])]))
    np.testing.assert_array_equal(alone[1::2], read(two, 1, ids[: len(alone[1::2])]))
    assert (alone[:patches] != alone[patches:]).any()
    assert (alone != read(replace(recipe, seed=1), 0, ids)).any()


def test_a_training_learns_resumes_and_is_not_done_twice(
    dataset: Path, tmp_path: Path
) -> None:
    recipe = Recipe(data=Data(crop=96), schedule=Schedule(epochs=2), batch=4)
    write_settings(str(tmp_path / "r.yaml"), recipe)
    out = tmp_path / "model"
    first = train(str(tmp_path / "r.yaml"), data=str(dataset), out=str(out))
    assert (first.trained, first.epochs) == (True, 2)
    network, config = load_model(str(out))
    assert config.mpp == pytest.approx(0.5)
    assert config.made_from["recipe"]["data"]["crop"] == 96
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    again = train(str(tmp_path / "r.yaml"), data=str(dataset), out=str(out))
    assert (again.trained, again.epochs, again.f1) == (False, 2, first.f1)
    with pytest.raises(ConfigError, match="another recipe or dataset"):
        train(
            str(tmp_path / "r.yaml"),
            data=str(dataset),
            out=str(out),
            overrides=["seed=9"],
        )
    # As if it had died after its last checkpoint: it goes on from there, and ends with
    # the very weights.
    (out / "model.yaml").unlink()
    resumed = train(str(tmp_path / "r.yaml"), data=str(dataset), out=str(out))
    assert (resumed.trained, resumed.epochs) == (True, 2)
    for name, weight in load_model(str(out))[0].state_dict().items():
        assert torch.equal(weight, network.state_dict()[name]), name


def test_pointless_trainings_are_refused(dataset: Path, tmp_path: Path) -> None:
    write_settings(str(tmp_path / "r.yaml"), Recipe())
    recipe, out = str(tmp_path / "r.yaml"), str(tmp_path / "m")
    with pytest.raises(ConfigError, match="dataset.yaml is missing"):
        train(recipe, data=str(tmp_path), out=out)
    with pytest.raises(ConfigError, match="64 asked for"):
        train(recipe, data=str(dataset), out=out, overrides=["workers=64", "batch=64"])
