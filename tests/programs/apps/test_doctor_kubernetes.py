"""medray doctor --kubernetes: each fault is reported, and what to type.

No API server can be had where these tests run. What answers here is an HTTP server with
the objects that kustomize builds of k8s/, given the states that a real one gave them;
the client that asks is the one of package `kubernetes`.
"""

import copy
import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifests import ROOT, Object, build, find, with_components

from medray.apps.doctor import kubernetes_objects
from medray.cli import main

MINE = "/namespaces/medray"
OPERATOR = "/apis/apps/v1/deployments"
CLUSTERS = f"/apis/ray.io/v1{MINE}/rayclusters"
JOBS = f"/apis/batch/v1{MINE}/jobs"
CRONJOBS = f"/apis/batch/v1{MINE}/cronjobs"
PODS, QUOTAS = f"/api/v1{MINE}/pods", f"/api/v1{MINE}/resourcequotas"
CLAIMS, SECRETS = f"/api/v1{MINE}/persistentvolumeclaims", f"/api/v1{MINE}/secrets"
NODES, EVENTS = "/api/v1/nodes", f"/api/v1{MINE}/events"
POLICIES = f"/apis/networking.k8s.io/v1{MINE}/networkpolicies"

# Answers by path: objects of a list, an object, or None where this user may not look.
World = dict[str, Any]


def head_pod(gpus: str = "4") -> Object:
    container = {"name": "ray-head", "image": "registry/medray:0.2.0-gpu"}
    labels = {"ray.io/cluster": "medray", "ray.io/node-type": "head"}
    labels["medray/gpus"] = gpus
    return {
        "metadata": {"name": "medray-head-x", "labels": labels},
        "spec": {"containers": [container]},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }


def node(name: str, gpus: int = 0, **labels: str) -> Object:
    allocatable = {"cpu": "16", "nvidia.com/gpu": f"{gpus}"} if gpus else {"cpu": "16"}
    return {
        "metadata": {"name": name, "labels": labels},
        "status": {"allocatable": allocatable},
    }


def job(name: str, kind: str, created: str = "2026-11-29T22:00:00Z") -> Object:
    states = {
        "runs": {"active": 1},
        "done": {"conditions": [{"type": "Complete", "status": "True"}]},
        "failed": {"conditions": [{"type": "Failed", "status": "True"}]},
    }
    template = {"metadata": {"labels": {"medray/submits": "true"}}}
    return {
        "metadata": {"name": name, "creationTimestamp": created},
        "spec": {"template": template},
        "status": states[kind],
    }


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> World:
    """What overlay gke-gpu, the operator and a cloud make of an empty cluster."""
    built = build(ROOT / "k8s" / "overlays" / "gke-gpu")
    cronjob = find(built, "CronJob")
    cronjob["status"] = {
        "lastScheduleTime": "2026-11-29T22:00:00Z",
        "lastSuccessfulTime": "2026-11-29T23:10:00Z",
    }
    quota = find(built, "ResourceQuota")
    used = dict.fromkeys(quota["spec"]["hard"], "0") | {"pods": "1"}
    quota["status"] = {"hard": quota["spec"]["hard"], "used": used}
    manager = {
        "image": "quay.io/kuberay/operator:v1.7.0",
        "command": ["/manager"],
        "args": ["--feature-gates=RayJobDeletionPolicy=true,RayCronJob=false"],
    }
    operator = {
        "metadata": {"name": "kuberay-operator", "namespace": "kuberay-system"},
        "spec": {"template": {"spec": {"containers": [manager]}}},
        "status": {"readyReplicas": 1},
    }
    kinds = [{"kind": k} for k in ("RayCluster", "RayJob", "RayService", "RayCronJob")]
    return {
        "/version": {"gitVersion": "v1.36.1"},
        "/apis/ray.io/v1": {"resources": kinds},
        OPERATOR: [operator],
        CLUSTERS: [find(built, "RayCluster")],
        f"/apis/ray.io/v1{MINE}/raycronjobs": [],
        SECRETS: [{"metadata": {"name": "medray"}, "data": {"auth_token": "Zm9v"}}],
        PODS: [head_pod()],
        NODES: [node("head"), node("worker")],
        QUOTAS: [quota],
        CLAIMS: [],
        JOBS: [job("nightly-1", "done")],
        CRONJOBS: [cronjob],
        POLICIES: [find(built, "NetworkPolicy", "jobs-to-head")],
        EVENTS: [],
    }


class Server:
    """Answers as an API server does, from a world that a test may change."""

    def __init__(self) -> None:
        self.world: World = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, found = outer.answer(self.path.partition("?")[0])
                data = json.dumps(found).encode()
                self.send_response(status)
                self.send_header("Content-Length", f"{len(data)}")
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    def answer(self, path: str) -> tuple[int, Object]:
        folder, _, name = path.rpartition("/")
        if path in self.world:
            found = self.world[path]
            if found is None:
                return 403, {"reason": "Forbidden"}
            return 200, {"items": found} if isinstance(found, list) else found
        if folder in self.world and self.world[folder] is None:
            return 403, {"reason": "Forbidden"}
        for one in self.world.get(folder, []):
            if one["metadata"]["name"] == name:
                return 200, one
        return 404, {"reason": "NotFound"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever)
    thread.start()
    host, port = server.http.server_address[:2]
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": f"http://{host!s}:{port}"}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
    }
    path = tmp_path_factory.mktemp("kube") / "config"
    path.write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        # Package `kubernetes` reads KUBECONFIG when it is imported.
        name = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
        patch.setattr(name, str(path))
        yield server
    server.http.shutdown()
    thread.join()
    server.http.server_close()


@pytest.fixture
def world(server: Server, healthy: World) -> World:
    server.world = copy.deepcopy(healthy)
    return server.world


def ask(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, str]]]:
    code = main(["doctor", "--kubernetes", "--json"])
    return code, json.loads(capsys.readouterr().out)["findings"]


def test_a_cluster_as_k8s_makes_it_is_fine(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    # The overlay's image is for whoever applies it to name.
    code, findings = ask(capsys)
    assert [one for one in findings if one["status"] != "ok"] == []
    assert code == 0
    said = " ".join(one["found"] for one in findings)
    for word in ("v1.36.1", "operator:v1.7.0", "RayJobDeletionPolicy", "23:10"):
        assert word in said


def _old(world: World) -> None:
    world["/version"] = {"gitVersion": "v1.28.9"}


def _no_kinds(world: World) -> None:
    del world["/apis/ray.io/v1"]


def _no_operator(world: World) -> None:
    world[OPERATOR] = []


def _manager(world: World) -> Object:
    found: Object = world[OPERATOR][0]["spec"]["template"]["spec"]["containers"][0]
    return found


def _old_operator(world: World) -> None:
    _manager(world)["image"] = "quay.io/kuberay/operator:v1.5.2"


def _dead_operator(world: World) -> None:
    world[OPERATOR][0]["status"] = {}


def _operator_elsewhere(world: World) -> None:
    world[OPERATOR][0]["metadata"]["namespace"] = "ray"


def _cronjob_without_gate(world: World) -> None:
    world[f"/apis/ray.io/v1{MINE}/raycronjobs"] = [{"metadata": {"name": "nightly"}}]


def _no_token(world: World) -> None:
    world[SECRETS] = []


def _no_cluster(world: World) -> None:
    world[CLUSTERS] = []


def _no_head(world: World) -> None:
    world[PODS] = []


def _other_label(world: World) -> None:
    world[PODS] = [head_pod("2")]


def _too_few_in_a_group(world: World) -> None:
    world[CLUSTERS][0]["spec"]["workerGroupSpecs"][1]["maxReplicas"] = 1


def _too_small_a_quota(world: World) -> None:
    world[QUOTAS][0]["spec"]["hard"]["requests.nvidia.com/gpu"] = "2"


def _no_plugin(world: World) -> None:
    accelerator = {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    world[NODES].append(node("gpu", **accelerator))


def _full_quota(world: World) -> None:
    world[QUOTAS][0]["status"]["used"]["requests.memory"] = "819200Mi"


def _claim(world: World, phase: str, mode: str) -> None:
    world[CLAIMS] = [
        {
            "metadata": {"name": "data"},
            "spec": {"accessModes": [mode], "storageClassName": "standard"},
            "status": {"phase": phase},
        }
    ]


def _unbound(world: World) -> None:
    _claim(world, "Pending", "ReadWriteMany")


def _one_node_only(world: World) -> None:
    _claim(world, "Bound", "ReadWriteOnce")


def _no_image(world: World) -> None:
    waiting = {"reason": "ImagePullBackOff", "message": "not found"}
    world[PODS][0]["status"]["containerStatuses"] = [
        {"image": "registry/medray:9", "state": {"waiting": waiting}}
    ]


def _unedited(world: World) -> None:
    image = "europe-west4-docker.pkg.dev/PROJECT/medray/medray:0.2.0-gpu"
    world[PODS][0]["spec"]["containers"][0]["image"] = image


def _out_of_memory(world: World) -> None:
    """As KubeRay words it; the pod itself is gone."""
    message = (
        "Deleted head Pod medray/medray-head-x; Pod status: Running; Pod restart "
        "policy: Never; Ray container terminated status: "
        "&ContainerStateTerminated{ExitCode:137,Signal:0,Reason:OOMKilled,Message:,}"
    )
    world[EVENTS] = [
        {"reason": "DeletedHeadPod", "message": message, "lastTimestamp": "yesterday"},
        {"reason": "Scheduled", "message": "OOMKilled is no reason of this one"},
    ]


def _pending(world: World) -> None:
    pod = head_pod()
    pod["metadata"] = {"name": "gpu-1", "labels": {"ray.io/node-type": "worker"}}
    message = "0/2 nodes are available: 2 Insufficient nvidia.com/gpu."
    pod["status"] = {
        "conditions": [
            {"type": "PodScheduled", "reason": "Unschedulable", "message": message}
        ]
    }
    world[PODS].append(pod)


def _two_nights(world: World) -> None:
    world[JOBS] = [job("nightly-2", "runs"), job("by-hand", "runs")]


def _suspended(world: World) -> None:
    world[CRONJOBS][0]["spec"]["suspend"] = True


def _failed_night(world: World) -> None:
    world[JOBS].append(job("nightly-2", "failed", "2026-11-30T22:00:00Z"))


FAULTS: list[tuple[Callable[[World], None], str, str, str]] = [
    (_old, "WARN", r"v1\.28\.9", r"1\.30"),
    (_no_kinds, "FAIL", "RayCluster, RayJob: not known", "step 2"),
    (_no_operator, "FAIL", "there is none", "step 2"),
    (_old_operator, "WARN", r"v1\.5\.2", r"1\.7"),
    (_dead_operator, "FAIL", "no replica is ready", "describe pods"),
    (_operator_elsewhere, "FAIL", "ray, which the network", r"network\.yaml"),
    (_cronjob_without_gate, "FAIL", "never run", "featureGates"),
    (_no_token, "FAIL", "is not there", r"authOptions\.mode"),
    (_no_cluster, "FAIL", "no RayCluster medray", "apply -k"),
    (_no_head, "FAIL", "not ready", "describe pods"),
    (_other_label, "WARN", "gpus=4, the head .* with 2", "delete pod"),
    (_too_few_in_a_group, "FAIL", "gpu-spot has 1", "values.yaml"),
    (_too_small_a_quota, "FAIL", "quota medray has 2", "values.yaml"),
    (_no_plugin, "FAIL", "gpu: a machine with GPUs", "device plugin"),
    (_full_quota, "WARN", "requests.memory 819200Mi of 800Gi", "limits.yaml"),
    (_unbound, "WARN", "Pending, ReadWriteMany of standard", "describe pvc data"),
    (_one_node_only, "WARN", "several nodes", "ReadWriteMany"),
    (_no_image, "FAIL", "ImagePullBackOff registry/medray:9", "imagePullSecrets"),
    (_unedited, "FAIL", "PROJECT", r"values\.yaml"),
    (_out_of_memory, "WARN", "its memory, yesterday", "requests and limits"),
    (_pending, "WARN", "Insufficient nvidia.com/gpu", "taints"),
    (_two_nights, "WARN", "nightly-2, by-hand at once", "by hand"),
    (_suspended, "WARN", "suspended", "patch cronjob"),
    (_failed_night, "FAIL", "nightly-2 failed", "logs job/nightly-2"),
]


@pytest.mark.parametrize(
    ("make", "status", "found", "mend"), FAULTS, ids=[one[0].__name__ for one in FAULTS]
)
def test_a_fault_is_told_with_what_to_do(
    make: Callable[[World], None],
    status: str,
    found: str,
    mend: str,
    world: World,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(world)
    code, findings = ask(capsys)
    bad = [one for one in findings if one["status"] != "ok"]
    assert len(bad) == 1, bad
    assert bad[0]["status"] == status
    assert re.search(found, bad[0]["found"]), bad
    assert re.search(mend, bad[0]["mend"]), bad
    assert code == int(status == "FAIL")


def test_an_operator_elsewhere_that_is_let_in_is_fine(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    _operator_elsewhere(world)
    text = json.dumps(world[POLICIES]).replace("kuberay-system", "ray")
    world[POLICIES] = json.loads(text)
    assert ask(capsys)[0] == 0


def test_what_may_not_be_seen_is_told_and_the_rest_is_looked_at(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a pod, whose account may see its cluster's pods and no more."""
    for path in (OPERATOR, SECRETS, NODES, QUOTAS, JOBS, CRONJOBS):
        world[path] = None
    code, findings = ask(capsys)
    assert code == 0
    told = [one for one in findings if one["found"] == "this user may not see it"]
    assert len(told) == 5
    assert all(one["status"] == "WARN" and "get --raw" in one["mend"] for one in told)
    assert {"head", "pods"} <= {
        one["name"] for one in findings if one["status"] == "ok"
    }


def test_a_cluster_that_does_not_answer_is_told(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    monkeypatch.setattr(name, str(tmp_path / "none"))
    code, (finding,) = ask(capsys)
    assert (code, finding["status"]) == (1, "FAIL")
    assert "kubectl get nodes" in finding["mend"]
    server.world = {}
    monkeypatch.undo()
    config = tmp_path / "config"
    config.write_text(
        yaml.safe_dump(
            {
                "current-context": "c",
                "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
                "clusters": [
                    {"name": "c", "cluster": {"server": "http://127.0.0.1:9"}}
                ],
                "users": [{"name": "u", "user": {}}],
            }
        )
    )
    monkeypatch.setattr(name, str(config))
    code, (finding,) = ask(capsys)
    assert (code, finding["status"]) == (1, "FAIL")
    assert "no answer" in finding["found"]


def test_the_namespace_goes_with_kubernetes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--namespace", "other"]) == 2
    assert "--kubernetes" in capsys.readouterr().err


def test_every_component_is_looked_at(tmp_path: Path) -> None:
    """Names that the doctor looks for are those of k8s/."""
    built = with_components("cpu-kind", ["cronjob", "raycronjob"], tmp_path)
    assert find(built, "RayCluster")["metadata"]["name"] == "medray"
    night = find(built, "CronJob")["spec"]["jobTemplate"]
    assert kubernetes_objects._is_night(night)
    policy = json.dumps(find(built, "NetworkPolicy", "jobs-to-head"))
    assert "kuberay-system" in policy
