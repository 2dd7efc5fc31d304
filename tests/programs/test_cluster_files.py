"""cluster/: the image, and the files of Ray's cluster launcher."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import ROOT, instructions

CLUSTER = ROOT / "cluster"
BIN = Path(sys.executable).parent
LAUNCHERS = ["aws", "gcp", "local", "onprem"]


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())


# --- launcher files -------------------------------------------------------------------


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_files_are_valid_for_ray(name: str) -> None:
    from ray.autoscaler._private.local.config import prepare_local
    from ray.autoscaler._private.util import validate_config

    config = read(name)
    if config["provider"]["type"] == "local":
        # Its one node type is of Ray's making.
        config, _ = prepare_local(config)
    validate_config(config)
    with pytest.raises(Exception, match="max_worker"):
        validate_config(config | {"max_worker": 3})


@pytest.mark.parametrize("name", LAUNCHERS)
def test_gpus_come_when_asked_for(name: str) -> None:
    """Its head says how many, and does no work; GPU machines begin with none."""
    config = read(name)
    starts = " ".join(config["head_start_ray_commands"])
    if name == "local":  # is started by hand: its own first lines say how
        starts = (CLUSTER / "local.yaml").read_text()
    (asked,) = re.findall(r"--labels=medray/gpus=(\d+)", starts)
    assert "--num-cpus=0" in starts
    if name == "onprem":
        assert config["min_workers"] == 0
        assert int(asked) == len(config["provider"]["worker_ips"])
        return
    types = config["available_node_types"]
    with_gpu = {n: t for n, t in types.items() if "GPU" in t["resources"]}
    assert with_gpu
    for one in with_gpu.values():
        assert one["min_workers"] == 0
        assert one["max_workers"] == int(asked)
    assert config["max_workers"] >= int(asked)
    spot = [t["priority"] for n, t in with_gpu.items() if "spot" in n]
    other = [t["priority"] for n, t in with_gpu.items() if "demand" in n]
    assert all(a > b for a, b in zip(spot, other, strict=True))


@pytest.mark.parametrize("name", ["aws", "gcp", "onprem"])
def test_tokens_are_asked_for_and_travel_as_files(name: str) -> None:
    config = read(name)
    (target,) = [t for t in config["file_mounts"] if t.endswith("/.ray/auth_token")]
    assert config["file_mounts"][target] == "~/.ray/auth_token"
    for command in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [c for c in config[command] if "ray start" in c]
        # Else the image says so: see the test of it.
        assert config["docker"] or "RAY_AUTH_MODE=token" in start
        assert "0.0.0.0" not in start


def test_images_are_those_of_the_instructions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name in ("aws", "gcp"):
        image = read(name)["docker"]["image"]
        assert image.endswith(f"/medray:{project['version']}-gpu")
        assert (
            f"medray:{project['version']}-gpu" in (CLUSTER / "Dockerfile").read_text()
        )


def test_the_runtime_environment_is_one(tmp_path: Path) -> None:
    from ray.runtime_env import RuntimeEnv

    config = read("runtime_env")
    assert RuntimeEnv(**config)["env_vars"] == config["env_vars"]
    with pytest.raises(Exception, match="env_var"):
        RuntimeEnv(**{**config, "env_vars": "PATH"})
    kept = {"medray", "jobs", "pyproject.toml"}
    assert all((ROOT / name).exists() for name in kept)
    assert not kept & {name.strip("/") for name in config["excludes"]}


def node(label: str | None = None, *, alive: bool = True, gpus: float = 0.0) -> Any:
    """A row of `ray.nodes`, as Ray 2.60 gives it."""
    labels = {"ray.io/node-id": "0"} | ({"medray/gpus": label} if label else {})
    there = {"CPU": 2.0} | ({"GPU": gpus} if gpus else {})
    return {"Alive": alive, "Resources": there, "Labels": labels}


def test_gpus_that_may_come_are_counted_by_the_heads_label() -> None:
    from medray.errors import ConfigError
    from medray.execution.cluster import gpus_of

    assert gpus_of([]) == 0
    assert gpus_of([node(), node(gpus=2.0), node(gpus=1.0)]) == 3
    assert gpus_of([node("4"), node()]) == 4
    assert gpus_of([node("2"), node(gpus=2.0), node(gpus=1.0)]) == 3
    # One that went counts neither for what it had nor for what it said.
    assert gpus_of([node("4", alive=False), node(gpus=1.0, alive=False)]) == 0
    with pytest.raises(ConfigError, match="medray/gpus is 'many'"):
        gpus_of([node("many")])


def test_a_gpu_that_ray_only_pretends_to_have_is_none() -> None:
    from medray.execution.cluster import predicts_on_gpus

    real = node(gpus=1.0)
    real["Resources"]["accelerator_type:H200"] = 1.0
    assert predicts_on_gpus([node(), real])
    assert not predicts_on_gpus([node(), node(gpus=2.0)])
    assert not predicts_on_gpus([node(), real | {"Alive": False}])
    assert predicts_on_gpus([node("4"), node()])  # they come on request
    assert not predicts_on_gpus([node("4"), node(gpus=2.0)])


# --- the image ------------------------------------------------------------------------


def test_the_dockerfile_is_pinned_and_without_root() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (uv,) = re.findall(r'"(uv==[\d.]+)"', makefile)
    runs = " ".join(one.original for one in instructions("RUN"))
    assert uv in runs
    assert runs.count("pip install") == runs.count(uv) + 2
    assert "--constraints constraints.txt" in runs
    assert "--no-deps" in runs  # medray itself brings nothing
    python = (ROOT / ".python-version").read_text().strip()
    bases = [one.value[0] for one in instructions("FROM")]
    assert bases
    assert set(bases) == {f"python:{python}-slim-bookworm"}
    assert instructions("USER")[-1].value[0] == "1000:1000"
    assert instructions()[-1].cmd.upper() == "CMD"
    pairs = instructions("ENV")[-1].value
    environment = dict(zip(pairs[::2], pairs[1::2], strict=True))
    assert environment["RAY_AUTH_MODE"] == "token"
    # Ray's launcher starts login shells, in which /etc/profile has set PATH again.
    (login,) = re.findall(r"echo 'PATH=(\S+)' > /etc/profile\.d/\w+\.sh", runs)
    assert login == environment["PATH"]
    extras = set(re.findall(r"--extra (\w+)", runs))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras <= set(project["optional-dependencies"])
    assert {"gpu", "s3"} <= extras


def test_what_the_dockerfile_copies_is_in_its_context() -> None:
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    let_in = {line[1:] for line in rules if line.startswith("!")}
    copied = {
        source
        for one in instructions("COPY")
        if not any(flag.startswith("--from") for flag in one.flags)
        for source in one.value[:-1]
    }
    assert copied == let_in
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("variant", ["cpu", "gpu"])
def test_the_pinned_set_resolves_in_a_fresh_environment(
    variant: str, tmp_path: Path
) -> None:
    """The Dockerfile's own lines, but nothing is downloaded to stay."""
    uv = ROOT / ".uv" / "bin" / "uv"
    if not uv.exists():
        pytest.skip("needs uv in .uv, as `make setup` puts it there")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (line,) = [one for one in instructions("RUN") if "uv venv" in one.original]
    script = line.value[0].replace("/opt/venv", str(tmp_path / "venv"))
    script = script.replace("uv pip install", "uv pip install --dry-run")
    done = subprocess.run(
        ["sh", "-ec", script],
        cwd=tmp_path,
        env=os.environ
        | {"PATH": f"{uv.parent}:{os.environ['PATH']}", "VARIANT": variant}
        | {"TORCH_INDEX": "", "UV_PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    chosen = set(re.findall(r"^ \+ (\S+==\S+)$", done.stderr, re.MULTILINE))
    pins = set((ROOT / "constraints.txt").read_text().split())
    assert chosen
    assert chosen <= pins, f"not pinned: {sorted(chosen - pins)}"
    names = {one.split("==")[0] for one in chosen}
    assert {"ray", "torch", "obstore", "boto3"} <= names
    assert ("cupy-cuda13x" in names) == (variant == "gpu")


def test_the_wheel_can_be_built_from_what_is_copied(tmp_path: Path) -> None:
    uv = ROOT / ".uv" / "bin" / "uv"
    if not uv.exists():
        pytest.skip("needs uv in .uv, as `make setup` puts it there")
    stage: list[Any] = []
    for one in instructions():
        if one.cmd.upper() == "FROM" and stage:
            break
        stage.append(one)
    for one in stage:
        if one.cmd.upper() == "COPY":
            for source in one.value[:-1]:
                path = ROOT / source
                copy = shutil.copytree if path.is_dir() else shutil.copy
                copy(path, tmp_path / source)
    (line,) = [one for one in stage if "uv build" in one.original]
    subprocess.run(
        ["sh", "-ec", line.value[0]],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{uv.parent}:{os.environ['PATH']}"},
        check=True,
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.startswith("medray-")


def test_without_a_token_the_image_starts_no_ray(tmp_path: Path) -> None:
    pairs = instructions("ENV")[-1].value
    mode = dict(zip(pairs[::2], pairs[1::2], strict=True))["RAY_AUTH_MODE"]
    environment = os.environ | {"HOME": str(tmp_path), "RAY_AUTH_MODE": mode}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS"):
        environment.pop(name, None)
    done = subprocess.run(
        [*instructions("CMD")[-1].value, f"--temp-dir={tmp_path / 'ray'}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "no authentication token was found" in done.stderr
