"""Checks whether this machine, its storage and a Ray cluster can run medray.

Nothing is changed; in OUT a file is written and removed. Each check reports what it
found and, where that is not enough, what to do about it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import secrets
import shutil

from medray.apps.doctor.findings import Diagnosis, Finding
from medray.apps.doctor.machine import (
    GIB,
    SHARED_MEMORY,
    check_bytecode,
    check_gpus,
    check_memory,
    check_packages,
)
from medray.apps.doctor.ray_cluster import check_form, check_ray
from medray.errors import ConfigError, MedrayError
from medray.inference import memory_limit
from medray.models import model_digest, read_config
from medray.storage import files

_LEAST_FREE = 10 * GIB


def doctor(
    *,
    model: str | None = None,
    out: str | None = None,
    address: str | None = None,
    kubernetes: bool = False,
    namespace: str | None = None,
) -> Diagnosis:
    """Check packages, memory and GPUs; a model, storage and a cluster if named.

    Args:
        model: Folder of a model to check too.
        out: Folder or address: check whether it can be written.
        address: Address of Ray: HOST:PORT, auto, or http://HOST:8265, a dashboard
            (RAY_ADDRESS, if that is set).
        kubernetes: Look at the Kubernetes cluster of kubectl's context or of this pod.
        namespace: Namespace of medray there (this pod's, or medray).

    Raises:
        ConfigError: `kubernetes` without its package, or `namespace` without it; the
            address is none.
    """
    if namespace and not kubernetes:
        raise ConfigError("--namespace goes with --kubernetes")
    if kubernetes:
        from medray.apps.doctor.kubernetes import check_kubernetes

        return Diagnosis(check_kubernetes(namespace))
    if address is None:
        address = os.environ.get("RAY_ADDRESS") or "local"
    check_form(address)
    findings = [check_packages(importlib.metadata.requires("medray") or ())]
    findings.append(check_bytecode())
    findings += check_memory(memory_limit(), shutil.disk_usage(SHARED_MEMORY).total)
    findings.append(check_gpus())
    findings += check_ray(address)
    if model:
        findings.append(check_model(model))
    if out:
        findings += check_storage(out)
    return Diagnosis(findings)


# --- model and storage ----------------------------------------------------------------


def check_model(model: str) -> Finding:
    """Check that a model folder can be read."""
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
    said = f"{free / GIB:.1f} GiB"
    if free >= _LEAST_FREE:
        return Finding("free space", "ok", said)
    mend = "free some; `medray plan` tells what a run needs"
    return Finding("free space", "WARN", said, mend)
