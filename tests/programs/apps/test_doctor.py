"""medray doctor: each problem that can be made here is reported, and what to do about it."""

import importlib.metadata
import json
import py_compile
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from s3 import serving

from medray.apps.doctor.doctor import check_free, check_model, check_storage
from medray.apps.doctor.machine import check_bytecode, check_memory, check_packages
from medray.apps.doctor.ray_cluster import check_ray
from medray.cli import main

GIB = 1 << 30


def test_packages_are_compared_with_what_is_needed() -> None:
    wanted = importlib.metadata.requires("medray")
    assert wanted
    assert check_packages(wanted).status == "ok"
    wrong = ["numpy>=99", "pyarrow>=1", "no-such-thing>=2", "x>=1; extra == 'gpu'"]
    found = check_packages(wrong)
    assert found.status == "FAIL"
    version = importlib.metadata.version("numpy")
    assert found.found == (
        f"numpy {version}, needed >=99; no-such-thing is missing, needed >=2"
    )
    assert "constraints.txt" in found.mend


def test_packages_without_bytecode_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Python itself finds it: with the prefix elsewhere, nothing is compiled."""
    monkeypatch.setattr("sys.pycache_prefix", str(tmp_path))
    finding = check_bytecode()
    assert (finding.status, "compileall" in finding.mend) == ("WARN", True)
    py_compile.compile(ray.__file__)
    assert check_bytecode().status == "ok"


def test_memory_and_disks_are_judged() -> None:
    for limit, shared, expected in (
        (16 * GIB, 8 * GIB, ["ok", "ok"]),
        (16 * GIB, 64 << 20, ["ok", "WARN"]),  # what docker gives
        (2 * GIB, 8 * GIB, ["FAIL", "ok"]),
    ):
        findings = check_memory(limit, shared)
        assert [finding.status for finding in findings] == expected
        assert all(bool(f.mend) == (f.status != "ok") for f in findings)
    assert check_free(20 * GIB).status == "ok"
    assert check_free(GIB).status == "WARN"


def test_a_model_folder_is_read(model: Path, tmp_path: Path) -> None:
    assert check_model(str(model)).status == "ok"
    assert "model.yaml" in check_model(str(tmp_path)).found
    (tmp_path / "model.yaml").write_bytes((model / "model.yaml").read_bytes())
    assert check_model(str(tmp_path)).status == "FAIL"  # no weights


# --- storage --------------------------------------------------------------------------


def test_a_folder_is_written_and_left_as_it_was(tmp_path: Path) -> None:
    (finding, _) = check_storage(str(tmp_path / "not" / "yet"))
    assert finding.status == "ok"
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").write_bytes(b"in the way")
    for wrong in ("/proc/medray", str(tmp_path / "file" / "out")):
        (finding,) = check_storage(wrong)
        assert finding.status == "FAIL"
        assert "cannot be written" in finding.found


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount file systems")
    try:
        (finding,) = check_storage(str(disk))
        assert finding.status == "FAIL"
        assert "free space" in finding.found
        assert [*disk.iterdir()] == []
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_buckets_must_be_there_and_refuse_a_second_writer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving() as (_, environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        (finding,) = check_storage("s3://bucket/runs")
        assert finding.status == "ok"
        (finding,) = check_storage("s3://no-such-bucket/runs")
        assert finding.status == "FAIL"
        assert "NoSuchBucket" in finding.found


# --- Ray ------------------------------------------------------------------------------


def test_a_head_that_is_not_there_is_told_within_seconds() -> None:
    assert check_ray("")[0].status == "ok"  # a local one will do
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        (finding,) = check_ray(f"127.0.0.1:{port}")  # connects, and hears nothing
        assert (finding.status, bool(finding.mend)) == ("FAIL", True)
        assert "no head of Ray answers" in finding.found
    (finding,) = check_ray(f"127.0.0.1:{port}")
    assert "nobody answers there" in finding.found
    (finding,) = check_ray(f"http://127.0.0.1:{port}")
    assert "no Ray answers" in finding.found
    assert time.monotonic() - started < 60


@pytest.fixture
def dashboard() -> Iterator[tuple[str, dict[str, Any]]]:
    """A server that answers like a dashboard of another version."""
    answer: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer["status"])
            self.end_headers()
            self.wfile.write(answer["body"])

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answer
    server.shutdown()
    server.server_close()


def test_another_version_is_told(dashboard: tuple[str, dict[str, Any]]) -> None:
    address, answer = dashboard
    for status, body, said in (
        (200, b'{"ray_version": "2.9.0"}', f"Ray 2.9.0, here {ray.__version__}"),
        (200, b"<html>", "no Ray answers"),
        (404, b"", "404"),
    ):
        answer |= {"status": status, "body": body}
        (finding,) = check_ray(address)
        assert finding.status == "FAIL"
        assert said in finding.found


def test_the_command_exits_with_1_when_something_fails(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--out", "/proc/medray", "--model", str(model)]) == 1
    said = capsys.readouterr().out
    assert "FAIL  storage: /proc/" in said
    assert "ok    model" in said
    assert main(["doctor", "--out", "/proc/medray", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 1
    assert [f["name"] for f in found["findings"] if f["status"] == "FAIL"] == [
        "storage"
    ]
