"""The processes that read for a training, killed: they cost it nothing, and leave nothing."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from medray.datasets.dataset import read_dataset
from medray.errors import LostError
from medray.geometry import Windows
from medray.models.config import Architecture, ModelConfig
from medray.training import dataloader
from medray.training.dataloader import BatchIndex, Readers, Source
from medray.training.recipe import Recipe
from medray.training.sampler import Data
from medray.training.schedule import Schedule
from medray.training.trainer import Trainer
from medray.training.worker import train_as
from medray.training.world import TrainingError, World

RECIPE = Recipe(
    model=Architecture("unet", "tu-mobilenetv3_small_050"),
    data=Data(crop=64, samples=24),
    batch=4,
    schedule=Schedule(epochs=2),
    precision="float32",
)


@pytest.fixture(autouse=True)
def small_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    # A call each batch.
    monkeypatch.setattr(dataloader, "_CALL_PX", 4 * 64**2)


def readers() -> list[int]:
    """Process ids of this process's readers."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie
            if "medray.execution.isolation" in child.cmdline():
                found.append(child.pid)
    return found


def run(data: str, out: Path, recipe: Recipe = RECIPE) -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    config = ModelConfig(
        architecture=recipe.model,
        classes=read_dataset(data).classes,
        window=Windows(128, 96),
        mpp=0.5,
    )
    train_as(World(0, 1, torch.device("cpu")), recipe, config, data, str(out), "t")
    state = torch.load(out / "checkpoints" / "t-last.pt", weights_only=True)
    weights: dict[str, torch.Tensor] = state["network"]
    return weights


def test_a_killed_reader_changes_no_weights(
    training_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(training_data, tmp_path / "whole")
    train_step, killed = Trainer.train_step, []
    steps = itertools.count()

    def killing(self: Trainer, *args: Any) -> Any:
        # Twice: after three times a batch is given up.
        if next(steps) in (1, 6):
            for pid in readers():
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        return train_step(self, *args)

    monkeypatch.setattr(Trainer, "train_step", killing)
    weights = run(training_data, tmp_path / "killed")
    assert len(set(killed)) >= 2
    for name, weight in whole.items():
        assert torch.equal(weight, weights[name]), name
    assert not readers()


class Killing(threading.Thread):
    """Kills each reader as soon as it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            for pid in readers():
                os.kill(pid, signal.SIGKILL)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.join()


def test_readers_that_always_end_are_given_up(
    training_data: str, tmp_path: Path
) -> None:
    said = r"epoch 0, step 0: 3 processes.*ended by signal 9.*run the same command"
    with Killing(), pytest.raises(TrainingError, match=said):
        run(training_data, tmp_path)
    source = Source(training_data, RECIPE.sampling, 6)
    with Readers(2) as some:
        stream = some.read(source, [BatchIndex(0, 1, 0)])
        with Killing(), pytest.raises(LostError, match="epoch 0, step 1"):
            next(stream)
        # Others do what is asked next.
        (found,) = some.read(source, [BatchIndex(0, 2, 0)])
    assert np.array_equal(found.images, source.read(BatchIndex(0, 2, 0)).images)
    assert not readers()


SCRIPT = """
import sys, time, psutil
from medray.training import dataloader
from medray.training.dataloader import BatchIndex, Readers, Source
from medray.training.sampler import Data, Sampling

dataloader._CALL_PX = 1
source = Source(sys.argv[1], Sampling(Data(crop=64, samples=32), 0, 1, 4, 4), 8)
with Readers(2) as some:
    for _ in some.read(source, [BatchIndex(0, i, 0) for i in range(8)]):
        pass
    print(*(child.pid for child in psutil.Process().children()), flush=True)
    time.sleep(600)
"""


def test_readers_end_with_their_training(training_data: str) -> None:
    command = [sys.executable, "-c", SCRIPT, training_data]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        there = [psutil.pid_exists(pid) for pid in pids]
        process.kill()
    assert there == [True, True]
    deadline = time.monotonic() + 10
    while any(psutil.pid_exists(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)
