"""The preStop hook of a worker's pod: `python -m medray.apps.leave SECONDS`.

Kubernetes calls it before it ends the pod. This node is drained in Ray, so that
its GPU workers finish the regions in hand and give back the rest
(`medray.execution.pool_state`); the pod may end once they have. It is over at once
where there is nothing to give back: no Ray here, or no head that could take it.
"""

from __future__ import annotations

import argparse
import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

# Seconds to see whether the head is there, and to drain the node. `ray drain-node`
# waits for good for a head that has gone; one that is there takes 5 to 10 s.
_KNOCK_S, _TELL_S = 2.0, 15.0
_GPU_WORKER = "ray::GpuWorker"  # as Ray titles the processes of that class


def leave(within: float) -> str:
    """Drain this node in Ray, and wait until its GPU workers have ended.

    Args:
        within: Seconds until the node is ended.

    Returns:
        The result, in words.
    """
    deadline = time.monotonic() + within
    raylet = _raylet_here()
    if raylet is None:
        return "no Ray runs here"
    head = raylet.value("--gcs-address")
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _KNOCK_S).close()
    except OSError as error:
        return f"no head answers at {head} ({error})"
    command = [
        *(str(Path(sys.executable).with_name("ray")), "drain-node"),
        *("--address", head, "--node-id", raylet.value("--node_id")),
        *(
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
            "--reason-message",
            "its pod ends",
        ),
        *("--deadline-remaining-seconds", str(int(within))),
    ]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_TELL_S)
    except subprocess.TimeoutExpired:
        return f"the head at {head} did not answer in {_TELL_S:.0f} s"
    if told.returncode:
        lines = told.stderr.strip().splitlines() or ["it said nothing"]
        return f"the head at {head} does not let it go: {lines[-1][:300]}"
    while _has_gpu_workers(raylet):
        if time.monotonic() > deadline:
            return "Ray was told; its GPU workers still work"
        time.sleep(0.5)
    return "Ray was told; no GPU worker works here any more"


@dataclass(frozen=True)
class _Process:
    pid: int
    parent: int
    words: list[str]

    def value(self, flag: str) -> str:
        """Return the value of a flag of its command line; empty: it is not given."""
        given = (word.partition("=") for word in self.words)
        return next((value for name, _, value in given if name == flag), "")


def _processes() -> Iterator[_Process]:
    for path in Path("/proc").glob("[0-9]*"):
        try:
            text = (path / "cmdline").read_bytes().decode(errors="replace")
            parent = re.search(r"^PPid:\s*(\d+)", (path / "status").read_text(), re.M)
        except OSError:  # it has ended
            continue
        yield _Process(
            int(path.name), int(parent[1]) if parent else 0, text.split("\0")
        )


def _raylet_here() -> _Process | None:
    found = (one for one in _processes() if one.words[0].endswith("/raylet"))
    return next(found, None)


def _has_gpu_workers(raylet: _Process) -> bool:
    return any(
        one.parent == raylet.pid and one.words[0].startswith(_GPU_WORKER)
        for one in _processes()
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m medray.apps.leave", description=__doc__
    )
    parser.add_argument("within", type=float, help="seconds until the node is ended")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("%s", leave(parser.parse_args().within))
