"""A command and the head of a cluster: it joins, or says why not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from heads import PORT, head_node
from image_cells import write_cells

from benchmarks.scaling.autoscale import processes

pytestmark = pytest.mark.timeout(600)

OTHER_PYTHON = """
import json, sys
from ray._raylet import GcsClient
client = GcsClient(address=sys.argv[1])
place = (b"CLUSTER_METADATA", b"cluster")
kept = json.loads(client.internal_kv_get(*place))
kept["python_version"] = "3.9.1"
client.internal_kv_put(place[0], json.dumps(kept).encode(), True, place[1])
"""


def test_a_head_is_joined_or_it_is_said_why_not(tmp_path: Path) -> None:
    write_cells(tmp_path / "cells", patients=2, each=2)

    def ingest(name: str, **variables: str) -> tuple[int, str, float]:
        words = [sys.executable, "-m", "medray.cli", "ingest", str(tmp_path / "cells")]
        words += ["--side", "32", "--out", str(tmp_path / name)]
        started = time.monotonic()
        done = subprocess.run(
            words,
            env=environment | variables,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert "Traceback" not in done.stderr
        return done.returncode, done.stderr, time.monotonic() - started

    with head_node() as head:
        address = f"127.0.0.1:{PORT}"
        environment = head.environment | {"RAY_ADDRESS": address}
        code, said, _ = ingest("joined")
        assert code == 0, said
        code, said, _ = ingest("by-name", RAY_ADDRESS=f"localhost:{PORT}")
        assert code == 0, said
        code, said, seconds = ingest("token", RAY_AUTH_TOKEN="f" * 64)
        assert (code, seconds < 40) == (1, True)
        assert "refuses the token; give it the token of the head" in said
        other = [sys.executable, "-c", OTHER_PYTHON, address]
        subprocess.run(other, env=environment, check=True, timeout=100)
        code, said, _ = ingest("python")
        assert code == 1
        assert "this machine cannot join" in said
        assert "3.9.1" in said
        its = {*processes(f"HEAD_MARK={head.mark}\0".encode(), "environ")}
        (server,) = its & {*processes(b"/gcs_server\0")}
        os.kill(server, signal.SIGSTOP)
        code, said, seconds = ingest("hangs")
        assert (code, seconds < 40) == (1, True)  # Python starts in some of them
        assert "no head of Ray answers" in said
