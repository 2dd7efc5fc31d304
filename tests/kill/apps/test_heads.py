"""`medray submit`: a night is one job, whoever follows it and whichever head has it."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from heads import BIN, Head, head_node, jobs_of
from manifests import ROOT, build, find, submitted

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `python` that writes down what it was given, and ends as `code` says."""
    folder = tmp_path_factory.mktemp("stand-in")
    (folder / "python").write_text(
        f'#!/bin/sh\nfor word in "$@"; do echo "$word"; done >> {folder}/given\n'
        f"echo heard\nexit $(cat {folder}/code)\n"
    )
    (folder / "python").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def head(stand_in: Path) -> Iterator[Head]:
    """A head whose jobs find the stand-in first, and $STORAGE as its pods do."""
    path = f"{stand_in}:{BIN}:{os.environ['PATH']}"
    with head_node(PATH=path, STORAGE="s3://bucket/a b") as head:
        yield head


def medray_submit(
    environment: dict[str, str], *words: str, **options: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "medray"), "submit", "--json", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


@pytest.mark.parametrize("overlay", ["cpu-kind", "gke-gpu"])
@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (2, 2)])
def test_what_the_cronjob_submits_is_run_as_it_is_meant(
    overlay: str, code: int, expected: int, head: Head, stand_in: Path
) -> None:
    """The container's very command, to a real head with a stand-in for `python`."""
    built = build(ROOT / "k8s" / "overlays" / overlay)
    (container,) = find(built, "CronJob")["spec"]["jobTemplate"]["spec"]["template"][
        "spec"
    ]["containers"]
    storage = find(built, "ConfigMap", "settings")["data"]["STORAGE"]
    # As Kubernetes fills in.
    known = {"STORAGE": storage, "JOB_UID": f"{overlay}-{code}"}
    words = [
        re.sub(r"\$\((\w+)\)", lambda found: known[found[1]], word)
        for word in (*container["command"], *container["args"])
    ]
    (stand_in / "code").write_text(f"{code}")
    (stand_in / "given").unlink(missing_ok=True)
    done = subprocess.run(
        [str(BIN / words[0]), *words[1:]],
        env=head.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expected, done.stderr
    assert "heard" in done.stderr
    assert (stand_in / "given").read_text().splitlines() == [
        "jobs/nightly.py",
        *("--inbox", f"{storage}/inbox", "--model", f"{storage}/model"),
        *("--out", f"{storage}/nights"),
    ]


@pytest.mark.parametrize(
    "kind", ["RayJob ingest", "RayJob infer", "RayCronJob nightly"]
)
def test_what_kuberay_submits_is_run_as_it_is_meant(
    kind: str, head: Head, stand_in: Path, tmp_path: Path
) -> None:
    """KubeRay hands a job's entrypoint to the head as it is, by the same interface."""
    (stand_in / "code").write_text("0")
    (stand_in / "given").unlink(missing_ok=True)
    entrypoint = submitted(kind, tmp_path)
    body = {"entrypoint": entrypoint, "submission_id": kind.replace(" ", "-")}
    request = urllib.request.Request(
        f"{head.environment['RAY_API_SERVER_ADDRESS']}/api/jobs/",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {head.environment['RAY_AUTH_TOKEN']}"},
    )
    urllib.request.urlopen(request, timeout=30).close()
    followed = medray_submit(
        head.environment, "--job", body["submission_id"], "--", "no-such-command"
    )
    assert followed.returncode == 0, followed.stderr
    given = (stand_in / "given").read_text()
    assert given.split("\n")[0] == entrypoint.split()[1]
    assert "$STORAGE" not in given
    assert "s3://bucket/a" in given


def test_exit_codes_are_those_of_the_command(head: Head) -> None:
    for job, script, code in (
        ("three", "exit 3", 3),
        ("killed", "kill -9 $$", 1),  # no signal to whoever follows
        ("quoted", '[ "$1" = "a  b" ]', 0),
    ):
        done = medray_submit(
            head.environment, *("--job", job, "--", "sh", "-c", script, "sh", "a  b")
        )
        assert done.returncode == code, (job, done.stderr)
        result = json.loads(done.stdout)
        assert result["job"] == job
        assert result["status"] == ("FAILED" if code else "SUCCEEDED")


def test_a_wrong_request_is_told(head: Head) -> None:
    wrong = head.environment | {"RAY_AUTH_TOKEN": "f" * 64}
    refused = medray_submit(wrong, "--job", "x", "--", "true")
    assert refused.returncode == 2
    assert "refuses the token" in refused.stdout
    nowhere = head.environment | {"RAY_API_SERVER_ADDRESS": "127.0.0.1:8265"}
    refused = medray_submit(nowhere, "--job", "x", "--", "true")
    assert refused.returncode == 2
    assert "http://" in refused.stdout
    silent = head.environment | {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    start = time.monotonic()
    refused = medray_submit(silent, *("--job", "x", "--wait", "5", "--", "true"))
    assert refused.returncode == 1
    assert "no head has answered" in refused.stdout
    assert time.monotonic() - start < 60


def test_who_follows_may_be_replaced(head: Head, tmp_path: Path) -> None:
    """As when the pod that submits is evicted: one job, no second start of its work."""
    script = f"echo begun >> {tmp_path}/begun; sleep 8; echo the end"
    words = ["--job", "replaced", "--", "sh", "-c", script]
    # The first process of a pod: it gets no signal that it does not wait for.
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    command += [str(BIN / "medray"), "submit", *words]
    with subprocess.Popen(
        command, env=head.environment, stderr=subprocess.PIPE, text=True
    ) as first:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        (inside,) = psutil.Process(first.pid).children()
        inside.terminate()
        _, said = first.communicate(timeout=20)
    assert first.returncode == 128 + signal.SIGTERM
    assert "a job that was submitted goes on" in said
    second = medray_submit(head.environment, *words)
    assert second.returncode == 0
    assert "following it" in second.stderr
    assert "the end" in second.stderr
    assert (tmp_path / "begun").read_text() == "begun\n"
    found = [one for one in jobs_of(head.environment) if "replaced" in str(one)]
    assert len(found) == 1
