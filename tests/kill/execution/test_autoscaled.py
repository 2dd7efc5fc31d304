"""GPU nodes that come and go, by Ray's own autoscaler, and one that is taken away.

The groups are those of k8s/overlays/gke-gpu; see benchmarks/scaling/autoscale.py.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import serial

from benchmarks.scaling.autoscale import (
    HEAD,
    autoscaling,
    infer,
    masks,
    preempt,
    ray_cluster,
    scaled,
    wait_until,
    watching,
)
from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.inference.run import read_run
from medray.models.predict import Predictor

pytestmark = [
    pytest.mark.skipif(
        shutil.which("kubectl") is None, reason="kubectl is not on this machine"
    ),
]


SLIDES = 14


@pytest.fixture(scope="session")
def model(slow_model: Path) -> Path:
    return slow_model


@pytest.fixture(scope="module")
def scaling() -> Iterator[dict[str, str]]:
    with scaled(gpus=2, idle_s=5) as environment:
        yield environment


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    # So many regions that one node would need longer for them than another to come.
    for seed in range(SLIDES):
        scene = draw_scene(seed, height=1500, width=2000)
        write_slide(folder, f"s{seed}", scene, layout="pyramid")
    return folder


def test_the_groups_are_those_of_the_overlay(tmp_path: Path) -> None:
    config = autoscaling(ray_cluster(3, tmp_path), idle_s=5)
    groups = config["available_node_types"]
    assert set(groups) == {HEAD, "cpu", "gpu-spot", "gpu-on-demand"}
    assert groups[HEAD]["resources"]["CPU"] == 0
    for name in ("gpu-spot", "gpu-on-demand"):
        assert (groups[name]["min_workers"], groups[name]["max_workers"]) == (0, 3)
        assert groups[name]["resources"]["GPU"] == 1
    assert groups["gpu-spot"]["priority"] > groups["gpu-on-demand"]["priority"]


@pytest.mark.timeout(900)
def test_nodes_come_for_the_work_and_go_after_it_and_a_lost_one_costs_nothing(
    scaling: dict[str, str], many: Path, model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    killed: list[str] = []
    before: list[tuple[float, dict, int]] = []
    with watching(scaling, run) as watched:
        wait_until(lambda: bool(watched.samples), 60)
        assert watched.samples[0][1] == {}

        def take_away() -> None:
            if not killed and len(watched.working()) == 2 and watched.samples[-1][2]:
                before.extend(watched.samples)
                killed.append(watched.working()[0])
                preempt(killed[0])

        summary = infer(scaling, many, model, run, take_away)
        wait_until(lambda: not watched.samples[-1][1], 120)
    assert (summary["done"], summary["failed"]) == (SLIDES, {})
    assert killed
    assert max(len(there) for _, there, _ in before) == 2
    used = [sum(gpus[1] for gpus in there.values()) for _, there, _ in before]
    assert max(used) == 2
    markets = {n[2] for _, there, _ in before for n in there.values()}
    assert markets == {"spot"}  # none was missing, so none was taken on demand

    # As if no node had been lost: a plain loop in this process.
    options = read_run(str(run)).options
    predictor = Predictor.from_folders([str(model)], options.prediction)
    serial.infer(many, predictor, model, tmp_path / "alone", options)
    assert masks(run) == masks(tmp_path / "alone")


def test_a_few_small_slides_bring_one_gpu(
    scaling: dict[str, str], model: Path, tmp_path: Path
) -> None:
    """Machines are asked for by the regions that wait, not by slides."""
    for seed in range(4):
        scene = draw_scene(seed, height=600, width=700)
        write_slide(tmp_path / "slides", f"s{seed}", scene)
    run = tmp_path / "run"
    with watching(scaling, run) as watched:
        summary = infer(scaling, tmp_path / "slides", model, run)
        assert (summary["done"], summary["failed"]) == (4, {})
        wait_until(lambda: not watched.samples[-1][1], 120)
    assert len(watched.nodes) == 1


@pytest.mark.timeout(600)
def test_slides_to_ingest_bring_nodes_where_there_is_no_core(
    scaling: dict[str, str], many: Path, tmp_path: Path
) -> None:
    """The head has none: what Ray Data's pool asks for makes the first node come."""
    command = [sys.executable, "-m", "medray.cli", "ingest", str(many), "--json"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "data")],
        env=scaling,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["done"], found["failed"]) == (SLIDES, {})


REFUSED = """
import ray
from medray.execution import cluster
from medray.execution.actor_pool import Pool, poll

cluster.connect()
print("gpus", cluster.gpus(), "workers", cluster.gpu_workers(), flush=True)

class Worker:
    def work(self, rows):
        yield rows

with Pool(ray.remote(Worker).options(num_gpus=8).remote, "work", 1) as pool:
    while True:
        poll(pool)
"""


def test_a_gpu_request_that_no_node_can_meet_is_told(scaling: dict[str, str]) -> None:
    command = [sys.executable, "-c", REFUSED]
    done = subprocess.run(
        command, env=scaling, capture_output=True, text=True, timeout=180
    )
    assert "gpus 2 workers 2" in done.stdout
    assert done.returncode != 0
    assert "no node" in done.stderr.strip().split("\n")[-1]
