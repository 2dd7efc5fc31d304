"""Checks of a Ray cluster: does it answer, are its nodes alike."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import subprocess
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import ray

from medray.apps.doctor.findings import Finding
from medray.apps.submit import auth_token, check_dashboard_address
from medray.errors import MedrayError
from medray.execution import cluster

# Seconds for a page, and for a cluster to answer.
_PAGE_S, _CLUSTER_S = 10.0, 60.0


def check_ray(address: str) -> list[Finding]:
    """Check that a cluster answers, and that its nodes are alike.

    Args:
        address: As `doctor` takes it; empty: none.
    """
    if not address or address == "local":
        said = "no cluster named; commands start a local Ray, with a token of its own"
        return [Finding("Ray", "ok", said)]
    if _is_dashboard(address):
        return [_check_dashboard(address)]
    try:
        cluster.check_head(address)
    except MedrayError as error:
        said, _, mend = f"{error}".partition("; ")
        return [Finding("Ray", "FAIL", said, mend)]
    return _ask_cluster(address)


def check_form(address: str) -> None:
    """Check the form of an address of `doctor`.

    Raises:
        ConfigError: It is none.
    """
    if _is_dashboard(address):
        check_dashboard_address(address)
    elif address not in ("auto", "local"):
        cluster.parse_address(address)


def _is_dashboard(address: str) -> bool:
    return address.startswith(("http://", "https://"))


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
            return Finding(
                "Ray", "FAIL", f"{address}: refuses the token", cluster.TOKEN_ADVICE
            )
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
        "from medray.apps.doctor.ray_cluster import print_nodes; print_nodes()",
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
        mend = (
            f"{cluster.TOKEN_ADVICE}; if that is right look at the head's logs and load"
        )
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
    mend = cluster.TOKEN_ADVICE if token else other
    return Finding("Ray", "FAIL", f"{address}: {last}", mend)


def print_nodes() -> None:
    """Print what each node of RAY_ADDRESS is, as JSON; for a process of its own."""
    ray.init(logging_level=logging.ERROR, log_to_driver=False)
    describe = ray.remote(num_cpus=0)(_describe_node)
    asked = []
    for node in ray.nodes():
        if node["Alive"]:
            there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
                node["NodeID"], soft=False
            )
            gpus = int(node["Resources"].get("GPU", 0))
            said = describe.options(scheduling_strategy=there).remote(
                node["NodeManagerAddress"], gpus
            )
            asked.append(said)
    sys.stdout.write(json.dumps(ray.get(asked)) + "\n")


def _describe_node(node: str, gpus: int) -> dict[str, Any]:
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
