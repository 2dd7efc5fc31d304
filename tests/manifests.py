"""What k8s/ and cluster/ say, as objects, and the rules they have to keep."""

import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

Object = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
OVERLAYS = sorted(path.name for path in (ROOT / "k8s" / "overlays").iterdir())
# Whose schemas are looked up elsewhere: Kueue's and the Prometheus operator's are not
# at hand, their objects are only checked against each other.
SCHEMALESS = ("kueue.x-k8s.io", "monitoring.coreos.com")


def build(folder: Path) -> list[Object]:
    """What `kubectl kustomize` makes of a folder."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not on this machine")
    done = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def with_components(overlay: str, components: list[str], folder: Path) -> list[Object]:
    """An overlay of a copy of k8s/ with other components than its own."""
    shutil.copytree(ROOT / "k8s", folder / "k8s")
    path = folder / "k8s" / "overlays" / overlay
    asked = yaml.safe_load((path / "kustomization.yaml").read_text())
    own = [name for name in asked["components"] if name.rsplit("/", 1)[1] in BUILDING]
    others = [f"../../components/{name}" for name in components]
    asked["components"] = others + own
    (path / "kustomization.yaml").write_text(yaml.safe_dump(asked))
    return build(path)


BUILDING = ("gpu", "volume", "values")  # components that are part of an overlay


def find(objects: list[Object], kind: str, name: str = "") -> Object:
    """The only object of a kind (and name)."""
    found = [
        one
        for one in objects
        if one["kind"] == kind and name in ("", one["metadata"]["name"])
    ]
    assert len(found) == 1, f"{kind} {name}: {len(found)}"
    return found[0]


def read_schemas(folder: Path) -> dict[str, Object]:
    """The schemas of custom resources by kind, closed to what they do not name."""
    schemas = {}
    for kind in ("RayCluster", "RayJob", "RayCronJob", "RayService"):
        text = (folder / f"ray.io_{kind.lower()}s.yaml").read_text()
        crd = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        versions = {one["name"]: one["schema"] for one in crd["spec"]["versions"]}
        schema = versions["v1"]["openAPIV3Schema"]
        # Of metadata a CRD says nothing: it is that of every object.
        schema["properties"]["metadata"] = {"type": "object"}
        schemas[kind] = _closed(schema)
    return schemas


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    if (
        isinstance(schema.get("properties"), dict)
        and "additionalProperties" not in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        closed["additionalProperties"] = False
    return closed


def broken_rules(thing: Object) -> list[str]:
    """What KubeRay's operator 1.7 would refuse though the schema takes it.

    After the checks that its validation.go makes before it acts on an object.
    """
    kind, name, spec = thing["kind"], thing["metadata"]["name"], thing["spec"]
    longest = {"RayCluster": 53, "RayJob": 47, "RayCronJob": 36, "RayService": 47}[kind]
    broken = []
    if len(name) > longest or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        broken.append(f"name {name}")
    if kind == "RayCluster":
        return broken + _broken_cluster(spec)
    if kind == "RayService":
        return broken + _broken_cluster(spec["rayClusterConfig"])
    if kind == "RayCronJob":
        if "TZ" in spec["schedule"] or len(spec["schedule"].split()) != 5:
            broken.append(f"schedule {spec['schedule']}")
        spec = spec["jobTemplate"]
    return broken + _broken_job(spec)


def _broken_cluster(spec: Object) -> list[str]:
    broken = []
    scaled = spec.get("enableInTreeAutoscaling", False)
    newer = scaled and spec.get("autoscalerOptions", {}).get("version") == "v2"
    head = spec["headGroupSpec"]
    for group in (head, *spec["workerGroupSpecs"]):
        name = group.get("groupName", "head")
        started = group.get("rayStartParams", {})
        said = {"num-cpus", "num-gpus", "memory", "resources"} & set(started)
        if said and group.get("resources"):
            broken.append(f"{name}: resources twice")
        if "labels" in started:
            broken.append(f"{name}: labels in rayStartParams")
        if newer and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            broken.append(f"{name}: restartPolicy")
        if not newer and ("idleTimeoutSeconds" in group or "priority" in group):
            broken.append(f"{name}: idleTimeoutSeconds, priority without v2")
        if group is not head and group["minReplicas"] > group["maxReplicas"]:
            broken.append(f"{name}: minReplicas")
        if scaled and group.get("suspend"):
            broken.append(f"{name}: suspend")
    variables = head["template"]["spec"]["containers"][0].get("env", [])
    if "RAY_enable_autoscaler_v2" in {one["name"] for one in variables}:
        broken.append("autoscaler's version twice")
    if spec.get("authOptions", {}).get("mode") == "token" and not spec["rayVersion"]:
        broken.append("token without rayVersion")
    if "tlsOptions" in spec or "networkPolicy" in spec:
        broken.append("needs a feature gate that is off by default")
    return broken


def _broken_job(spec: Object) -> list[str]:
    broken = []
    chosen = spec.get("clusterSelector", {}).get("ray.io/cluster")
    if bool(chosen) == ("rayClusterSpec" in spec):
        broken.append("one of clusterSelector and rayClusterSpec")
    if chosen and (spec.get("backoffLimit") or spec.get("suspend")):
        broken.append("backoffLimit or suspend with clusterSelector")
    if chosen and spec.get("submissionMode") == "SidecarMode":
        broken.append("SidecarMode with clusterSelector")
    if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
        broken.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    for rule in spec.get("deletionStrategy", {}).get("deletionRules", []):
        if chosen and rule["policy"] in ("DeleteCluster", "DeleteWorkers"):
            broken.append(f"{rule['policy']} with clusterSelector")
        if len({"jobStatus", "jobDeploymentStatus"} & set(rule["condition"])) != 1:
            broken.append("condition of a deletion rule")
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        broken.append("activeDeadlineSeconds")
    return broken


@dataclass(frozen=True)
class Entrypoint:
    """A job's command: `python FILE ARGUMENTS`."""

    where: str
    file: str
    arguments: list[str]


def entrypoints(objects: list[Object]) -> Iterator[Entrypoint]:
    """The commands of all jobs."""
    for one in objects:
        kind, spec = one["kind"], one.get("spec", {})
        if kind == "CronJob":
            pod = spec["jobTemplate"]["spec"]["template"]["spec"]
            given = pod["containers"][0]["args"]
            words = given[given.index("--") + 1 :]
        elif kind in ("RayJob", "RayCronJob"):
            words = shlex.split(spec.get("jobTemplate", spec)["entrypoint"])
        else:
            continue
        assert words[0] == "python"
        where = f"{kind} {one['metadata']['name']}"
        yield Entrypoint(where, words[1], words[2:])


def submitted(job: str, folder: Path) -> str:
    """The entrypoint of a `RayJob NAME` or `RayCronJob NAME`, as the head gets it."""
    built = with_components("gke-gpu", ["jobs", "raycronjob"], folder)
    spec = find(built, *job.split())["spec"]
    entrypoint: str = spec.get("jobTemplate", spec)["entrypoint"]
    return entrypoint


def pods(thing: Object) -> Iterator[tuple[str, Object]]:
    """The pod specs of an object, with a name for each."""
    spec = thing.get("spec", {})
    if thing["kind"] in ("RayCluster", "RayService"):
        spec = spec.get("rayClusterConfig", spec)
        yield "head", spec["headGroupSpec"]["template"]["spec"]
        for group in spec["workerGroupSpecs"]:
            yield group["groupName"], group["template"]["spec"]
    elif thing["kind"] == "CronJob":
        yield "cronjob", spec["jobTemplate"]["spec"]["template"]["spec"]


def instructions(kind: str = "") -> list[Any]:
    """The instructions of cluster/Dockerfile (of a kind), by BuildKit's own parser."""
    import dockerfile

    found = dockerfile.parse_file(str(ROOT / "cluster" / "Dockerfile"))
    return [one for one in found if kind in ("", one.cmd.upper())]
