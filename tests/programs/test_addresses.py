"""Addresses of Ray: each form, and each way of no answer, in words and soon."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medray.apps.doctor.ray_cluster import check_form
from medray.apps.submit import check_dashboard_address
from medray.errors import ConfigError, MedrayError
from medray.execution.joining import check_head, parse_address

BIN = Path(sys.executable).parent
WRONG = (
    "",
    " ",
    "head",
    "head:",
    ":6379",
    "head:six",
    "head:0",
    "head:65536",
    "head:6379 ",
    " head:6379",
    "head:6379/",
    "head:٦٣٧٩",
    "::1:6379",
    "[::1]",
    "[::1:6379",
    "http://head:8265",
    "https://head",
    "ray://head:10001",
    "head:6379,other:6379",
    "user@head:6379",
)


def medray(
    *words: str, **variables: str
) -> tuple[subprocess.CompletedProcess[str], float]:
    started = time.monotonic()
    done = subprocess.run(
        [str(BIN / "medray"), *words],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done, time.monotonic() - started


@pytest.mark.parametrize(
    ("address", "place"),
    [
        ("127.0.0.1:6379", ("127.0.0.1", 6379)),
        ("ray-head.ns.svc.cluster.local:6379", ("ray-head.ns.svc.cluster.local", 6379)),
        ("my_head:1", ("my_head", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:6379", ("fe80::1%eth0", 6379)),
    ],
)
def test_addresses_of_heads_are_understood(
    address: str, place: tuple[str, int]
) -> None:
    assert parse_address(address) == place


@pytest.mark.parametrize("address", WRONG)
def test_what_is_no_address_is_refused_with_the_form(address: str) -> None:
    with pytest.raises(ConfigError, match=r"expected HOST:PORT of its head") as refused:
        check_head(address)
    assert repr(address)[1:-1] in str(refused.value)


@given(st.text() | st.from_regex(r"\A(https?://|ray://)?\[?[\w.:%-]*\]?(:\S*)?\Z"))
def test_no_text_is_more_than_refused(address: str) -> None:
    with contextlib.suppress(ConfigError):
        host, port = parse_address(address)
        assert host
        assert 0 < port < 65536
    with contextlib.suppress(ConfigError):
        check_form(address)
    with contextlib.suppress(ConfigError):
        check_dashboard_address(address)


@pytest.mark.parametrize(
    "address",
    [
        "",
        "head:8265",
        "http://",
        "http://:8265",
        "http://head:port",
        "http://[::1",
        "http://a b",
    ],
)
def test_a_dashboard_has_an_address_of_the_web(address: str) -> None:
    with pytest.raises(ConfigError, match="expected the http:// address"):
        check_dashboard_address(address)


def test_who_listens_may_be_no_head() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        with pytest.raises(MedrayError, match="no head of Ray answers"):
            check_head(f"127.0.0.1:{port}")
        assert time.monotonic() - started < 15
    with pytest.raises(MedrayError, match="nobody answers there"):
        check_head(f"127.0.0.1:{port}")


def test_commands_tell_of_an_address_before_ray_waits(tmp_path: Path) -> None:
    """RAY_ADDRESS of a stage, --address of the others: the same words."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    stage = ["ingest", str(tmp_path), "--out", str(tmp_path / "out")]
    (tmp_path / "x.tif").write_bytes(b"never opened")
    for words, variables, code, said in (
        (stage, {"RAY_ADDRESS": f"127.0.0.1:{port}"}, 1, "nobody answers there"),
        (stage, {"RAY_ADDRESS": "127.0.0.1"}, 2, "expected HOST:PORT"),
        (stage, {"RAY_ADDRESS": "ray://127.0.0.1:10001"}, 2, "expected HOST:PORT"),
        (["doctor", "--address", "nowhere"], {}, 2, "expected HOST:PORT"),
        (["doctor", "--address", ""], {}, 2, "expected HOST:PORT"),
    ):
        done, seconds = medray(*words, **variables)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False)
        assert said in done.stderr
        assert seconds < 30  # Python and its packages have to start, too
