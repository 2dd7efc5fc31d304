"""Checks of this machine: packages, bytecode, memory, GPUs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import ray
from packaging.requirements import Requirement

from medray.apps.doctor.findings import Finding
from medray.models import has_gpu_driver

GIB = 1 << 30

# A run without GPU is budgeted at about this much (medray/inference/memory.py).
_LEAST_MEMORY = 4 * GIB

# What Ray gives its object store by default, and where that lies.
_STORE_SHARE, SHARED_MEMORY = 0.3, "/dev/shm"


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
    """Check that Python finds its packages compiled.

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


def check_memory(limit: int, shared: int) -> list[Finding]:
    """Judge the memory here.

    Args:
        limit: Bytes that processes may use.
        shared: Bytes that /dev/shm may hold.
    """
    said = f"{limit / GIB:.1f} GiB"
    findings = [Finding("memory", "ok", said)]
    if limit < _LEAST_MEMORY:
        mend = f"give the container {_LEAST_MEMORY / GIB:.0f} GiB; see `medray plan`"
        findings = [Finding("memory", "FAIL", said, mend)]
    store = int(limit * _STORE_SHARE)
    said = f"{shared / GIB:.1f} GiB, Ray's object store wants {store / GIB:.1f} GiB"
    if shared >= store:
        return [*findings, Finding(SHARED_MEMORY, "ok", said)]
    mend = (
        "give the container more (docker --shm-size, on Kubernetes an emptyDir of "
        "medium Memory), else Ray keeps objects in /tmp, which is slow"
    )
    return [*findings, Finding(SHARED_MEMORY, "WARN", said, mend)]


def gpus_here() -> tuple[int, int, str]:
    """Return how many GPUs this machine has, how many torch can use, and in words."""
    if not has_gpu_driver():
        return 0, 0, "none"
    import torch  # it takes seconds

    there = len([*Path("/proc/driver/nvidia/gpus").glob("*")])
    usable = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = [torch.cuda.get_device_name(i) for i in range(usable)]
    return there, usable, f"{', '.join(names) or 'none'} (CUDA {torch.version.cuda})"


def check_gpus() -> Finding:
    """Check that torch can use all GPUs of this machine."""
    there, usable, said = gpus_here()
    if usable < there and not os.environ.get("CUDA_VISIBLE_DEVICES"):
        return Finding(
            "GPUs",
            "FAIL",
            f"{there} in this machine, torch can use {usable}: {said}",
            "install a torch for CUDA, and a driver that is new enough for it",
        )
    return Finding("GPUs", "ok", said)
