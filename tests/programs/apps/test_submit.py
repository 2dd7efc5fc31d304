"""medray submit with a head that answers late, wrongly or not at all.

A head that is there is real in tests/kill/apps/test_heads.py; here it is one that loses
answers, which a real one cannot be made to give.
"""

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from medray.apps import submit as module
from medray.apps.submit import submit
from medray.errors import ConfigError, MedrayError

# As Ray words it: the agent's answer within the head's own traceback.
TWICE = "Traceback (most recent call last):\n" + "  File x, line 1\n" * 80
TWICE += (
    "RuntimeError: Request failed: a job with submission_id night already exists.\n"
)


@contextlib.contextmanager
def answering(answers: list[tuple[str, int, str]]) -> Iterator[tuple[str, list[str]]]:
    """Serve (method, status, text) one after the other; gives address and requests."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(size)
            if self.path.endswith("/logs/tail"):
                status, text = 404, ""
            else:
                asked.append(self.command)
                method, status, text = answers[min(len(asked), len(answers)) - 1]
                assert method == self.command
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Length", f"{len(data)}")
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_REST_S", 0.05)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def state(status: str, code: int | None = None) -> str:
    return json.dumps({"status": status, "message": "m", "driver_exit_code": code})


def test_a_job_that_was_taken_though_the_answer_was_lost_is_followed() -> None:
    answers = [
        ("GET", 404, ""),
        ("POST", 500, TWICE),
        ("GET", 200, state("RUNNING")),
        ("GET", 200, state("SUCCEEDED", 0)),
    ]
    with answering(answers) as (address, asked):
        found = submit(["true"], job="night", address=address)
    assert (found.status, found.code, found.lost) == ("SUCCEEDED", 0, 0)
    assert asked == ["GET", "POST", "GET", "GET"]


def test_a_head_without_its_agent_is_waited_for() -> None:
    answers = [
        *[("GET", 404, ""), ("POST", 500, "no agent yet")] * 3,
        ("GET", 404, ""),
        ("POST", 200, "{}"),
        ("GET", 200, state("FAILED", 3)),
    ]
    with answering(answers) as (address, _):
        found = submit(["true"], job="night", address=address)
    assert (found.status, found.code, found.lost) == ("FAILED", 3, 0)


def test_a_head_that_always_loses_its_jobs_is_given_up() -> None:
    with answering([("GET", 404, ""), ("POST", 200, "{}")] * 20) as (address, asked):
        with pytest.raises(MedrayError, match="lost 6 times"):
            submit(["true"], job="night", address=address)
    assert asked.count("POST") == 6


def test_seconds_of_silence_are_those_of_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A head that takes connections and says nothing is no longer waited for."""
    monkeypatch.setattr(module, "_ANSWER_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        start = time.monotonic()
        with pytest.raises(MedrayError, match="no head has answered for 2 s"):
            submit(["true"], job="night", address=address, wait=2.0)
        assert 2 <= time.monotonic() - start < 20


@pytest.mark.parametrize("job", ["a/b", "a b", "", "a#b"])
def test_an_id_that_no_address_can_hold_is_refused(job: str) -> None:
    with pytest.raises(ConfigError, match="job: expected an id"):
        submit(["true"], job=job, address="http://127.0.0.1:1")


def test_a_request_that_is_refused_is_not_repeated() -> None:
    with answering([("GET", 404, ""), ("POST", 400, "bad entrypoint")]) as (
        there,
        asked,
    ):
        with pytest.raises(ConfigError, match="bad entrypoint"):
            submit(["true"], job="night", address=there)
    assert asked == ["GET", "POST"]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_ends_the_following(number: signal.Signals, code: int) -> None:
    with socket.socket() as silent:  # takes no connection
        silent.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        words = ["submit", "--job", "night", "--address", address, "--", "true"]
        process = subprocess.Popen(
            [sys.executable, "-m", "medray.cli", *words],
            stderr=subprocess.PIPE,
            text=True,
            # A shell has its background jobs ignore SIGINT, and they their children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stderr is not None
        assert "waiting for a head" in process.stderr.readline()
        process.send_signal(number)
        _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert said == (
        f"medray submit: stopped by {number.name}: no longer followed; a job that was "
        f"submitted goes on; run the same command again to go on\n"
    )
