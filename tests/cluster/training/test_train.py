"""Trainings by Ray Train: what they make, what they refuse, what outlives a kill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import serial
import torch

from medray.classes import Classes
from medray.datasets.ingest_slides import ingest
from medray.errors import ConfigError
from medray.models.config import Architecture, ModelConfig
from medray.models.folder import load_model, save_model
from medray.models.segmenters import build_segmenter
from medray.storage.yaml_config import write_settings
from medray.training.losses import Loss
from medray.training.optim import Optimizer
from medray.training.recipe import Recipe
from medray.training.sampler import Data
from medray.training.schedule import Schedule
from medray.training.train_model import train
from medray.training.world import TrainingError

TINY = Recipe(
    model=Architecture("unet", "tu-mobilenetv3_small_050"),
    data=Data(crop=64, samples=32),
    batch=4,
    schedule=Schedule(epochs=4, save_minutes=1e-3),
    precision="float32",
)


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
        executor="local",
    )
    return out


def test_a_training_makes_a_model_and_is_not_done_twice(
    dataset: Path, tmp_path: Path
) -> None:
    recipe = replace(TINY, data=Data(crop=96, samples=16), schedule=Schedule(epochs=2))
    write_settings(str(tmp_path / "r.yaml"), recipe)
    out = tmp_path / "model"
    first = train(str(tmp_path / "r.yaml"), data=str(dataset), out=str(out))
    assert (first.trained, first.epochs) == (True, 2)
    config = load_model(str(out))[1]
    assert config.mpp == pytest.approx(0.5)
    assert config.provenance["recipe"]["data"]["crop"] == 96
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 2
    page = (out / "training.html").read_text()
    assert "validation" in page
    assert page.count("data:image/jpeg") >= 1
    assert first.report == str(out / "training.html")
    again = train(str(tmp_path / "r.yaml"), data=str(dataset), out=str(out))
    assert (again.trained, again.epochs, again.f1) == (False, 2, first.f1)
    with pytest.raises(ConfigError, match="another recipe or dataset"):
        train(
            str(tmp_path / "r.yaml"),
            data=str(dataset),
            out=str(out),
            overrides=["seed=9"],
        )


def test_pointless_trainings_are_refused(dataset: Path, tmp_path: Path) -> None:
    write_settings(str(tmp_path / "r.yaml"), Recipe())
    recipe, out = str(tmp_path / "r.yaml"), str(tmp_path / "m")
    with pytest.raises(ConfigError, match="dataset.yaml is missing"):
        train(recipe, data=str(tmp_path), out=out)
    with pytest.raises(ConfigError, match="64 asked for"):
        train(recipe, data=str(dataset), out=out, overrides=["workers=64", "batch=64"])
    for overrides, message in (
        (["unlabelled.weight=1"], "optimizer.average=0.99"),
        (["unlabelled.weight=1", "optimizer.average=0.9"], "without annotation"),
        (["teacher.model=nowhere"], "nowhere.*expected a model folder"),
        (["prune.model=nowhere"], "nowhere.*expected a model folder"),
        (["weights=nowhere.pth"], "nowhere.pth: there is no such file"),
        (["model.name=nonsense"], "cannot build nonsense"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(recipe, data=str(dataset), out=out, overrides=overrides)
    with pytest.raises(ConfigError, match="repeats"):
        train(recipe, data=str(dataset), out=out, repeats=0)


def test_datasets_that_cannot_teach_are_refused(
    dataset: Path, slides: Path, tmp_path: Path
) -> None:
    write_settings(str(tmp_path / "r.yaml"), Recipe())
    recipe, out = str(tmp_path / "r.yaml"), str(tmp_path / "m")
    ingest(
        [str(slides / "slides")],
        annotations=str(slides / "annotations"),
        classes=("background", "tumour", "stroma"),
        fractions=(0.5, 0.5, 0.0),
        out=str(tmp_path / "stroma"),
        executor="local",
    )
    with pytest.raises(ConfigError, match=r"no pixel of \['stroma'\]; annotate"):
        train(recipe, data=str(tmp_path / "stroma"), out=out)

    def changed(name: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> str:
        shutil.copytree(dataset, tmp_path / name)
        path = tmp_path / name / "patches.parquet"
        change(pd.read_parquet(path)).to_parquet(path)
        return str(tmp_path / name)

    def all_background(patches: pd.DataFrame) -> pd.DataFrame:
        nothing = [[int(sum(px)), 0] for px in patches["class_px"]]
        return patches.assign(class_px=nothing)

    def of_two_scanners(patches: pd.DataFrame) -> pd.DataFrame:
        first = patches["slide"].iloc[0]
        return patches.assign(mpp=np.where(patches["slide"] == first, 0.25, 0.5))

    for name, change, message in (
        ("background", all_background, r"no pixel of \['tumour'\]; annotate"),
        ("no val", lambda p: p[p["split"] != "val"], "split val; ingest more"),
        ("glass", lambda p: p.assign(tissue=0.0).iloc[:0], "split train; ingest more"),
        ("two", of_two_scanners, "differ in microns per pixel.*0.25.*0.5"),
    ):
        with pytest.raises(ConfigError, match=message):
            train(recipe, data=changed(name, change), out=out)


def test_a_teacher_of_other_classes_is_refused(dataset: Path, tmp_path: Path) -> None:
    settings = Recipe()
    model_config = ModelConfig(
        architecture=settings.model,
        classes=Classes(("a", "b", "c")),
        window=settings.window,
        mpp=0.5,
    )
    network = build_segmenter(settings.model, 3)
    save_model(str(tmp_path / "teacher"), model_config, network, {"f1": None})
    write_settings(str(tmp_path / "r.yaml"), Recipe())
    with pytest.raises(ConfigError, match="teacher.model.*'a', 'b', 'c'"):
        train(
            str(tmp_path / "r.yaml"),
            data=str(dataset),
            out=str(tmp_path / "m"),
            overrides=[f"teacher.model={tmp_path / 'teacher'}"],
        )


def test_failure_of_a_worker_reaches_the_person_who_asked(
    dataset: Path, tmp_path: Path
) -> None:
    """The loss explodes in the worker's process; it is not tried again and again."""
    recipe = replace(TINY, optimizer=Optimizer("sgd", lr=1e30, clip=0))
    write_settings(str(tmp_path / "r.yaml"), recipe)
    start = time.monotonic()
    with pytest.raises(TrainingError, match=r"not a number.*its crops are kept in"):
        train(str(tmp_path / "r.yaml"), data=str(dataset), out=str(tmp_path / "m"))
    assert list((tmp_path / "m" / "failures").iterdir())
    assert time.monotonic() - start < 200
    assert not (tmp_path / "m" / "model.yaml").exists()


# --- killed for real ------------------------------------------------------------------


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_model(str(out))[0].state_dict()


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def workers() -> list[int]:
    """Process ids of Ray Train's workers."""
    found = subprocess.run(
        ["pgrep", "-f", "RayTrainWorker"], capture_output=True, text=True, check=False
    )
    return [int(pid) for pid in found.stdout.split()]


def epochs_of(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    serial.train(TINY, str(dataset), str(out))
    return out


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(
    dataset: Path, tmp_path: Path, undisturbed: Path
) -> None:
    write_settings(str(tmp_path / "r.yaml"), TINY)
    out = tmp_path / "m"
    killed = []

    def kill() -> None:
        while epochs_of(out) < 1:
            time.sleep(0.2)
        for pid in workers():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    result = train(str(tmp_path / "r.yaml"), data=str(dataset), out=str(out))
    thread.join()
    assert killed
    assert result.epochs == 4
    assert_same(weights_of(undisturbed), weights_of(out))


def test_a_killed_command_goes_on_and_the_weights_are_the_same(
    dataset: Path, tmp_path: Path, undisturbed: Path
) -> None:
    """All processes of the command at once, as when a machine is switched off."""
    write_settings(str(tmp_path / "r.yaml"), TINY)
    out = tmp_path / "m"
    command = [sys.executable, "-m", "medray.cli", "train", str(tmp_path / "r.yaml")]
    command += ["--data", str(dataset), "--out", str(out)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, stderr=said
        )
    while epochs_of(out) < 2:
        assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "model.yaml").exists(), "it had ended before it was killed"
    done = epochs_of(out)
    assert done >= 2
    result = train(str(tmp_path / "r.yaml"), data=str(dataset), out=str(out))
    assert result.epochs == 4
    assert_same(weights_of(undisturbed), weights_of(out))


def test_two_workers_take_the_steps_of_one(dataset: Path, tmp_path: Path) -> None:
    """The global batch is the same, so the weights are but for the order of sums."""
    one = replace(
        TINY,
        model=Architecture("fcn8s", "vgg16"),  # batch statistics are each worker's own
        loss=Loss(dice=0, focal=0, cross_entropy=1),
        optimizer=Optimizer("sgd", lr=0.01),
        data=Data(crop=64, samples=8),
        micro_batch_size=2,
        schedule=Schedule(epochs=1),
    )
    serial.train(one, str(dataset), str(tmp_path / "one"))
    alone = weights_of(tmp_path / "one")
    write_settings(str(tmp_path / "r.yaml"), replace(one, workers=2))
    out = tmp_path / "two"
    train(str(tmp_path / "r.yaml"), data=str(dataset), out=str(out))
    for name, weight in weights_of(out).items():
        torch.testing.assert_close(alone[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("trained_here")
def test_seeds_are_repeated_on_request(dataset: Path, tmp_path: Path) -> None:
    short = replace(TINY, schedule=Schedule(epochs=1), data=Data(crop=64, samples=4))
    write_settings(str(tmp_path / "r.yaml"), short)
    out = tmp_path / "m"
    train(str(tmp_path / "r.yaml"), data=str(dataset), out=str(out), repeats=2)
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["repeats"]["f1"]) == 2
    assert metrics["repeats"]["std"] >= 0
    assert (out / "repeats" / "seed-1" / "model.yaml").exists()
    assert "standard deviation" in (out / "training.html").read_text()
