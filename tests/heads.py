"""A head of a Ray cluster that can be lost whole, as with its pod, and come again."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.scaling.autoscale import processes

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TOKEN = "0123456789abcdef" * 4
PORT, DASHBOARD, AGENT = 6396, 8296, 52396


@dataclass(frozen=True)
class Head:
    """What runs, and how it is reached.

    Attributes:
        environment: Of those who submit to it; the token is in it.
        mark: Stands in the environment of all its processes, jobs' own included.
    """

    environment: dict[str, str]
    mark: str

    def kill(self) -> None:
        """End everything that runs in its pod, at once."""
        for pid in processes(f"HEAD_MARK={self.mark}\0".encode(), "environ"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def head_node(cpus: int = 2, **variables: str) -> Iterator[Head]:
    """Start a head that asks for a token, and a dashboard that takes jobs.

    Args:
        cpus: How many it has.
        variables: Added to its environment.
    """
    # The folder of sockets must have a short name.
    folder = Path(tempfile.mkdtemp(prefix="mh", dir="/tmp"))
    mark = secrets.token_hex(8)
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    for name in ("RAY_ADDRESS", "PYTHONDONTWRITEBYTECODE"):
        environment.pop(name, None)
    command = [
        *(str(BIN / "ray"), "start", "--head", "--block", f"--num-cpus={cpus}"),
        *(f"--port={PORT}", f"--temp-dir={folder}"),
        *(f"--dashboard-port={DASHBOARD}", f"--dashboard-agent-listen-port={AGENT}"),
        # An agent that may choose has 15 s to tell, too little on a busy machine.
        *(f"--dashboard-agent-grpc-port={AGENT + 1}",),
        *(
            f"--metrics-export-port={AGENT + 2}",
            f"--runtime-env-agent-port={AGENT + 3}",
        ),
    ]
    log = folder / "head.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            env=environment | variables | {"HEAD_MARK": mark},
            cwd=ROOT,  # jobs start where the image's WORKDIR has its `jobs/`
            stdout=out,
            stderr=out,
        )
    environment["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{DASHBOARD}"
    head = Head(environment, mark)
    try:
        _wait_for_start(process, log)
        yield head
    finally:
        head.kill()
        process.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for_start(process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the head does not start: {log.read_text()}")
        time.sleep(0.3)


def jobs_of(environment: dict[str, str]) -> list[dict[str, Any]]:
    """What the head says of its jobs."""
    request = urllib.request.Request(
        f"{environment['RAY_API_SERVER_ADDRESS']}/api/jobs/",
        headers={"Authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        found: list[dict[str, Any]] = json.loads(answer.read())
    return found
