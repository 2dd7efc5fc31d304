"""What a pod does before it ends, in the very words of k8s/: over soon, whatever is."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from heads import BIN, PORT, Head, head_node
from manifests import ROOT, build, find

import medray.apps.leave
from benchmarks.scaling.autoscale import processes
from medray.execution.gpu_worker import GpuWorker

pytestmark = pytest.mark.timeout(600)

GPU_WORKERS = """
import sys, time
import ray

class GpuWorker:
    def work(self):
        time.sleep(3)  # what is in hand
        return True

ray.init(log_to_driver=False, logging_level="ERROR")
actor = ray.remote(GpuWorker).options(num_cpus=1, resources={"worker": 1})
worker = actor.remote()
ray.get(worker.__ray_ready__.remote())
print("there", flush=True)
while not ray._private.state.state.get_draining_nodes():
    time.sleep(0.1)
print("told", flush=True)
ray.get(worker.work.remote())
worker.__ray_terminate__.remote()
time.sleep(60)
"""


def hook() -> list[str]:
    """The worker pods' preStop, all groups of an overlay: the same."""
    groups = find(build(ROOT / "k8s" / "overlays" / "gke-gpu"), "RayCluster")["spec"][
        "workerGroupSpecs"
    ]
    found = {
        tuple(
            group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"][
                "command"
            ]
        )
        for group in groups
    }
    ((python, *words),) = found
    assert python == "python"
    return [sys.executable, *words]


def test_it_looks_for_the_lanes_that_there_are() -> None:
    """By the name that Ray gives the processes of an actor."""
    assert f"ray::{GpuWorker.__name__}" == medray.apps.leave._GPU_WORKER


def leave(environment: dict[str, str], pod: int = 0) -> tuple[str, float]:
    """Run the hook, in a pod if one is named by its process; what it said, seconds."""
    start = time.monotonic()
    within = ["nsenter", f"--target={pod}", "--pid", "--mount"] if pod else []
    done = subprocess.run(
        [*within, *hook()], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stderr, time.monotonic() - start


def worker(head: Head, folder: Path) -> subprocess.Popen[bytes]:
    """A worker's pod: a node of its own, that sees no processes but its own."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    command += [str(BIN / "ray"), "start", "--block", f"--address=127.0.0.1:{PORT}"]
    command += ["--num-cpus=1", '--resources={"worker": 1}']
    with (folder / "worker.log").open("w") as out:
        environment = head.environment | {"HEAD_MARK": head.mark}
        return subprocess.Popen(command, env=environment, stdout=out, stderr=out)


def pod_environment(head: Head) -> dict[str, str]:
    return head.environment | {"RAY_ADDRESS": f"127.0.0.1:{PORT}"}


def test_without_ray_it_is_over_at_once() -> None:
    assert not processes(b"/raylet\0"), "another Ray runs on this machine"
    said, seconds = leave(dict(os.environ) | {"RAY_ADDRESS": "127.0.0.1:6379"})
    assert "no Ray runs here" in said
    assert seconds < 20


@pytest.mark.parametrize("how", ["lost", "hangs"])
def test_with_a_head_that_does_not_answer_it_is_over_soon(how: str) -> None:
    """A lost head takes no connection; one that hangs takes it and says nothing."""
    with head_node() as head:
        servers = processes(b"/gcs_server\0")
        assert len(servers) == 1
        os.kill(servers[0], signal.SIGKILL if how == "lost" else signal.SIGSTOP)
        try:
            said, seconds = leave(pod_environment(head))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(servers[0], signal.SIGKILL)
    assert ("no head answers" if how == "lost" else "did not answer") in said
    assert seconds < 20


def test_a_node_that_lives_is_drained_and_its_lanes_end(tmp_path: Path) -> None:
    with head_node(cpus=0) as head:
        node = worker(head, tmp_path)
        running = subprocess.Popen(
            [sys.executable, "-c", GPU_WORKERS],
            env=pod_environment(head),
            stdout=subprocess.PIPE,
            text=True,
        )
        with node, running:
            try:
                assert running.stdout is not None
                assert running.stdout.readline() == "there\n"
                (inside,) = psutil.Process(node.pid).children()
                said, seconds = leave(pod_environment(head), inside.pid)
                told = running.stdout.readline()
            finally:
                running.kill()
                node.kill()
    assert told == "told\n"
    assert "no GPU worker works here any more" in said
    assert 3 < seconds < 50  # what was in hand was waited for
