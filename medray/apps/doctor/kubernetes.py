"""Whether a Kubernetes cluster can run medray's nights; `medray doctor --kubernetes`.

Everything is only looked at, with the rights of whoever asks: kubectl's context or, in
a pod, its service account. What it may not read is reported, and is no failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from medray.apps.doctor.findings import Finding
from medray.apps.doctor.kuberay import check_kinds, check_operator, parse_version
from medray.apps.doctor.kubernetes_api import Cluster, ForbiddenError
from medray.apps.doctor.kubernetes_capacity import (
    check_gpus,
    check_quota,
    check_volumes,
)
from medray.apps.doctor.kubernetes_objects import (
    check_head,
    check_nights,
    check_pods,
    check_token,
)
from medray.errors import ConfigError

_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")

# The oldest that k8s/ is written for.
_KUBERNETES = (1, 30)


def check_kubernetes(namespace: str | None = None) -> list[Finding]:
    """Check all that a night needs of a cluster.

    Args:
        namespace: Where medray is; None: this pod's, or `medray`.

    Raises:
        ConfigError: Package `kubernetes` is missing.
    """
    try:
        from kubernetes import client, config
    except ImportError as error:
        raise ConfigError(
            "--kubernetes needs package `kubernetes`; install medray with the extra "
            "`kubernetes`"
        ) from error
    if namespace is None:
        try:
            namespace = _POD_NAMESPACE.read_text().strip()
        except OSError:
            namespace = "medray"
    settings = client.Configuration()
    try:
        if _POD_NAMESPACE.exists():
            load: Any = config.load_incluster_config
        else:
            load = config.load_kube_config
        load(client_configuration=settings)
    except config.ConfigException as error:
        mend = "see that `kubectl get nodes` works here, or set KUBECONFIG"
        return [Finding("Kubernetes", "FAIL", f"no cluster: {error}", mend)]
    settings.retries = 0
    return look_at(Cluster(client.ApiClient(settings), namespace))


def look_at(cluster: Cluster) -> list[Finding]:
    """Return the findings of all checks."""
    try:
        findings = list(_check_server(cluster))
    except (OSError, ForbiddenError) as error:
        said = " ".join(f"{error}".split())[:300]
        mend = "see that `kubectl get nodes` works here, and what its context is"
        return [Finding("Kubernetes", "FAIL", f"no answer: {said}", mend)]
    for name, check in _CHECKS.items():
        try:
            findings += check(cluster)
        except ForbiddenError as error:
            mend = f"ask somebody who may: kubectl get --raw '{error}'"
            findings.append(Finding(name, "WARN", "this user may not see it", mend))
        except OSError as error:
            findings.append(Finding(name, "FAIL", f"{error}"[:300], "ask again"))
    return findings


def _check_server(cluster: Cluster) -> Iterator[Finding]:
    found = cluster.get("/version") or {}
    said = str(found.get("gitVersion", ""))
    if parse_version(said) < _KUBERNETES:
        wanted = ".".join(map(str, _KUBERNETES))
        mend = f"k8s/ is for Kubernetes {wanted} or newer"
        yield Finding("Kubernetes", "WARN", said, mend)
    else:
        yield Finding("Kubernetes", "ok", said)


_CHECKS: dict[str, Callable[[Cluster], Iterator[Finding]]] = {
    "KubeRay's kinds": check_kinds,
    "KubeRay's operator": check_operator,
    "token": check_token,
    "head": check_head,
    "GPUs": check_gpus,
    "quota": check_quota,
    "volumes": check_volumes,
    "pods": check_pods,
    "nights": check_nights,
}
