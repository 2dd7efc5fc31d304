"""Machines that do not come: Ray's own autoscaler with the settings of k8s/."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.scaling.autoscale import ray_cluster, scaled, wait_until

pytestmark = [
    pytest.mark.skipif(
        shutil.which("kubectl") is None, reason="kubectl is not on this machine"
    ),
    pytest.mark.timeout(600),
]

ASK = """
import os, time
import ray

ray.init(log_to_driver=False, logging_level="ERROR")

@ray.remote(num_gpus=1)
class Worker:
    def market(self):
        return ray.get_runtime_context().get_node_labels().get("medray/market")

worker = Worker.remote()
print("asked", flush=True)
print(ray.get(worker.market.remote()), flush=True)
"""


@pytest.fixture
def scarce(tmp_path: Path) -> Iterator[tuple[dict[str, str], Path]]:
    """A cloud without spot machines; the settings of k8s/, seconds for minutes."""
    log = tmp_path / "scarce.log"
    log.touch()
    (settings,) = (
        {one["name"]: one["value"] for one in spec["autoscalerOptions"]["env"]}
        for spec in [ray_cluster(2, tmp_path / "built")["spec"]]
    )
    assert set(settings) == {IDLE, ALLOCATE}
    with scaled(
        gpus=2,
        idle_s=5,
        provider="scarce_nodes.ScarceNodes",
        PYTHONPATH=str(Path(__file__).parents[2]),
        SCARCE_GROUP="gpu-spot",
        SCARCE_LOG=str(log),
        **{IDLE: "5", ALLOCATE: "45"},
    ) as environment:
        yield environment, log


IDLE = "RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S"
ALLOCATE = "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S"


def noted(log: Path, what: str) -> list[float]:
    lines = (line.split() for line in log.read_text().splitlines())
    return [float(at) for at, kind in lines if kind == what]


def test_what_nobody_needs_is_withdrawn_and_what_does_not_come_asked_elsewhere(
    scarce: tuple[dict[str, str], Path],
) -> None:
    """Requests not needed any more are withdrawn; those pending are made elsewhere."""
    environment, log = scarce
    command = [sys.executable, "-c", ASK]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True
    ) as first:
        wait_until(lambda: bool(noted(log, "asked")), 120)
        time.sleep(10)  # longer than what is idle may be pending
        assert not noted(log, "withdrawn")
        first.kill()
    wait_until(lambda: bool(noted(log, "withdrawn")), 60)
    ended, asked = noted(log, "withdrawn")[0], noted(log, "asked")[0]
    assert ended - asked < 45  # not because it was pending for too long

    # A night that goes on needs one: the group for on-demand machines is asked.
    second = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300
    )
    assert second.stdout.split() == ["asked", "on-demand"], second.stderr
