"""Whether a Kubernetes cluster can run medray's nights; `medray doctor --kubernetes`.

Everything is only looked at, with the rights of whoever asks: kubectl's context or, in
a pod, its service account. What may not be looked at is told, and is no failure.

Objects are the API server's JSON: https://kubernetes.io/docs/reference/kubernetes-api/.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from medray.apps.doctor.doctor import Finding
from medray.errors import ConfigError
from medray.execution.cluster import GPUS_LABEL

Object = dict[str, Any]

_ANSWER_S = 10.0
_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_GPU = "nvidia.com/gpu"
# The oldest that k8s/ is written for.
_KUBERNETES, _KUBERAY = (1, 30), (1, 7)
# Labels by which clouds and NVIDIA's operator mark machines with GPUs.
_GPU_MACHINES = (
    "cloud.google.com/gke-accelerator",
    "k8s.amazonaws.com/accelerator",
    "nvidia.com/gpu.present",
    "feature.node.kubernetes.io/pci-10de.present",
)
_HEAD = "ray.io/cluster=medray,ray.io/node-type=head"  # not that of medray-serve
_PLACEHOLDERS = re.compile(r"\b(PROJECT|ACCOUNT|BUCKET)\b")


class ForbiddenError(Exception):
    """This user may not look at something."""


class Cluster:
    """The API server of a cluster, asked for JSON."""

    def __init__(self, api: Any, namespace: str) -> None:
        """Take a client of package `kubernetes`, and where medray is."""
        self._api, self.namespace = api, namespace

    def get(self, path: str) -> Object | None:
        """Return what is at a path; None: nothing.

        Raises:
            ForbiddenError: This user may not see it.
            OSError: The server does not answer, or not with that.
        """
        try:
            text = self._api.call_api(
                path,
                "GET",
                header_params={"Accept": "application/json"},
                auth_settings=["BearerToken"],
                _preload_content=False,
                _return_http_data_only=True,
                _request_timeout=_ANSWER_S,
            ).data
        except Exception as error:  # of urllib3, which has many, and ApiException
            status = getattr(error, "status", None)
            if status == 404:
                return None
            if status in (401, 403):
                raise ForbiddenError(path) from error
            raise OSError(f"{path}: {error}") from error
        found: Object = json.loads(text)
        return found

    def items(self, path: str) -> list[Object]:
        """Return the objects of a list; none where there is no such kind."""
        found: list[Object] = (self.get(path) or {}).get("items", [])
        return found

    def mine(self, kind: str, group: str = "api/v1") -> list[Object]:
        """Return medray's objects of a kind, such as `pods`."""
        return self.items(f"/{group}/namespaces/{self.namespace}/{kind}")


def check_kubernetes(namespace: str | None = None) -> list[Finding]:
    """Look at all that a night needs of a cluster.

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
    """Make all checks."""
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
    if _version(said) < _KUBERNETES:
        wanted = ".".join(map(str, _KUBERNETES))
        mend = f"k8s/ is for Kubernetes {wanted} or newer"
        yield Finding("Kubernetes", "WARN", said, mend)
    else:
        yield Finding("Kubernetes", "ok", said)


def _version(text: str) -> tuple[int, ...]:
    found = re.search(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


# --- KubeRay --------------------------------------------------------------------------


def _check_kinds(cluster: Cluster) -> Iterator[Finding]:
    """Look for the kinds of objects that KubeRay brings (its CRDs)."""
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


def _check_operator(cluster: Cluster) -> Iterator[Finding]:
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
    elif "@" not in image and _version(image.rpartition(":")[2]) < _KUBERAY:
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


# --- medray's own objects -------------------------------------------------------------


def _check_token(cluster: Cluster) -> Iterator[Finding]:
    where = f"Secret medray in {cluster.namespace}"
    secret = cluster.get(f"/api/v1/namespaces/{cluster.namespace}/secrets/medray")
    if secret and secret.get("data", {}).get("auth_token"):
        yield Finding("token", "ok", f"{where} has it")
    else:
        yield Finding(
            "token",
            "FAIL",
            f"{where}: {'no key auth_token' if secret else 'is not there'}",
            "KubeRay makes it for a RayCluster whose authOptions.mode is token; see "
            "kubectl -n kuberay-system logs deploy/kuberay-operator",
        )


def _ray_cluster(cluster: Cluster) -> Object | None:
    where = f"/apis/ray.io/v1/namespaces/{cluster.namespace}/rayclusters/medray"
    return cluster.get(where)


def _check_head(cluster: Cluster) -> Iterator[Finding]:
    spec = _ray_cluster(cluster)
    if spec is None:
        mend = "kubectl apply -k k8s/overlays/..."
        said = f"no RayCluster medray in {cluster.namespace}"
        yield Finding("head", "FAIL", said, mend)
        return
    pods = [
        pod
        for pod in cluster.mine("pods")
        if pod["metadata"].get("labels", {}).get("ray.io/cluster") == "medray"
        and pod["metadata"]["labels"].get("ray.io/node-type") == "head"
    ]
    if not any(_is_ready(pod) for pod in pods):
        mend = f"kubectl -n {cluster.namespace} describe pods -l {_HEAD}"
        yield Finding("head", "FAIL", "its pod is not ready", mend)
        return
    yield Finding("head", "ok", "its pod is ready")
    wanted = spec["spec"]["headGroupSpec"].get("labels", {}).get(GPUS_LABEL, "0")
    for pod in pods:
        # KubeRay gives a group's labels to its pods too.
        running = pod["metadata"]["labels"].get(GPUS_LABEL, wanted)
        if running != wanted:
            yield Finding(
                "head's label",
                "WARN",
                f"the RayCluster says {GPUS_LABEL}={wanted}, the head that runs was "
                f"started with {running} and asks for no more",
                "when no job runs: "
                f"kubectl -n {cluster.namespace} delete pod -l {_HEAD}",
            )


def _is_ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def _check_gpus(cluster: Cluster) -> Iterator[Finding]:
    """Compare how many GPUs medray may ask for with groups, quota and machines."""
    spec = _ray_cluster(cluster)
    if spec is None:
        return
    asked = int(spec["spec"]["headGroupSpec"].get("labels", {}).get(GPUS_LABEL, "0"))
    groups = [g for g in spec["spec"].get("workerGroupSpecs", []) if _gpus_of(g)]
    if not groups:
        yield Finding("GPUs", "ok", "none are asked for; workers predict on CPUs")
        return
    said = f"{asked} at most, in {', '.join(g['groupName'] for g in groups)}"
    quotas = cluster.mine("resourcequotas")
    most = {g["groupName"]: g["maxReplicas"] * _gpus_of(g) for g in groups} | {
        f"quota {quota['metadata']['name']}": int(_number(hard[f"requests.{_GPU}"]))
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


def _check_quota(cluster: Cluster) -> Iterator[Finding]:
    for quota in cluster.mine("resourcequotas"):
        hard = quota.get("status", {}).get("hard", {})
        used = quota.get("status", {}).get("used", {})
        full = [
            f"{name} {used[name]} of {most}"
            for name, most in sorted(hard.items())
            if _number(most) > 0 and _number(used.get(name, "0")) >= _number(most)
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


def _number(quantity: str) -> float:
    """Read a Kubernetes quantity such as `200m` or `48Gi`."""
    found = re.fullmatch(r"([\d.]+)([a-zA-Z]*)", str(quantity))
    return float(found[1]) * _UNITS.get(found[2], 1.0) if found else 0.0


def _check_volumes(cluster: Cluster) -> Iterator[Finding]:
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


def _check_pods(cluster: Cluster) -> Iterator[Finding]:
    """Look for pods that wait: for an image, for a machine, or that were ended."""
    pods = cluster.mine("pods")
    fine = True
    for pod in pods:
        name = f"pod {pod['metadata']['name']}"
        status = pod.get("status", {})
        images = [c["image"] for c in pod["spec"]["containers"]]
        if any(_PLACEHOLDERS.search(image) for image in images):
            fine = False
            mend = "write your image into values.yaml of the overlay, and apply"
            yield Finding(name, "FAIL", f"its image is {images[0]}", mend)
            continue
        states = status.get("containerStatuses", [])
        for container in (*states, *status.get("initContainerStatuses", [])):
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason") in _NO_IMAGE:
                fine = False
                yield Finding(
                    name,
                    "FAIL",
                    f"{waiting['reason']} {container.get('image', '')}: "
                    f"{waiting.get('message', '')}"[:300],
                    "push the image, mend its name in values.yaml, or let the nodes "
                    "read that registry (imagePullSecrets of the service accounts)",
                )
        for condition in status.get("conditions", []):
            if condition.get("reason") == "Unschedulable":
                fine = False
                yield Finding(
                    name,
                    "WARN",
                    f"Pending: {condition.get('message', '')}"[:300],
                    "a machine may be coming (some minutes); else compare what it "
                    "asks for with what nodes have, their taints and labels",
                )
    for event in cluster.mine("events"):
        # KubeRay deletes a pod whose Ray has ended; only the event tells how.
        if (
            event.get("reason") == "DeletedHeadPod"
            and _OUT_OF_MEMORY in event["message"]
        ):
            fine = False
            yield Finding(
                "head",
                "WARN",
                f"was ended for its memory, {event.get('lastTimestamp', '')}",
                "give it more in k8s/base/raycluster.yaml, requests and limits alike",
            )
    if fine:
        yield Finding("pods", "ok", f"{len(pods)} in {cluster.namespace}, none waits")


_OUT_OF_MEMORY = "OOMKilled"
_NO_IMAGE = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
)


def _check_nights(cluster: Cluster) -> Iterator[Finding]:
    jobs = cluster.mine("jobs", "apis/batch/v1")
    nights = [job for job in jobs if _is_night(job)]
    running = [
        j["metadata"]["name"] for j in nights if j.get("status", {}).get("active")
    ]
    if len(running) > 1:
        yield Finding(
            "nights",
            "WARN",
            f"{', '.join(running)} at once; the second ends at the lock in --out",
            "concurrencyPolicy Forbid does not cover a Job made by hand: delete one",
        )
    for night in cluster.mine("cronjobs", "apis/batch/v1"):
        name = f"CronJob {night['metadata']['name']}"
        status = night.get("status", {})
        said = (
            f"{night['spec']['schedule']} {night['spec'].get('timeZone', '')}, last "
            f"started {status.get('lastScheduleTime', 'never')}, last succeeded "
            f"{status.get('lastSuccessfulTime', 'never')}"
        )
        failed = [
            job["metadata"]["name"]
            for job in nights
            if any(
                c["type"] == "Failed" and c["status"] == "True"
                for c in job.get("status", {}).get("conditions", [])
            )
            and job["metadata"]["creationTimestamp"]
            > status.get("lastSuccessfulTime", "")
        ]
        if night["spec"].get("suspend"):
            mend = 'kubectl patch cronjob nightly -p \'{"spec":{"suspend":false}}\''
            yield Finding(name, "WARN", f"suspended; {said}", mend)
        elif failed:
            mend = f"kubectl -n {cluster.namespace} logs job/{failed[-1]}"
            yield Finding(name, "FAIL", f"{failed[-1]} failed; {said}", mend)
        else:
            yield Finding(name, "ok", said)


def _is_night(job: Object) -> bool:
    template = job["spec"]["template"]["metadata"].get("labels", {})
    return bool(template.get("medray/submits") == "true")


_CHECKS: dict[str, Callable[[Cluster], Iterator[Finding]]] = {
    "KubeRay's kinds": _check_kinds,
    "KubeRay's operator": _check_operator,
    "token": _check_token,
    "head": _check_head,
    "GPUs": _check_gpus,
    "quota": _check_quota,
    "volumes": _check_volumes,
    "pods": _check_pods,
    "nights": _check_nights,
}
