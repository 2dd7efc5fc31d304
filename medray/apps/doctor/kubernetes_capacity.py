"""Checks of what a Kubernetes cluster has for medray: GPUs, quota, volumes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from medray.apps.doctor.findings import Finding
from medray.apps.doctor.kubernetes_api import Cluster, Object
from medray.execution import cluster as ray_cluster

_GPU = "nvidia.com/gpu"
# Labels by which clouds and NVIDIA's operator mark machines with GPUs.
_GPU_MACHINES = (
    "cloud.google.com/gke-accelerator",
    "k8s.amazonaws.com/accelerator",
    "nvidia.com/gpu.present",
    "feature.node.kubernetes.io/pci-10de.present",
)


def check_gpus(cluster: Cluster) -> Iterator[Finding]:
    """Compare how many GPUs medray may ask for with groups, quota and machines."""
    spec = cluster.ray_cluster()
    if spec is None:
        return
    asked = int(
        spec["spec"]["headGroupSpec"].get("labels", {}).get(ray_cluster.GPUS_LABEL, "0")
    )
    groups = [g for g in spec["spec"].get("workerGroupSpecs", []) if _gpus_of(g)]
    if not groups:
        yield Finding("GPUs", "ok", "none are asked for; workers predict on CPUs")
        return
    said = f"{asked} at most, in {', '.join(g['groupName'] for g in groups)}"
    quotas = cluster.mine("resourcequotas")
    most = {g["groupName"]: g["maxReplicas"] * _gpus_of(g) for g in groups} | {
        f"quota {quota['metadata']['name']}": int(
            read_quantity(hard[f"requests.{_GPU}"])
        )
        for quota in quotas
        if f"requests.{_GPU}" in (hard := quota["spec"].get("hard", {}))
    }
    if few := [f"{name} has {count}" for name, count in most.items() if count < asked]:
        mend = "set maxReplicas, the quota and the label by `gpus` of values.yaml"
        yield Finding("GPUs", "FAIL", f"{said}: {', '.join(few)}", mend)
    nodes = cluster.items("/api/v1/nodes")
    there = sum(int(n["status"].get("allocatable", {}).get(_GPU, 0)) for n in nodes)
    blind = [
        node["metadata"]["name"]
        for node in nodes
        if set(_GPU_MACHINES) & set(node["metadata"].get("labels", {}))
        and not int(node["status"].get("allocatable", {}).get(_GPU, 0))
    ]
    if blind:
        yield Finding(
            "GPU device plugin",
            "FAIL",
            f"{', '.join(blind[:3])}: a machine with GPUs that offers none",
            "install NVIDIA's device plugin (or GPU operator); on GKE its driver "
            "installer; it takes a minute on a new machine",
        )
    elif there:
        yield Finding("GPU device plugin", "ok", f"{there} {_GPU} on nodes; {said}")
    else:
        yield Finding(
            "GPU device plugin",
            "ok",
            f"no machine with GPUs now; {said}: the cloud's autoscaler must be able "
            f"to bring one from none",
        )


def _gpus_of(group: Object) -> int:
    limits = group["template"]["spec"]["containers"][0].get("resources", {})
    return int(limits.get("limits", {}).get(_GPU, 0))


def check_quota(cluster: Cluster) -> Iterator[Finding]:
    """Check whether a resource quota is used up."""
    for quota in cluster.mine("resourcequotas"):
        hard = quota.get("status", {}).get("hard", {})
        used = quota.get("status", {}).get("used", {})
        full = [
            f"{name} {used[name]} of {most}"
            for name, most in sorted(hard.items())
            if read_quantity(most) > 0
            and read_quantity(used.get(name, "0")) >= read_quantity(most)
        ]
        name = f"quota {quota['metadata']['name']}"
        if full:
            yield Finding(
                name,
                "WARN",
                f"full: {', '.join(full)}; pods beyond wait",
                "that is its use; raise it in k8s/base/limits.yaml or by `gpus`. "
                "Events `exceeded quota` after an eviction pass by themselves",
            )
        else:
            yield Finding(name, "ok", f"nothing is used up: {', '.join(sorted(hard))}")


_UNITS = {"m": 1e-3, "": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12} | {
    "Ki": 2.0**10,
    "Mi": 2.0**20,
    "Gi": 2.0**30,
    "Ti": 2.0**40,
}


def read_quantity(quantity: str) -> float:
    """Read a Kubernetes quantity such as `200m` or `48Gi`."""
    found = re.fullmatch(r"([\d.]+)([a-zA-Z]*)", str(quantity))
    return float(found[1]) * _UNITS.get(found[2], 1.0) if found else 0.0


def check_volumes(cluster: Cluster) -> Iterator[Finding]:
    """Check that volume claims are bound, and shared where there are several nodes."""
    for claim in cluster.mine("persistentvolumeclaims"):
        name = f"volume {claim['metadata']['name']}"
        modes = claim["spec"].get("accessModes", [])
        storage = claim["spec"].get("storageClassName", "the default class")
        phase = claim.get("status", {}).get("phase")
        said = f"{phase}, {', '.join(modes)} of {storage}"
        if phase != "Bound":
            mend = (
                f"kubectl -n {cluster.namespace} describe pvc "
                f"{claim['metadata']['name']}; is there a storage class (kubectl get "
                f"sc) that has these access modes?"
            )
            # A class may wait for the first pod that uses it.
            yield Finding(name, "FAIL" if phase == "Lost" else "WARN", said, mend)
        elif "ReadWriteMany" not in modes and len(cluster.items("/api/v1/nodes")) > 1:
            yield Finding(
                name,
                "WARN",
                f"{said}, in a cluster of several nodes: pods on others cannot start",
                "ask for ReadWriteMany and a class that has it (NFS, Filestore, EFS), "
                "or use a bucket",
            )
        else:
            yield Finding(name, "ok", said)
