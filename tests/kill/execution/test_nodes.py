"""Runs on several Ray nodes, one of which goes.

That a node which is lost in the middle of a run costs nothing is in test_autoscaled.py.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
import serial

from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.inference.run import read_run
from medray.models.predict import Predictor


@pytest.fixture(scope="session")
def model(slow_model: Path) -> Path:
    return slow_model


@pytest.fixture
def nodes() -> Iterator[list]:
    """Two nodes of one worker without a GPU each, on this machine."""
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    size = {"num_cpus": 2, "object_store_memory": 200 << 20, "memory": 8 << 30}
    yield [cluster, cluster.add_node(**size), cluster.add_node(**size)]
    cluster.shutdown()


def start(
    slides: Path, model: Path, out: Path, address: str, log: IO[str] | None = None
) -> subprocess.Popen:
    command = [sys.executable, "-m", "medray.cli", "infer", str(slides), "--json"]
    command += ["--model", str(model), "--out", str(out), "--everywhere"]
    command += ["--region", "512", "--precision", "float32"]
    return subprocess.Popen(
        command,
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )


def write_slides(folder: Path) -> Path:
    for seed in range(6):
        scene = draw_scene(seed, height=1100, width=1400)
        write_slide(folder, f"s{seed}", scene, layout="pyramid")
    return folder


def committed(out: Path) -> int:
    return sum(p.read_text().count("\n") for p in out.glob("journal/*.jsonl"))


def titled(start: bytes) -> list[int]:
    """Processes that call themselves so."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if (entry / "cmdline").read_bytes().startswith(start):
                    found.append(int(entry.name))
    return found


def masks(out: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(out.glob("masks/**/*")) if path.is_file())
    return {str(path.relative_to(out)): path.read_bytes() for path in paths}


@pytest.mark.timeout(900)
def test_a_node_with_notice_finishes_what_it_has_and_loses_nothing(
    model: Path, tmp_path: Path, nodes: list
) -> None:
    """As `ray drain-node` gives it: k8s/ does before a pod ends."""
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    cluster, _, second = nodes
    slides = write_slides(tmp_path / "slides")
    out, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as told:
        process = start(slides, model, out, cluster.address, told)
    while committed(out) < 1 or len(titled(b"ray::GpuWorker")) < 2:
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    # What `ray drain-node` does, without the seconds that the command takes to start.
    in_100_s = int(time.time() + 100) * 1000
    accepted, why = GcsClient(cluster.address).drain_node(
        second.node_id,
        DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "a test",
        in_100_s,
    )
    assert accepted, why
    deadline = time.monotonic() + 100
    while len(titled(b"ray::GpuWorker")) > 1:
        assert time.monotonic() < deadline, "the GPU worker does not leave"
        time.sleep(0.2)
    cluster.remove_node(second, allow_graceful=False)
    answer, _ = process.communicate(timeout=600)
    assert process.returncode == 0, log.read_text()
    summary = json.loads(answer.splitlines()[-1])
    assert (summary["done"], summary["failed"]) == (6, {})
    assert "leaves its node" in log.read_text()
    assert "a process of work was lost" not in log.read_text()
    settings = read_run(str(out))
    predictor = Predictor.from_folders([str(model)], settings.options.prediction)
    serial.infer(slides, predictor, model, tmp_path / "alone", settings.options)
    assert masks(out) == masks(tmp_path / "alone")


# Asks of each node for what it has free and what a hand would give back.
OTHERS = """
import time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init("auto", log_to_driver=False)
other = ray.remote(lambda: time.sleep(900))
free = ray._private.state.available_resources_per_node()
waiting = [
    other.options(
        num_cpus=there["CPU"] + 0.25,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    ).remote()
    for node, there in free.items()
]
time.sleep(3)
print("waiting for", len(waiting), flush=True)
time.sleep(900)
"""


@pytest.mark.timeout(600)
def test_others_that_fill_the_nodes_do_not_starve_it(
    model: Path, tmp_path: Path, nodes: list
) -> None:
    """What dies comes back, though others wait for the room that it had."""
    cluster, *_ = nodes
    for seed in range(6):
        scene = draw_scene(seed, height=1100, width=1400)
        write_slide(tmp_path / "slides", f"s{seed}", scene, layout="pyramid")
    process = start(tmp_path / "slides", model, tmp_path / "run", cluster.address)
    hands: list[int] = []
    while len(hands) < 2 and process.poll() is None:
        time.sleep(0.1)
        hands = titled(b"ray::RegionIO")
    with subprocess.Popen(
        [sys.executable, "-c", OTHERS],
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        text=True,
    ) as others:
        try:
            assert others.stdout is not None
            assert any(line.startswith("waiting for 2") for line in others.stdout)
            for pid in hands:
                os.kill(pid, signal.SIGKILL)
            answer, _ = process.communicate(timeout=200)
        finally:
            process.kill()
            others.kill()
    assert process.returncode == 0, answer
    summary = json.loads(answer.splitlines()[-1])
    assert (summary["done"], summary["failed"]) == (6, {})


def start_training(
    recipe: Path, data: Path, out: Path, address: str
) -> subprocess.Popen:
    command = [sys.executable, "-m", "medray.cli", "train", str(recipe), "--json"]
    command += ["--data", str(data), "--out", str(out)]
    return subprocess.Popen(
        command,
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.timeout(1500)
def test_a_training_outlives_a_node(slides: Path, tmp_path: Path, nodes: list) -> None:
    """Elastic: what is left trains on, from the last checkpoint."""
    from medray.models.config import Architecture
    from medray.models.folder import load_model
    from medray.storage.yaml_config import write_settings
    from medray.training.augment import Augment
    from medray.training.recipe import Recipe
    from medray.training.sampler import Data
    from medray.training.schedule import Schedule

    cluster, _, second = nodes
    data = tmp_path / "data"
    command = [sys.executable, "-m", "medray.cli", "ingest", str(slides / "slides")]
    command += ["--annotations", str(slides / "annotations"), "--out", str(data)]
    command += ["--fractions", "0.75,0.25,0"]
    environment = os.environ | {"RAY_ADDRESS": cluster.address}
    subprocess.run(command, env=environment, check=True)
    recipe = Recipe(
        model=Architecture("unet", "tu-mobilenetv3_small_050"),
        data=Data(crop=64, samples=32),
        schedule=Schedule(epochs=3),
        augment=Augment(stain=0.1),
        batch=4,
        micro_batch_size=2,
        precision="float32",
        workers=(1, 2),
    )
    write_settings(str(tmp_path / "r.yaml"), recipe)
    out = tmp_path / "model"
    process = start_training(tmp_path / "r.yaml", data, out, cluster.address)
    history = out / "metrics.jsonl"
    while not history.exists():
        assert process.poll() is None
        time.sleep(0.2)
    first = history.read_text()
    cluster.remove_node(second, allow_graceful=False)
    assert process.poll() is None
    answer, _ = process.communicate(timeout=900)
    assert process.returncode == 0, answer
    # The first epoch was not done again, and none is missing.
    assert history.read_text().startswith(first.splitlines()[0])
    epochs = [json.loads(line)["epoch"] for line in history.read_text().splitlines()]
    assert epochs == [0, 1, 2]
    load_model(str(out))


@pytest.mark.timeout(300)
def test_nodes_that_go_speak_against_no_row(tmp_path: Path) -> None:
    """In a process of its own: this one may be connected to another cluster."""
    script = Path(__file__).parents[2] / "lost_nodes.py"
    command = [sys.executable, str(script), str(tmp_path / "log")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr
    assert "four nodes cost nothing, three processes a row" in found.stdout


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "story", ["nodes_die", "a_node_is_told_to_go", "a_node_dies_and_none_comes"]
)
def test_a_stream_outlives_its_nodes(tmp_path: Path, story: str) -> None:
    """In a process of its own: this one may be connected to another cluster."""
    script = Path(__file__).parents[2] / "stream_nodes.py"
    command = [sys.executable, str(script), story, str(tmp_path / "log")]
    found = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert found.returncode == 0, found.stderr
    assert "as it should be" in found.stdout
