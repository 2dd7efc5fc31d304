"""Whether this machine, its storage and a Ray cluster can do what medray asks of them.

Nothing is changed; in OUT a file is written and removed. Each check tells what it found
and, where that is not enough, what to do about it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import secrets
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from packaging.requirements import Requirement

from medray.apps.submit import TOKEN_ADVICE, auth_token
from medray.errors import MedrayError
from medray.models.config import model_digest, read_config
from medray.storage import files

Status = Literal["ok", "WARN", "FAIL"]

# Seconds for a port, for a page, and for a cluster to answer.
_PORT_S, _PAGE_S, _CLUSTER_S = 5.0, 10.0, 60.0
_GIB = 1 << 30
# A run without GPU is budgeted at about this much (medray/inference/memory.py).
_LEAST_MEMORY = 4 * _GIB
_LEAST_FREE = 10 * _GIB
# What Ray gives its object store by default, and where that lies.
_STORE_SHARE, _SHARED_MEMORY = 0.3, "/dev/shm"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: What was looked at.
        status: ok, WARN (it works, but badly or not everywhere) or FAIL.
        found: What it is.
        mend: What to do; empty when it is fine.
    """

    name: str
    status: Status
    found: str
    mend: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    findings: list[Finding]

    @property
    def code(self) -> int:
        """The exit code: 1 if anything failed."""
        return int(any(finding.status == "FAIL" for finding in self.findings))


def doctor(
    *,
    model: str | None = None,
    out: str | None = None,
    address: str | None = None,
    kubernetes: bool = False,
    namespace: str | None = None,
) -> Diagnosis:
    """Look at packages, memory, GPUs, and at a model, a place and a cluster if named.

    Args:
        model: Model folder.
        out: Where a run is to be written.
        address: Of a Ray cluster: HOST:PORT, ray://HOST:PORT, auto, or the http://
            address of its dashboard; None: RAY_ADDRESS, if that is set.
        kubernetes: Look at the Kubernetes cluster of kubectl's context or, in a pod, of
            this pod.
        namespace: Where medray is there; None: this pod's, or `medray`.

    Raises:
        ConfigError: `kubernetes` without its package.
    """
    if kubernetes:
        from medray.apps.doctor.kubernetes import check_kubernetes

        return Diagnosis(check_kubernetes(namespace))
    findings = [check_packages(importlib.metadata.requires("medray") or ())]
    findings.append(check_bytecode())
    findings += check_memory(_memory_limit(), shutil.disk_usage(_SHARED_MEMORY).total)
    findings.append(_check_gpus())
    findings += check_ray(address or os.environ.get("RAY_ADDRESS", ""))
    if model:
        findings.append(check_model(model))
    if out:
        findings += check_storage(out)
    return Diagnosis(findings)


# --- this machine ---------------------------------------------------------------------


def check_packages(requirements: Iterable[str]) -> Finding:
    """Compare what is installed with requirements, as in PEP 508."""
    wrong = []
    for text in requirements:
        wanted = Requirement(text)
        if wanted.marker and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted.name} is missing, needed {wanted.specifier}")
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found}, needed {wanted.specifier}")
    if wrong:
        mend = "pip install -c constraints.txt medray"
        return Finding("packages", "FAIL", "; ".join(wrong), mend)
    version = importlib.metadata.version("medray")
    said = (
        f"medray {version}, Ray {ray.__version__}, Python {platform.python_version()}"
    )
    return Finding("packages", "ok", said)


def check_bytecode() -> Finding:
    """Look whether Python finds its packages compiled.

    Every worker of Ray is a new process that imports torch; where neither an installer
    nor Python itself left bytecode, each compiles all of it again.
    """
    there = importlib.util.cache_from_source(ray.__file__)
    if Path(there).exists():
        return Finding("bytecode", "ok", "packages are compiled")
    mend = (
        "unset PYTHONDONTWRITEBYTECODE, or once as who installed it: "
        f"{sys.executable} -m compileall -q {Path(ray.__file__).parents[1]}"
    )
    said = "packages are not compiled: every worker starts about three times slower"
    return Finding("bytecode", "WARN", said, mend)


def _memory_limit() -> int:
    """Give the bytes that processes here may use: the container's limit, or all."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = Path("/sys/fs/cgroup", path).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return min(total, int(text))
    return total


def check_memory(limit: int, shared: int) -> list[Finding]:
    """Judge the memory here.

    Args:
        limit: Bytes that processes may use.
        shared: Bytes that /dev/shm may hold.
    """
    said = f"{limit / _GIB:.1f} GiB"
    findings = [Finding("memory", "ok", said)]
    if limit < _LEAST_MEMORY:
        mend = f"give the container {_LEAST_MEMORY / _GIB:.0f} GiB; see `medray plan`"
        findings = [Finding("memory", "FAIL", said, mend)]
    store = int(limit * _STORE_SHARE)
    said = f"{shared / _GIB:.1f} GiB, Ray's object store wants {store / _GIB:.1f} GiB"
    if shared >= store:
        return [*findings, Finding(_SHARED_MEMORY, "ok", said)]
    mend = (
        "give the container more (docker --shm-size, on Kubernetes an emptyDir of "
        "medium Memory), else Ray keeps objects in /tmp, which is slow"
    )
    return [*findings, Finding(_SHARED_MEMORY, "WARN", said, mend)]


def gpus_here() -> tuple[int, int, str]:
    """Give how many GPUs this machine has, how many torch can use, and in words."""
    import torch

    there = len([*Path("/proc/driver/nvidia/gpus").glob("*")])
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(i) for i in range(usable)]
    return there, usable, f"{', '.join(names) or 'none'} (CUDA {torch.version.cuda})"


def _check_gpus() -> Finding:
    there, usable, said = gpus_here()
    if usable < there and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return Finding(
            "GPUs",
            "FAIL",
            f"{there} in this machine, torch can use {usable}: {said}",
            "install a torch for CUDA, and a driver that is new enough for it",
        )
    return Finding("GPUs", "ok", said)


# --- the cluster ----------------------------------------------------------------------


def check_ray(address: str) -> list[Finding]:
    """Look whether a cluster answers, and whether its nodes are alike.

    Args:
        address: As `doctor` takes it; empty: none.
    """
    if not address or address == "local":
        said = "no cluster named; commands start a local Ray, with a token of its own"
        return [Finding("Ray", "ok", said)]
    if address.startswith(("http://", "https://")):
        return [_check_dashboard(address)]
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), _PORT_S).close()
        except OSError as error:
            return [
                Finding(
                    "Ray",
                    "FAIL",
                    f"{address}: nobody answers there ({error})",
                    "see that the head runs, that the address is right (port 6379, of "
                    "ray:// 10001), and that no firewall or NetworkPolicy lies between",
                )
            ]
    return _ask_cluster(address)


def _check_dashboard(address: str) -> Finding:
    token = auth_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    # /api/version answers anybody; this one asks for the token.
    try:
        jobs = f"{address.rstrip('/')}/api/jobs/"
        request = urllib.request.Request(jobs, headers=headers)
        urllib.request.urlopen(request, timeout=_PAGE_S).close()
        uri = f"{address.rstrip('/')}/api/version"
        request = urllib.request.Request(uri, headers=headers)
        with urllib.request.urlopen(request, timeout=_PAGE_S) as response:
            there = json.loads(response.read())["ray_version"]
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return Finding("Ray", "FAIL", f"{address}: refuses the token", TOKEN_ADVICE)
        return Finding("Ray", "FAIL", f"{address}: {error}", "is this a dashboard?")
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = getattr(error, "reason", None) or error
        mend = "see that the head runs, and that this is its dashboard (port 8265)"
        return Finding("Ray", "FAIL", f"{address}: no Ray answers ({said})", mend)
    return _versions_finding(address, {there})


def _versions_finding(where: str, versions: set[str]) -> Finding:
    if versions == {ray.__version__}:
        return Finding("Ray", "ok", f"{where}: Ray {ray.__version__}")
    said = f"{where}: Ray {', '.join(sorted(versions))}, here {ray.__version__}"
    return Finding("Ray", "FAIL", said, "use one image, or one version, everywhere")


def _ask_cluster(address: str) -> list[Finding]:
    """Ask each node, from a process of its own: Ray may wait for minutes."""
    command = [
        sys.executable,
        "-c",
        "import medray.apps.doctor.doctor as d; d.tell_cluster()",
    ]
    try:
        asked = subprocess.run(
            command,
            env=os.environ | {"RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=_CLUSTER_S,
        )
    except subprocess.TimeoutExpired:
        said = f"{address}: takes connections but gave no answer in {_CLUSTER_S:.0f} s"
        mend = f"{TOKEN_ADVICE}; if that is right look at the head's logs and load"
        return [Finding("Ray", "FAIL", said, mend)]
    if asked.returncode:
        return [_refusal(address, asked.stderr)]
    nodes: list[dict[str, Any]] = json.loads(asked.stdout.splitlines()[-1])
    findings = [_versions_finding(address, {node["ray"] for node in nodes})]
    for name in ("python", "medray"):
        versions = sorted({str(node[name]) for node in nodes})
        said = f"{name} {', '.join(versions)} on {len(nodes)} nodes"
        if len(versions) == 1:
            findings.append(Finding(f"nodes' {name}", "ok", said))
        else:
            mend = "use one image everywhere"
            findings.append(Finding(f"nodes' {name}", "FAIL", said, mend))
    for node in nodes:
        if node["gpus"] > node["usable"]:
            said = f"{node['node']} offers {node['gpus']} GPUs, torch can use "
            said += f"{node['usable']}"
            mend = "use the image with CUDA there, and a driver new enough for it"
            findings.append(Finding("nodes' GPUs", "FAIL", said, mend))
    return findings


def _refusal(address: str, said: str) -> Finding:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = lines[-1][:300] if lines else "it said nothing"
    token = any(w in said for w in ("AuthenticationError", "Unauthenticated", "token"))
    other = "see that the head runs, and that versions are equal"
    mend = TOKEN_ADVICE if token else other
    return Finding("Ray", "FAIL", f"{address}: {last}", mend)


def tell_cluster() -> None:
    """Print what each node of RAY_ADDRESS is, as JSON; for a process of its own."""
    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    tell = ray.remote(num_cpus=0)(_tell_node)
    asked = []
    for node in ray.nodes():
        if node["Alive"]:
            there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                node["NodeID"], soft=False
            )
            gpus = int(node["Resources"].get("GPU", 0))
            told = tell.options(scheduling_strategy=there).remote(
                node["NodeManagerAddress"], gpus
            )
            asked.append(told)
    sys.stdout.write(json.dumps(ray.get(asked)) + "\n")


def _tell_node(node: str, gpus: int) -> dict[str, Any]:
    try:
        version = importlib.metadata.version("medray")
    except importlib.metadata.PackageNotFoundError:
        version = "missing"
    # Ray hides a node's GPUs from tasks that ask for none; the driver lists them all.
    usable = len([*Path("/proc/driver/nvidia/gpus").glob("*")])
    return {
        "node": node,
        "ray": ray.__version__,
        "python": platform.python_version(),
        "medray": version,
        "gpus": gpus,
        "usable": usable,
    }


# --- model and storage ----------------------------------------------------------------


def check_model(model: str) -> Finding:
    """Look whether a model folder can be read."""
    try:
        config, digest = read_config(model), model_digest(model)
    except (MedrayError, OSError) as error:
        return Finding("model", "FAIL", f"{error}", "name a folder of `medray train`")
    classes = ", ".join(config.classes.names)
    return Finding("model", "ok", f"{model}: {classes}; {digest}")


def check_storage(out: str) -> list[Finding]:
    """Write, read back and remove a file; in a bucket also a conditional write."""
    out = files.absolute(out)
    place = out
    while files.is_local(place) and not os.path.lexists(place):
        place = os.path.dirname(place)
    uri = files.join(place, f".medray-doctor-{secrets.token_hex(8)}")
    data = secrets.token_bytes(1 << 16)
    try:
        files.write_bytes(uri, data)
        try:
            same = files.read_bytes(uri) == data
            excludes = _is_exclusive(uri)
        finally:
            files.remove(uri)
    except (MedrayError, OSError) as error:
        return [
            Finding("storage", "FAIL", f"{error}", "name another --out, or mend it")
        ]
    if not same:
        said, mend = f"{out}: gives back other bytes than were written", "replace it"
        return [Finding("storage", "FAIL", said, mend)]
    if not excludes:
        said = f"{out}: does not refuse to create what is there"
        mend = "use a store with conditional writes: two runs could not tell each other"
        return [Finding("storage", "FAIL", said, mend)]
    findings = [Finding("storage", "ok", f"{out}: written, read back, removed")]
    if files.is_local(out):
        findings.append(check_free(shutil.disk_usage(place).free))
    return findings


def _is_exclusive(uri: str) -> bool:
    try:
        files.write_bytes(uri, b"", new=True)
    except FileExistsError:
        return True
    return False


def check_free(free: int) -> Finding:
    """Judge the free bytes of a disk."""
    said = f"{free / _GIB:.1f} GiB"
    if free >= _LEAST_FREE:
        return Finding("free space", "ok", said)
    mend = "free some; `medray plan` tells what a run needs"
    return Finding("free space", "WARN", said, mend)
