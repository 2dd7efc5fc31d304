"""Checks of medray's objects in a Kubernetes cluster: Secret, head, pods, nights."""

from __future__ import annotations

import re
from collections.abc import Iterator

from medray.apps.doctor.findings import Finding
from medray.apps.doctor.kubernetes_api import Cluster, Object
from medray.execution import cluster as ray_cluster

_HEAD = "ray.io/cluster=medray,ray.io/node-type=head"  # not that of medray-serve
_PLACEHOLDERS = re.compile(r"\b(PROJECT|ACCOUNT|BUCKET)\b")


def check_token(cluster: Cluster) -> Iterator[Finding]:
    """Check that the Secret with the head's token exists."""
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


def check_head(cluster: Cluster) -> Iterator[Finding]:
    """Check that the head's pod is ready, with the labels that its RayCluster says."""
    spec = cluster.ray_cluster()
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
    wanted = (
        spec["spec"]["headGroupSpec"].get("labels", {}).get(ray_cluster.GPUS_LABEL, "0")
    )
    for pod in pods:
        # KubeRay gives a group's labels to its pods too.
        running = pod["metadata"]["labels"].get(ray_cluster.GPUS_LABEL, wanted)
        if running != wanted:
            yield Finding(
                "head's label",
                "WARN",
                f"the RayCluster says {ray_cluster.GPUS_LABEL}={wanted}, the head that "
                f"runs was started with {running} and asks for no more",
                "when no job runs: "
                f"kubectl -n {cluster.namespace} delete pod -l {_HEAD}",
            )


def _is_ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def check_pods(cluster: Cluster) -> Iterator[Finding]:
    """Check for pods that wait for an image or a machine, or that were ended."""
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
        # KubeRay deletes a pod whose Ray has ended; only the event says how.
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


def check_nights(cluster: Cluster) -> Iterator[Finding]:
    """Check the CronJobs and Jobs that submit nights."""
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
