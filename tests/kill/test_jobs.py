"""`ray job submit` of every job on a real local cluster with token authentication."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.util import get_node_ip_address

from medray.storage.yaml_config import write_settings
from medray.training.recipe import Recipe
from medray.training.sampler import Data
from medray.training.schedule import Schedule

pytestmark = pytest.mark.timeout(1200)
ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def cluster_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict]:
    """A head node on other ports than a local Ray takes, asking for a token."""
    token = tmp_path_factory.mktemp("token") / "auth_token"
    token.write_text("0123456789abcdef" * 4)
    environment = dict(os.environ)
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    environment.pop("RAY_ADDRESS", None)
    temporary = tmp_path_factory.mktemp("ray")
    # The folder of sockets must have a short name.
    short = Path("/tmp") / f"mr{os.getpid()}"
    short.symlink_to(temporary)
    start = [
        str(BIN / "ray"),
        *("start", "--head", "--block", "--num-cpus=2", "--port=6390"),
        *("--dashboard-port=8277", "--dashboard-agent-listen-port=52390"),
        f"--temp-dir={short}",
    ]
    head = subprocess.Popen(
        start,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    environment["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:8277"
    listing = [str(BIN / "ray"), "job", "list"]
    for _ in range(30):
        listed = subprocess.run(listing, env=environment, capture_output=True)
        if listed.returncode == 0:
            break
    assert listed.returncode == 0, listed.stderr.decode()
    yield environment
    head.terminate()
    try:
        head.wait(10)
    except subprocess.TimeoutExpired:  # Ray gives each of its processes half a minute
        os.killpg(head.pid, signal.SIGKILL)
        head.wait(60)
    short.unlink()


def test_doctor_tells_a_wrong_token(cluster_environment: dict, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("f" * 64)
    head = f"{get_node_ip_address()}:6390"
    for address in (head, "http://127.0.0.1:8277"):
        for token, code in ((None, 0), (wrong, 1)):
            environment = dict(cluster_environment)
            if token:
                environment["RAY_AUTH_TOKEN_PATH"] = str(token)
            command = [str(BIN / "medray"), "doctor", "--json", "--address", address]
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=150
            )
            found = {f["name"]: f for f in json.loads(done.stdout)["findings"]}["Ray"]
            assert found["status"] == ("FAIL" if code else "ok"), found
            assert ("RAY_AUTH_TOKEN" in found["mend"]) == bool(code), found


def submit(
    environment: dict, job: str, *arguments: str
) -> tuple[int, dict | None, str]:
    command = [str(BIN / "ray"), "job", "submit", "--working-dir", str(ROOT)]
    excludes = {"excludes": [".venv", ".uv", ".git", "demo", "*.pyc"]}
    command += ["--runtime-env-json", json.dumps(excludes)]
    command += ["--", sys.executable, f"jobs/{job}.py", *arguments, "--json"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"')]
    return done.returncode, json.loads(lines[-1]) if lines else None, done.stdout


@pytest.mark.timeout(1500)
def test_all_four_jobs_in_order(
    cluster_environment: dict, slides: Path, tmp_path: Path
) -> None:
    recipe = Recipe(data=Data(crop=128), schedule=Schedule(epochs=2), batch=4)
    write_settings(str(tmp_path / "recipe.yaml"), recipe)
    pictures, notes = str(slides / "slides"), str(slides / "annotations")
    data, model, run = (str(tmp_path / name) for name in ("data", "model", "run"))

    code, result, log = submit(
        cluster_environment,
        "ingest",
        *(pictures, "--annotations", notes, "--out", data),
        *("--fractions", "0.5,0.5,0"),
    )
    assert code == 0, log
    assert result is not None
    assert result["done"] == 4
    code, result, log = submit(
        cluster_environment,
        "train",
        *(str(tmp_path / "recipe.yaml"), "--data", data, "--out", model),
    )
    assert code == 0, log
    assert result is not None
    assert result["epochs"] == 2
    code, result, log = submit(
        cluster_environment, "infer", pictures, "--model", model, "--out", run
    )
    assert code == 0, log
    report = str(tmp_path / "report")
    code, result, log = submit(
        cluster_environment, "evaluate", run, "--truth", notes, "--out", report
    )
    assert code == 0, log
    assert result is not None
    assert 0 <= result["f1"] <= 1
    assert Path(result["report"]).is_file()
    code, _, log = submit(
        cluster_environment, "evaluate", "nowhere", "--truth", notes, "--out", report
    )
    assert code == 1
    assert "run.yaml" in log
