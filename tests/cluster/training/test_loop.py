"""The training loop in one process, and those that read: what it promises."""

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medray.classes import Classes
from medray.datasets.dataset import read_dataset
from medray.errors import MedrayError
from medray.geometry import Windows
from medray.models.config import Architecture, ModelConfig
from medray.models.folder import load_model, save_model
from medray.models.network import Network
from medray.training.augment import Augment
from medray.training.crops import Batch
from medray.training.distillation import Teacher, Unlabelled
from medray.training.losses import Loss
from medray.training.model import TrainingModel
from medray.training.optim import Optimizer
from medray.training.recipe import Recipe
from medray.training.sampler import Data
from medray.training.schedule import Schedule
from medray.training.trainer import Trainer
from medray.training.validation import Validation
from medray.training.worker import train_as
from medray.training.world import World

ALONE = World(0, 1, torch.device("cpu"))
SMALL = Recipe(
    model=Architecture("unet", "tu-mobilenetv3_small_050"),
    data=Data(crop=64, samples=16),
    batch=4,
    schedule=Schedule(epochs=2),
    precision="float32",
)


@pytest.fixture(scope="module")
def dataset(training_data: str) -> str:
    return training_data


def model_config(dataset: str, recipe: Recipe) -> ModelConfig:
    return ModelConfig(
        architecture=recipe.model,
        classes=read_dataset(dataset).classes,
        window=Windows(128, 96),
        mpp=0.5,
        stain=recipe.stain,
    )


def run(dataset: str, out: Path, recipe: Recipe) -> dict:
    """Train; give the weights of the last step."""
    torch.set_num_threads(1)
    train_as(ALONE, recipe, model_config(dataset, recipe), dataset, str(out), "t")
    state = torch.load(out / "checkpoints" / "t-last.pt", weights_only=True)
    return state["network"]


def history(out: Path) -> list[dict]:
    return [
        json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()
    ]


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


class DeadError(Exception):
    """The process is gone."""


def test_what_was_killed_and_resumed_has_the_same_weights(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: killed in the middle of an epoch, and at its end."""
    recipe = replace(
        SMALL,
        optimizer=Optimizer(average=0.9),
        augment=Augment(rotate=10, stain=0.1),
        schedule=Schedule(epochs=2, save_minutes=1e-6),  # after every step
    )
    whole = run(dataset, tmp_path / "whole", recipe)
    train_step = Trainer.train_step
    for deaths in (3,):  # of the 4 steps of an epoch
        done = 0

        def dying(self, batches, failure=None, *, deaths=deaths):
            nonlocal done
            done += 1
            if done > deaths:
                raise DeadError
            return train_step(self, batches, failure)

        monkeypatch.setattr(Trainer, "train_step", dying)
        out = tmp_path / f"killed-{deaths}"
        for _ in range(8 // deaths + 1):
            done = 0
            try:
                weights = run(dataset, out, recipe)
            except DeadError:
                continue
            break
        assert_same(whole, weights)
        times = ("seconds", "crops_per_second", "waiting")
        for one, other in zip(history(tmp_path / "whole"), history(out), strict=True):
            for name in one.keys() - set(times):
                assert one[name] == other[name], name


def test_seed_decides_everything(dataset: str, tmp_path: Path) -> None:
    recipe = replace(SMALL, schedule=Schedule(epochs=1))
    one, again = (run(dataset, tmp_path / name, recipe) for name in "ab")
    assert_same(one, again)
    other = Trainer(ALONE, replace(recipe, seed=1), model_config(dataset, recipe), 4, 1)
    first = Trainer(ALONE, recipe, model_config(dataset, recipe), 4, 1)
    weights = first.model.network.state_dict()
    assert any(
        not v.equal(weights[k]) for k, v in other.model.network.state_dict().items()
    )


def test_a_step_in_parts_is_the_whole_step(dataset: str) -> None:
    """Accumulated gradients are those of the batch (with a loss that is a mean)."""
    whole = replace(
        SMALL,
        loss=Loss(dice=0, focal=0, cross_entropy=1),
        optimizer=Optimizer(name="sgd", lr=0.1, clip=0),
        model=Architecture("fcn8s", "vgg16"),  # without batch normalisation
        augment=Augment(False, brightness=0, contrast=0, saturation=0, hue=0),
        schedule=Schedule(epochs=1, warmup=0),
    )
    parts = replace(whole, micro_batch_size=1)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (4, 3, 64, 64), dtype=np.uint8)
    masks = rng.integers(0, 2, (4, 64, 64), dtype=np.uint8)
    sizes = np.full((4, 2), 64)

    def batch(some: slice) -> Batch:
        patches = np.arange(4)[some]
        return Batch(images[some], masks[some], patches, sizes[some], {})

    results = []
    for recipe, batches in (
        (whole, [batch(slice(0, 4))]),
        (parts, [batch(slice(i, i + 1)) for i in range(4)]),
    ):
        trainer = Trainer(ALONE, recipe, model_config(dataset, recipe), 4, 1)
        loss, failure = trainer.train_step(batches)
        assert failure is None
        results.append((loss, trainer.model.network.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for name, weight in results[0][1].items():
        torch.testing.assert_close(weight, results[1][1][name], rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_no_number_stops_with_the_batch_kept(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(SMALL, augment=Augment(False, 0, 0, 0, 0))
    real = TrainingModel.loss
    steps = 0

    def spoilt(self, batch, seed, step):
        nonlocal steps
        steps += 1
        loss, of_crops = real(self, batch, seed, step)
        return loss * torch.nan if steps == 3 else loss, of_crops

    monkeypatch.setattr(TrainingModel, "loss", spoilt)
    with pytest.raises(MedrayError, match="step 2 is not a number; lower optimizer.lr"):
        run(dataset, tmp_path, recipe)
    (kept,) = (tmp_path / "failures").iterdir()
    with np.load(kept) as batch:
        assert batch["images"].shape == (4, 3, 64, 64)
        assert batch["masks"].shape == (4, 64, 64)


def test_an_exploding_training_is_stopped(dataset: str, tmp_path: Path) -> None:
    recipe = replace(
        SMALL,
        optimizer=Optimizer(name="sgd", lr=1e30, clip=0),
        schedule=Schedule(epochs=3, warmup=0),
    )
    with pytest.raises(MedrayError, match="not a number"):
        run(dataset, tmp_path, recipe)
    assert list((tmp_path / "failures").iterdir())


def test_too_little_memory_says_what_halves_it(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hungry(self, batch, seed, step):
        return torch.empty(1 << 55).sum(), None  # more than any machine has

    monkeypatch.setattr(TrainingModel, "loss", hungry)
    message = (
        "not enough memory on cpu for 4 crops of 64 px.*micro_batch_size=2 halves it"
    )
    with pytest.raises(MedrayError, match=message):
        run(dataset, tmp_path, SMALL)


def test_synchronised_batch_normalisation_needs_gpus(dataset: str) -> None:
    recipe = replace(SMALL, sync_batch_norm=True, micro_batch_size=2)
    world = World(0, 2, torch.device("cpu"))
    with pytest.raises(MedrayError, match="sync_batch_norm: needs GPUs"):
        Trainer(world, recipe, model_config(dataset, recipe), 4, 1)


def test_a_compiled_network_learns_the_same(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All of compiling but writing C++, which takes a minute and a half.
    traced = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    recipe = replace(
        SMALL,
        schedule=Schedule(epochs=1),
        model=Architecture("fcn8s", "vgg16"),
        data=Data(crop=64, samples=4),
        optimizer=Optimizer("sgd", lr=0.01),  # Adam makes much of the least gradient
    )
    plain = run(dataset, tmp_path / "plain", recipe)
    compiled = run(dataset, tmp_path / "compiled", replace(recipe, compile=True))
    assert plain.keys() == compiled.keys()
    for name, weight in plain.items():
        torch.testing.assert_close(weight, compiled[name], rtol=1e-2, atol=1e-3)


def damage(dataset: str, folder: Path, slides: int) -> str:
    """Spoil the pixels of some slides of a copy."""
    shutil.copytree(dataset, folder)
    wanted = sorted((folder / "slides").iterdir())
    for slide in wanted[:slides]:
        for shard in (slide / "0" / "c").rglob("*"):
            if shard.is_file():
                data = bytearray(shard.read_bytes())
                data[: 9 * len(data) // 10] = bytes(9 * len(data) // 10)
                shard.write_bytes(bytes(data))
    return str(folder)


def test_too_much_damage_stops_and_names_a_patch(dataset: str, tmp_path: Path) -> None:
    spoilt = damage(dataset, tmp_path / "data", 4)
    with pytest.raises(MedrayError, match="patches|could not be read"):
        run(spoilt, tmp_path / "out", SMALL)


def test_a_model_that_predicts_one_class_is_told(dataset: str, tmp_path: Path) -> None:
    recipe = replace(SMALL, optimizer=Optimizer(lr=1e-9), schedule=Schedule(epochs=1))

    def scores_of(counts: list[list[int]]) -> dict:
        found = Validation(Classes(("background", "tumour")), of_images=False)
        found.counts += np.array(counts)
        return found.scores()

    scores = scores_of([[90, 0], [10, 0]])
    assert "everything was predicted as background" in scores["warning"]
    fine = scores_of([[90, 1], [5, 4]])
    assert "warning" not in fine
    run(dataset, tmp_path, recipe)
    assert history(tmp_path)[0]["f1"] is not None


def test_what_is_told_while_it_trains(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard, MLflow, and the losses that hard patches are chosen by."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "ml").as_uri())
    recipe = replace(
        SMALL,
        model=Architecture("fcn8s", "vgg16"),
        batch=8,
        data=Data(crop=64, samples=16, hard=0.7),
        schedule=Schedule(epochs=1),
    )
    run(dataset, tmp_path, recipe)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/learning_rate", "epoch/f1"} <= set(tags["scalars"])
    assert "epoch/crops_per_second" in tags["scalars"]
    assert len(events.Scalars("train/loss")) == 2
    pictures = {"network/first_kernels", "network/score8", "network/score32"}
    assert pictures | {"validation/0"} <= set(tags["images"])

    (found,) = mlflow.search_runs(experiment_names=["medray"], output_format="list")
    assert found.info.run_name == "t"
    assert "loss" in found.data.metrics

    state = torch.load(tmp_path / "checkpoints" / "t-last.pt", weights_only=True)
    known = ~state["losses"].isnan()
    assert known.sum() >= 4
    assert (state["losses"][known] > 0).all()


def test_training_and_inference_feed_a_model_the_same(
    dataset: str, tmp_path: Path
) -> None:
    """The same patch gives the same logits on both ways."""
    from medray.training.crops import read_val

    for stain, zscore in (("none", False), ("macenko", False), ("none", True)):
        recipe = replace(SMALL, stain=stain)  # type: ignore[arg-type]
        config = replace(model_config(dataset, recipe), zscore=zscore)
        trainer = Trainer(ALONE, recipe, config, 4, 1)
        crops = read_val(dataset, recipe.sampling, 0, 2)
        folder = str(tmp_path / f"{stain}-{zscore}")
        save_model(folder, config, trainer.model.network, {"f1": None})
        network, stored = load_model(folder)
        assert stored == config
        infer = Network(network, stored, torch.device("cpu"), torch.float32)
        with torch.inference_mode():
            theirs = infer(torch.from_numpy(np.moveaxis(crops.images, 1, 3).copy()))
            inputs = trainer.model.normalise(torch.from_numpy(crops.images.copy()))
            ours = trainer.model.arithmetic.forward(
                trainer.model.network.eval(), inputs
            )
        # Inference folds batch normalisation into the convolutions before it.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        assert float((ours - theirs).abs().mean()) < 1e-5


def test_a_student_learns_from_its_teacher(dataset: str, tmp_path: Path) -> None:
    config = model_config(dataset, SMALL)
    teacher = Trainer(ALONE, replace(SMALL, seed=5), config, 4, 1).model.network
    save_model(str(tmp_path / "teacher"), config, teacher, {"f1": None})
    how = Teacher(str(tmp_path / "teacher"), features=0.1)
    run(dataset, tmp_path / "out", replace(SMALL, teacher=how))
    plain = run(dataset, tmp_path / "plain", SMALL)
    taught = torch.load(tmp_path / "out/checkpoints/t-last.pt", weights_only=True)
    assert any(not torch.equal(plain[k], v) for k, v in taught["network"].items())
    assert "adapt.weight" in taught["hints"]
    beside = json.loads((tmp_path / "out" / "teacher.json").read_text())
    assert beside["teacher"]["parameters"] == beside["student"]["parameters"]
    assert all(row["patches_per_second"] > 0 for row in beside.values())
    assert beside["student"]["f1"] == history(tmp_path / "out")[-1]["f1"]


def test_unannotated_slides_are_learned_from(dataset: str, tmp_path: Path) -> None:
    recipe = replace(
        SMALL, unlabelled=Unlabelled(ramp=0.0), optimizer=Optimizer(average=0.9)
    )
    weights = run(dataset, tmp_path / "semi", recipe)
    plain = run(dataset, tmp_path / "plain", replace(recipe, unlabelled=None))
    assert any(not torch.equal(plain[k], v) for k, v in weights.items())


def test_other_classes_than_the_model_are_refused_by_pruning(
    dataset: str, tmp_path: Path
) -> None:
    from medray.errors import ConfigError
    from medray.training.network import build_network
    from medray.training.recipe import Prune

    config = replace(model_config(dataset, SMALL), classes=Classes(("a", "b", "c")))
    network = build_network(SMALL, 3)
    save_model(str(tmp_path), config, network, {"f1": None})
    with pytest.raises(ConfigError, match="prune.model.*3 classes"):
        build_network(replace(SMALL, prune=Prune(str(tmp_path))), 2)
