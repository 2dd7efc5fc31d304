"""`medray train --dry-run` says what train will do, and writes nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import serial
from PIL import Image

from medray.apps.dry_train import TrainPlan, dry_train
from medray.cli import main
from medray.datasets.image_folder import ingest_images
from medray.datasets.ingest_slides import ingest
from medray.training.recipe import read_recipe
from medray.training.trainer import Trainer

SMALL = [
    "model.encoder=tu-test_resnet",
    "window.size=64",
    "window.stride=64",
    "data.crop=[32,64]",
    "data.samples=12",
    "batch=4",
    "micro_batch_size=2",
    "schedule.epochs=2",
    "augment.hue=0",
]


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All files with their bytes and times."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_dataset(folder: Path) -> str:
    """Six slides of 96 px, of three patients, with one tumour each."""
    for sub in ("s", "a"):
        (folder / sub).mkdir(parents=True)
    rows = ["slide,group"]
    for number in range(6):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 60, (96, 96, 3)) + np.array([190, 90, 160])
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "s" / f"s{number}.png")
        mask = np.zeros((96, 96), np.uint8)
        mask[10 : 40 + number, 20:70] = 1
        Image.fromarray(mask).save(folder / "a" / f"s{number}.png")
        rows.append(f"s{number},p{number // 2}")
    (folder / "groups.csv").write_text("\n".join(rows) + "\n")
    done = ingest(
        [str(folder / "s")],
        annotations=str(folder / "a"),
        groups=str(folder / "groups.csv"),
        fractions=(0.6, 0.4, 0.0),
        mpp=0.5,
        out=str(folder / "data"),
        executor="local",
    )
    assert done.failed == {}
    return str(folder / "data")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_dataset(folder)
    return folder


def dry(folder: Path, out: Path, *more: str, **options: Any) -> TrainPlan:
    before = everything(folder), everything(out), sorted(out.rglob("*"))
    data = str(folder / "data")
    plan = dry_train(
        "unet", data=data, out=str(out), overrides=[*SMALL, *more], **options
    )
    assert (everything(folder), everything(out), sorted(out.rglob("*"))) == before
    return plan


class StopError(Exception):
    """The training is interrupted."""


def test_it_tells_what_train_does(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first step, after an interruption, and once the model is there."""
    out = tmp_path / "model"
    plan = dry(made, out)
    assert not out.exists()
    assert plan.state == "new"
    rows = pq.read_table(made / "data" / "patches.parquet").to_pylist()
    for row in plan.splits:
        some = [patch for patch in rows if patch["split"] == row["split"]]
        assert row["patches"] == len(some) > 0
        assert row["slides"] == len({patch["slide"] for patch in some})
        assert row["patients"] == row["slides"] // 2
        counts = np.sum([patch["class_px"] for patch in some], axis=0).tolist()
        assert [row["px_background"], row["px_tumour"]] == counts
    assert 0 < plan.epoch_seconds[0] <= plan.epoch_seconds[1]
    assert 0 < plan.seconds[0] <= plan.seconds[1]
    assert plan.host_bytes > 0

    steps: list[tuple[int, int, int]] = []
    train_step = Trainer.train_step

    def counted(self: Trainer, batches: Any, failure: Any = None) -> Any:
        place = (self.progress.epoch, self.progress.step)
        if place == (1, 0) and len(steps) == 3:
            raise StopError
        steps.append((*place, sum(len(batch.images) for batch in batches)))
        return train_step(self, batches, failure)

    recipe, data = read_recipe("unet", SMALL), str(made / "data")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", counted)
        with pytest.raises(StopError):
            serial.train(recipe, data, str(out))
        first = [step for step in steps if step[0] == 0]
        assert len(first) == plan.steps == 3
        assert {crops for *_, crops in steps} == {plan.crops} == {4}
    left = dry(made, out)
    assert (left.state, left.epoch, left.epochs) == ("goes on", 1, 2)
    assert left.splits == plan.splits
    done = serial.train(recipe, data, str(out))
    assert done.epochs == plan.epochs
    over = dry(made, out)
    assert (over.state, over.epoch, over.seconds) == (
        "was there already",
        2,
        (0.0, 0.0),
    )
    assert (over.device, over.splits) == ("", [])


def test_repeats_take_as_many_times_longer(made: Path, tmp_path: Path) -> None:
    plan = dry(made, tmp_path / "model", repeats=3)
    assert plan.trainings == 3
    assert plan.seconds[1] > 6 * plan.epoch_seconds[1]


WRONG = {
    "no recipe": "nothing --data {f}/data --out {f}/new",
    "no key": "unet --data {f}/data --out {f}/new optimiser.lr=1",
    "a wrong value": "unet --data {f}/data --out {f}/new batch=0",
    "no dataset": "unet --data {f}/none --out {f}/new",
    "repeats": "unet --data {f}/data --out {f}/new --repeats 0",
    "no val": "unet --data {f}/one_split --out {f}/new",
    "a classifier of images": "malaria-resnet50v2 --data {f}/images --out {f}/new "
    "weights=null",
    "unlabelled": "semi-supervised --data {f}/data --out {f}/new weights=null",
    "a model of others": "unet --data {f}/data --out {f}/model",
    "checkpoints of others": "unet --data {f}/data --out {f}/begun",
    "labels with repeats": "attention-mil --labels x.csv --repeats 2 --data x --out {f}/x",
    "no features": "attention-mil --labels {f}/labels.csv --data {f}/none --out {f}/new",
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    make_dataset(folder)
    for name in ("a", "b"):
        (folder / "i" / name).mkdir(parents=True)
        for number in range(8):
            image = Image.new("RGB", (40, 40), (number, 9, len(name)))
            image.putpixel((number, 3), (9, 9, ord(name)))
            image.save(folder / "i" / name / f"{number}.png")
    ingest_images(
        str(folder / "i"), side=64, out=str(folder / "images"), executor="local"
    )
    ingest(
        [str(folder / "s")],
        annotations=str(folder / "a"),
        fractions=(1.0, 0.0, 0.0),
        out=str(folder / "one_split"),
        executor="local",
    )
    (folder / "begun" / "checkpoints").mkdir(parents=True)
    (folder / "begun" / "checkpoints" / "other-last.pt").write_bytes(b"")
    (folder / "model").mkdir()
    made_by = read_recipe("unet", SMALL)
    serial.train(made_by, str(folder / "data"), str(folder / "model"))
    (folder / "labels.csv").write_text("slide,label\ns0,a\n")
    return folder


@pytest.mark.parametrize("name", WRONG)
def test_what_train_refuses_is_refused_alike(
    name: str, wrong: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = WRONG[name].format(f=wrong).split()
    before = everything(wrong)

    def outcome(*more: str) -> tuple[int, str]:
        code = main(["train", *words, "--json", *more])
        return code, json.loads(capsys.readouterr().out)["error"]

    tried = outcome("--dry-run")
    assert everything(wrong) == before
    assert tried == outcome()
    assert tried[0] == 2


def test_images_of_one_class(wrong: Path, tmp_path: Path) -> None:
    small = ["model.encoder=test_resnet", "weights=null", "schedule.phases=[]"]
    sides = ["data.crop=64", "window.size=64", "window.stride=64", "batch=4"]
    plan = dry_train(
        "cells-small",
        data=str(wrong / "images"),
        out=str(tmp_path / "model"),
        overrides=[*small, *sides],
    )
    rows = pq.read_table(wrong / "images" / "images.parquet").to_pylist()
    for row in plan.splits:
        some = [one for one in rows if one["split"] == row["split"]]
        assert row["patches"] == row["patients"] == len(some)
        for name in ("a", "b"):
            assert row[f"images_{name}"] == sum(one["class"] == name for one in some)
    assert not (tmp_path / "model").exists()


def test_no_ray_is_started(made: Path, tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys, ray\nfrom medray.apps.dry_train import dry_train\n"
        "print(dry_train('unet', data=sys.argv[1], out='model',"
        " overrides=sys.argv[2:]))\n"
        "assert not ray.is_initialized()\n"
    )
    words = [sys.executable, "-c", code, str(made / "data"), *SMALL]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "2 epochs of 3 steps of 4 crops" in found.stdout
    assert [*tmp_path.iterdir()] == []
