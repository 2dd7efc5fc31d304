"""A training ended by a signal or with its node: what it keeps and reports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import serial
import torch
from image_cells import write_cells
from safetensors.torch import load_file

from medray.datasets.image_folder import ingest_images
from medray.geometry import Windows
from medray.models.config import Architecture
from medray.storage.yaml_config import write_settings
from medray.training.losses import Loss
from medray.training.recipe import Recipe
from medray.training.sampler import Data
from medray.training.schedule import Schedule

pytestmark = pytest.mark.timeout(900)
SMALL = Recipe(
    model=Architecture("classifier", "resnet10t"),
    scaling="unit",
    window=Windows(32, 32),
    data=Data(crop=32),
    loss=Loss(dice=0, focal=0, cross_entropy=1),
    batch=4,
    precision="float32",
    # Saved at the ends of epochs only, so what is there else was saved for a reason.
    schedule=Schedule(epochs=6, patience=500, save_minutes=60),
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An epoch of which takes some seconds."""
    folder = tmp_path_factory.mktemp("cells")
    write_cells(folder / "cells", patients=20, each=10)
    out = folder / "data"
    ingest_images(str(folder / "cells"), out=str(out), side=32, executor="local")
    return out


def start(
    recipe: Recipe, data: Path, folder: Path, command: str = "train", **variables: str
) -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    write_settings(str(folder / "r.yaml"), recipe)
    words = [sys.executable, "-m", "medray.cli", command, str(folder / "r.yaml")]
    words += ["--data", str(data), "--out", str(folder / "m")]
    if command == "tune":
        words += ["--grid", "seed=[0,1]"]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(words, env=environment | variables, stderr=log)


def wait_until(
    there: Callable[[], Any], process: subprocess.Popen[bytes], folder: Path
) -> None:
    deadline = time.monotonic() + 240
    while not there():
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)


def state_of(folder: Path) -> dict[str, Any]:
    (path,) = (folder / "m" / "checkpoints").glob("*-last.pt")
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "weights.safetensors")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_ends_a_training_with_its_state_kept(
    number: signal.Signals, code: int, cells: Path, tmp_path: Path
) -> None:
    process = start(SMALL, cells, tmp_path)
    history = tmp_path / "m" / "metrics.jsonl"
    wait_until(history.exists, process, tmp_path)
    started = time.monotonic()
    process.send_signal(number)
    assert process.wait(60) == code
    assert time.monotonic() - started < 30
    said = (tmp_path / "log").read_text()
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"medray train: stopped by {number.name}: ")
    assert last.endswith("run the same command again to go on")
    for noise in ("Traceback", "received at", "Stack", "Fatal"):
        assert noise not in said
    state = state_of(tmp_path)
    assert state["epoch"] == len(history.read_text().splitlines())
    assert state["step"] > 0, "what was learned since the epoch's end is lost"
    if number == signal.SIGINT:
        return
    # By a plain loop in this process; that commands go on is in test_train.py.
    serial.train(SMALL, str(cells), str(tmp_path / "m"))
    alone = tmp_path / "alone"
    serial.train(SMALL, str(cells), str(alone))
    found, wanted = weights_of(tmp_path / "m"), weights_of(alone)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight)


def test_a_signal_ends_a_sweep(cells: Path, tmp_path: Path) -> None:
    process = start(SMALL, cells, tmp_path, "tune")
    trials = tmp_path / "m" / "trials"
    wait_until(lambda: [*trials.glob("*/checkpoints/*-last.pt")], process, tmp_path)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert time.monotonic() - started < 30
    said = (tmp_path / "log").read_text()
    assert "medray tune: stopped by SIGTERM: " in said
    for noise in ("Traceback", "received at", "Stack", "Fatal"):
        assert noise not in said
    states = trials.glob("*/checkpoints/*-last.pt")
    steps = [torch.load(state, weights_only=True)["step"] for state in states]
    assert max(steps) > 0, "what was learned since the epoch's end is lost"
    assert not [*trials.glob("*/checkpoints/stop")]


@pytest.fixture
def nodes() -> Iterator[list[Any]]:
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    size = {"object_store_memory": 200 << 20, "memory": 8 << 30}
    # Only the second has CPUs, so the training runs there. A node that is drained and
    # has no work is gone at once, before anyone could hear of it.
    head, second = (cluster.add_node(num_cpus=cpus, **size) for cpus in (0, 2))
    yield [cluster, head, second]
    cluster.shutdown()


def test_a_node_that_is_told_to_go_makes_the_state_be_kept(
    nodes: list[Any], cells: Path, tmp_path: Path
) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    cluster, _, second = nodes
    # The notice is heard within 2 s of the start of an epoch, which must last longer:
    # at its end the state is written anyway.
    schedule = Schedule(epochs=500, patience=500, save_minutes=60)
    data = Data(crop=32, samples=1200)
    long = replace(SMALL, data=data, schedule=schedule)
    process = start(long, cells, tmp_path, RAY_ADDRESS=cluster.address)
    history = tmp_path / "m" / "metrics.jsonl"
    wait_until(history.exists, process, tmp_path)
    accepted, why = GcsClient(cluster.address).drain_node(
        second.node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a test",
        int(time.time() + 300) * 1000,
    )
    assert accepted, why
    wait_until(lambda: state_of(tmp_path)["step"] > 0, process, tmp_path)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
