"""Sweeps: every combination once, the best kept, nothing trained twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from medray import cli
from medray.errors import ConfigError
from medray.models.config import Architecture
from medray.models.folder import load_model
from medray.models.seen import read_seen
from medray.storage.yaml_config import write_settings
from medray.training.recipe import Recipe
from medray.training.recipe_files import SWEEPS
from medray.training.report import write_tune_report
from medray.training.sampler import Data
from medray.training.schedule import Schedule
from medray.training.sweep import plan_trials, read_sweep
from medray.training.tune_model import tune

ROOT = Path(__file__).resolve().parents[3]
TINY = Recipe(
    model=Architecture("unet", "tu-mobilenetv3_small_050"),
    data=Data(crop=64, samples=8),
    batch=4,
    schedule=Schedule(epochs=2),
    precision="float32",
)


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_sweep_reads(path: Path) -> None:
    recipe, grid, asha = read_sweep(str(path))
    trials = plan_trials(recipe, grid, [])
    assert len({trial.recipe for trial in trials}) == len(trials) > 1
    assert len({trial.name for trial in trials}) == len(trials)
    assert asha >= 0


def test_the_gastric_sweep_is_what_it_is_said_to_be() -> None:
    recipe, grid, _ = read_sweep("gastric-fcn8s")
    found = {
        (t.recipe.optimizer.lr, t.recipe.loss.l2, t.recipe.batch)
        for t in plan_trials(recipe, grid, ["schedule.epochs=3"])
    }
    rates, l2, batches = (1e-3, 1e-4, 1e-5), (1e-2, 1e-6), (2, 4, 8)
    assert found == {(a, b, c) for a in rates for b in l2 for c in batches}


def test_keys_that_hold_lists_can_be_swept(tmp_path: Path) -> None:
    write_settings(str(tmp_path / "r.yaml"), TINY)
    grid = {"data.crop": [[64, 96], 64], "weights": [None]}
    trials = plan_trials(str(tmp_path / "r.yaml"), grid, [])
    assert [trial.recipe.data.crops for trial in trials] == [(64, 96), (64,)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grid: {batch: [2]}", "recipe: expected a name or a file"),
        ("recipe: r.yaml", "grid: expected lists of values"),
        ("{recipe: r.yaml, grid: {}}", "a key with a list"),
        ("{recipe: r.yaml, grid: {batch: 2}}", "batch: expected a list"),
        ("{recipe: r.yaml, grid: {batch: []}}", "batch: expected a list"),
        ("{recipe: r.yaml, grid: {bach: [2]}}", "unknown key bach; did you mean batch"),
        ("{recipe: r.yaml, grid: {batch: [x]}}", "batch"),
        ("{recipe: r.yaml, grid: {workers: [2]}}", "workers: 2: each trial"),
        ("{recipe: absent.yaml, grid: {batch: [2]}}", "absent.yaml: there is no"),
        ("{recipe: r.yaml, grid: {batch: [2]}, ahsa: 2}", r"unknown keys \['ahsa'\]"),
        ("{recipe: r.yaml, grid: {batch: [2]}, asha: -1}", "asha: expected epochs"),
    ],
)
def test_a_wrong_sweep_is_explained(tmp_path: Path, text: str, message: str) -> None:
    write_settings(str(tmp_path / "r.yaml"), TINY)
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        tune(str(tmp_path / "sweep.yaml"), data="nowhere", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_grid_that_is_none_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["tune", "r.yaml", "--data", "d", "--out", "o", "--grid", "batch=2"]
    assert cli.main(asked) == 2
    assert "expected key=[A,B]" in capsys.readouterr().err


def test_the_page_has_each_trial_and_escapes_what_it_is_told(tmp_path: Path) -> None:
    history = [{"epoch": 0, "f1": 0.5, "seconds": 1.0}]
    rows = [
        {
            "trial": f"t{index}",
            "values": {"optimizer.lr": lr, "model.name": "<b>unet</b>"},
            "status": status,
            "why": why,
            "epochs": 1,
            "seconds": 1.0,
            "f1": f1,
            "iou": f1,
            "history": history if f1 else [],
        }
        for index, (lr, f1, status, why) in enumerate(
            [
                (1e-3, 0.5, "trained", ""),
                (1e-4, 0.4, "stopped early", ""),
                (1.0, None, "failed", "<script>alert(1)</script>"),
            ]
        )
    ]
    keys = ["optimizer.lr", "model.name"]
    page = write_tune_report(str(tmp_path), keys, rows, rows[0])
    text = Path(page).read_text()
    assert text.count("<svg") == 3
    assert "<script>alert" not in text
    assert "<b>unet" not in text
    table = pd.read_csv(tmp_path / "leaderboard.csv")
    assert table["status"].tolist() == ["trained", "stopped early", "failed"]


def test_a_sweep_keeps_the_best_and_trains_nothing_twice(
    training_data: str, tmp_path: Path
) -> None:
    write_settings(str(tmp_path / "r.yaml"), TINY)
    grid = {"optimizer.name": ["sgd"], "optimizer.lr": [1e-3, 1e30]}
    out = tmp_path / "out"
    recipe, whole = str(tmp_path / "r.yaml"), ["optimizer.clip=0"]
    asked = {"data": training_data, "out": str(out), "grid": grid, "overrides": whole}
    first = tune(recipe, **asked)  # type: ignore[arg-type]
    assert first.trials == 2
    assert first.best == {"optimizer.name": "sgd", "optimizer.lr": 1e-3}
    (why,) = first.failed.values()
    assert "not a number" in why
    _, config = load_model(str(out / "best"))
    assert config.provenance["recipe"]["optimizer"]["lr"] == 1e-3
    assert json.loads((out / "best/metrics.json").read_text())["f1"] == first.f1
    assert "1e+30" in (out / "tune.html").read_text()
    before = {p: p.stat().st_mtime_ns for p in (out / "trials").rglob("*")}
    again = tune(recipe, **asked)  # type: ignore[arg-type]
    assert replace(again, seconds=0) == replace(first, seconds=0)
    assert before == {p: p.stat().st_mtime_ns for p in (out / "trials").rglob("*")}
    with pytest.raises(ConfigError, match=r"another sweep \(other grid\)"):
        tune(recipe, **(asked | {"grid": {"batch": [2, 4]}}))  # type: ignore[arg-type]
    # The best model tells what it has seen, and other pixels make another sweep.
    assert set(read_seen(str(out / "best")).values()) == {"train", "val"}
    data = tmp_path / "data"
    shutil.copytree(training_data, data)
    rows = pd.read_parquet(data / "slides.parquet")
    rows.assign(digest="blake2b:0").to_parquet(data / "slides.parquet")
    with pytest.raises(ConfigError, match=r"another sweep \(other data\)"):
        tune(recipe, **(asked | {"data": str(data)}))  # type: ignore[arg-type]
