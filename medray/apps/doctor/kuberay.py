"""Checks of KubeRay in a Kubernetes cluster: its kinds of objects and its operator."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from medray.apps.doctor.findings import Finding
from medray.apps.doctor.kubernetes_api import Cluster, Object

_KUBERAY = (1, 7)  # the oldest that k8s/ is written for


def parse_version(text: str) -> tuple[int, ...]:
    """Return major and minor of a version such as `v1.30.2`; zeros if it has none."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check_kinds(cluster: Cluster) -> Iterator[Finding]:
    """Check that the kinds of objects that KubeRay brings (its CRDs) are there."""
    group = cluster.get("/apis/ray.io/v1")
    kinds = {one["kind"] for one in (group or {}).get("resources", [])}
    missing = {"RayCluster", "RayJob"} - kinds
    if missing:
        yield Finding(
            "KubeRay's kinds",
            "FAIL",
            f"{', '.join(sorted(missing))}: not known here",
            "install the operator with its CRDs: docs/kubernetes.md, step 2",
        )
    else:
        yield Finding("KubeRay's kinds", "ok", ", ".join(sorted(kinds)))


def check_operator(cluster: Cluster) -> Iterator[Finding]:
    """Check that KubeRay's operator runs, is new enough, and reaches medray's head."""
    name = "KubeRay's operator"
    there = [
        one
        for one in cluster.items("/apis/apps/v1/deployments")
        if one["metadata"]["name"].endswith("kuberay-operator")
    ]
    if not there:
        mend = "install it: docs/kubernetes.md, step 2"
        yield Finding(name, "FAIL", "there is none", mend)
        return
    operator = there[0]
    where = operator["metadata"]["namespace"]
    container = operator["spec"]["template"]["spec"]["containers"][0]
    image, ready = container["image"], operator.get("status", {}).get("readyReplicas")
    gates = _gates(container)
    on = ", ".join(sorted(gate for gate, value in gates.items() if value)) or "none"
    said = f"{image} in {where}, gates on: {on}"
    if not ready:
        mend = f"see why: kubectl -n {where} describe pods"
        yield Finding(name, "FAIL", f"{said}; no replica is ready", mend)
    elif "@" not in image and parse_version(image.rpartition(":")[2]) < _KUBERAY:
        wanted = ".".join(map(str, _KUBERAY))
        yield Finding(name, "WARN", said, f"k8s/ is for KubeRay {wanted} or newer")
    else:
        yield Finding(name, "ok", said)
    policies = cluster.mine("networkpolicies", "apis/networking.k8s.io/v1")
    let_in = [one for one in policies if one["metadata"]["name"] == "jobs-to-head"]
    if let_in and f'"{where}"' not in json.dumps(let_in):
        yield Finding(
            "operator's namespace",
            "FAIL",
            f"{where}, which the network policy jobs-to-head does not let in",
            f"write {where} into k8s/base/network.yaml (jobs-to-head), and apply",
        )
    if not gates.get("RayCronJob") and cluster.mine("raycronjobs", "apis/ray.io/v1"):
        yield Finding(
            "RayCronJob",
            "FAIL",
            "there is one, and the operator's feature gate RayCronJob is off: it will "
            "never run, and nothing says so",
            "turn the gate on (helm: featureGates), or use component cronjob",
        )


def _gates(container: Object) -> dict[str, bool]:
    """Return the feature gates that an operator was started with."""
    text = " ".join([*container.get("command", []), *container.get("args", [])])
    found = re.search(r"--?feature-gates[= ](\S+)", text)
    pairs = (pair.partition("=") for pair in (found[1].split(",") if found else ()))
    return {name: value.lower() == "true" for name, _, value in pairs}
