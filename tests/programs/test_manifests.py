"""k8s/: every overlay builds, is valid, and agrees with the rest of the project."""

import ast
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
import ray
import yaml
from jsonschema import Draft202012Validator
from manifests import (
    OVERLAYS,
    ROOT,
    SCHEMALESS,
    Object,
    broken_rules,
    build,
    entrypoints,
    find,
    instructions,
    pods,
    read_schemas,
    with_components,
)

from medray.apps.doctor.kubernetes_capacity import read_quantity

KUBERNETES = "1.37"
# Seconds that a Pending pod may be there for nothing, and that one may be Pending at all.
SETTINGS = {
    "RAY_AUTOSCALER_PENDING_NODE_IDLE_TIMEOUT_S": 60,
    "RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S": 900,
}
EXTRAS = ["jobs", "raycronjob", "kueue", "monitoring", "serve"]
COUNTERS = {
    "ray_medray_slides_done_total",
    "ray_medray_slides_failed_total",
    "ray_medray_regions_done_total",
    "ray_medray_region_wait_seconds_total",
}


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def objects(overlay: str) -> list[Object]:
    return build(ROOT / "k8s" / "overlays" / overlay)


@pytest.fixture(scope="module")
def all_objects(overlay: str, tmp_path_factory: pytest.TempPathFactory) -> list[Object]:
    """The overlay with every optional component."""
    folder = tmp_path_factory.mktemp("all")
    return with_components(overlay, ["cronjob", *EXTRAS], folder)


@pytest.fixture(scope="session")
def schemas() -> dict[str, Object]:
    folder = ROOT.parent / "shared" / "kuberay-crds"
    if not folder.is_dir():
        pytest.skip("KubeRay's schemas are not beside this checkout (../shared)")
    return read_schemas(folder)


def faults(thing: Object, schemas: dict[str, Object]) -> list[str]:
    """What the API server would refuse of an object."""
    if thing["apiVersion"].startswith("ray.io"):
        found = Draft202012Validator(schemas[thing["kind"]]).iter_errors(thing)
        return [f"{error.json_path}: {error.message}" for error in found]
    try:
        kubernetes_validate.validate(thing, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{error}"]
    return []


def test_every_object_is_valid_and_has_no_unknown_field(
    all_objects: list[Object], schemas: dict[str, Object]
) -> None:
    known = [
        one
        for one in all_objects
        if not one["apiVersion"].split("/")[0].endswith(SCHEMALESS)
    ]
    found = {
        f"{one['kind']} {one['metadata']['name']}": faults(one, schemas)
        for one in known
    }
    assert {name: said for name, said in found.items() if said} == {}
    kinds = {one["kind"] for one in known}
    assert {"RayCluster", "RayJob", "RayCronJob", "RayService", "CronJob"} <= kinds
    rays = [one for one in known if one["apiVersion"].startswith("ray.io")]
    assert {one["metadata"]["name"]: broken_rules(one) for one in rays} == {
        one["metadata"]["name"]: [] for one in rays
    }


def _typo(cluster: Object) -> None:
    cluster["spec"]["workerGroupSpecs"][0]["minReplica"] = 0


def _deep(cluster: Object) -> None:
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]
    head["containers"][0]["ressources"] = {}


def _kind(cluster: Object) -> None:
    cluster["spec"]["enableInTreeAutoscaling"] = "yes"


@pytest.mark.parametrize("break_it", [_typo, _deep, _kind])
def test_a_wrong_field_would_be_found(
    break_it: Callable[[Object], None],
    objects: list[Object],
    schemas: dict[str, Object],
) -> None:
    cluster = json.loads(json.dumps(find(objects, "RayCluster")))
    assert faults(cluster, schemas) == []
    break_it(cluster)
    assert faults(cluster, schemas) != []


def test_the_operators_rules_would_find_what_it_refuses(objects: list[Object]) -> None:
    cluster = json.loads(json.dumps(find(objects, "RayCluster")))
    group = cluster["spec"]["workerGroupSpecs"][0]
    group["template"]["spec"]["restartPolicy"] = "Always"
    group["rayStartParams"]["labels"] = "a=b"
    cluster["metadata"]["name"] = "m" * 54
    assert len(broken_rules(cluster)) == 3


def test_everything_is_in_the_namespace(all_objects: list[Object]) -> None:
    everywhere = {"Namespace", "PriorityClass", "ResourceFlavor", "ClusterQueue"}
    for one in all_objects:
        if one["kind"] not in everywhere:
            assert one["metadata"]["namespace"] == "medray", one["metadata"]["name"]
    names = [(o["kind"], o["metadata"]["name"]) for o in all_objects]
    assert len(names) == len(set(names))


def test_names_that_objects_refer_to_exist(all_objects: list[Object]) -> None:
    def names(kind: str) -> set[str]:
        return {o["metadata"]["name"] for o in all_objects if o["kind"] == kind}

    cluster = find(all_objects, "RayCluster")
    for one in all_objects:
        for _, pod in pods(one):
            wanted = pod.get("serviceAccountName")
            assert wanted is None or wanted in names("ServiceAccount")
            wanted = pod.get("priorityClassName")
            assert wanted is None or wanted in names("PriorityClass")
            for volume in pod.get("volumes", []):
                if "configMap" in volume:
                    assert volume["configMap"]["name"] in names("ConfigMap")
                if "persistentVolumeClaim" in volume:
                    claim = volume["persistentVolumeClaim"]["claimName"]
                    assert claim in names("PersistentVolumeClaim")
            for source in pod["containers"][0].get("envFrom", []):
                assert source["configMapRef"]["name"] in names("ConfigMap")
        if one["kind"] in ("RayJob", "RayCronJob"):
            spec = one["spec"].get("jobTemplate", one["spec"])
            chosen = spec["clusterSelector"]["ray.io/cluster"]
            assert chosen == cluster["metadata"]["name"]
    night = find(all_objects, "CronJob")
    (_, pod), *_ = pods(night)
    environment = {one["name"]: one for one in pod["containers"][0]["env"]}
    address = environment["RAY_API_SERVER_ADDRESS"]["value"]
    # KubeRay's names: the head's service, and the Secret of a token that it made.
    assert address == f"http://{cluster['metadata']['name']}-head-svc:8265"
    secret = environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]
    assert secret == {"name": cluster["metadata"]["name"], "key": "auth_token"}
    setting = environment["STORAGE"]["valueFrom"]["configMapKeyRef"]
    assert setting["key"] in find(all_objects, "ConfigMap", "settings")["data"]
    queue = find(all_objects, "LocalQueue")
    labels = cluster["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == queue["metadata"]["name"]
    queues = find(all_objects, "ClusterQueue")
    assert queue["spec"]["clusterQueue"] == queues["metadata"]["name"]
    flavors = {f["name"] for f in queues["spec"]["resourceGroups"][0]["flavors"]}
    assert flavors <= names("ResourceFlavor")


def test_the_cluster_grows_from_nothing_and_its_head_does_no_work(
    overlay: str, objects: list[Object]
) -> None:
    spec = find(objects, "RayCluster")["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"]["mode"] == "token"
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {one["groupName"]: one for one in spec["workerGroupSpecs"]}
    asked = int(spec["headGroupSpec"]["labels"]["medray/gpus"])
    quota = find(objects, "ResourceQuota")["spec"]["hard"]
    assert int(quota["requests.nvidia.com/gpu"]) == asked
    with_gpu = {
        name: group
        for name, group in groups.items()
        if "nvidia.com/gpu"
        in group["template"]["spec"]["containers"][0]["resources"]["limits"]
    }
    if overlay == "cpu-kind":
        assert (with_gpu, asked) == ({}, 0)
        return
    assert all(one["minReplicas"] == one["replicas"] == 0 for one in groups.values())
    assert set(with_gpu) == {"gpu-spot", "gpu-on-demand"}
    spot, other = with_gpu["gpu-spot"], with_gpu["gpu-on-demand"]
    assert spot["priority"] > other["priority"]
    for group in (spot, other):
        assert group["maxReplicas"] == asked > 0
        assert group["idleTimeoutSeconds"] > 0
        pod = group["template"]["spec"]
        assert "nvidia.com/gpu" in [one["key"] for one in pod["tolerations"]]
        assert pod["nodeSelector"]
    # Nothing tells spot from on-demand but where their pods may go.
    assert (
        spot["template"]["spec"]["nodeSelector"]
        != other["template"]["spec"]["nodeSelector"]
        or "affinity" in (other["template"]["spec"])
    )


def test_workers_have_time_to_give_back_their_work(objects: list[Object]) -> None:
    """What the hook does is tested with real nodes in tests/kill/apps/test_leave.py."""
    for group in find(objects, "RayCluster")["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert hook[:3] == ["python", "-m", "medray.apps.leave"]
        assert float(hook[3]) < pod["terminationGracePeriodSeconds"]


def test_nothing_needs_a_shell(all_objects: list[Object]) -> None:
    """Commands are lists of words; of a job's entrypoint the head's shell only fills
    in $STORAGE.
    """
    for one in all_objects:
        for name, pod in pods(one):
            for container in pod["containers"]:
                hooks = [
                    hook["exec"] for hook in container.get("lifecycle", {}).values()
                ]
                for given in (container, *hooks):
                    words = [*given.get("command", []), *given.get("args", [])]
                    assert not {"sh", "bash", "-c"} & set(words), name
                    assert not re.search(r"[|&;<>`]", " ".join(words)), name
        if one["kind"] in ("RayJob", "RayCronJob"):
            line = one["spec"].get("jobTemplate", one["spec"])["entrypoint"]
            assert not re.search(r"[|&;<>`]|\$(?!STORAGE/)", line)


def test_pods_that_nothing_needs_are_withdrawn(all_objects: list[Object]) -> None:
    """Ray reads both settings in its autoscaler; what they do is tested in
    tests/kill/execution/test_scarce.py.
    """
    for kind in ("RayCluster", "RayService"):
        spec = find(all_objects, kind)["spec"]
        options = spec.get("rayClusterConfig", spec)["autoscalerOptions"]
        found = {one["name"]: int(one["value"]) for one in options["env"]}
        assert found == SETTINGS
    assert known_settings() >= set(SETTINGS)


def known_settings() -> set[str]:
    """The names of variables that Ray's autoscaler looks up."""
    folder = Path(ray.__file__).parent / "autoscaler"
    text = "".join(path.read_text() for path in folder.rglob("*.py"))
    return set(re.findall(r"\"(RAY_AUTOSCALER_\w+)\"", text))


def test_pods_keep_the_restricted_standard_and_say_what_they_take(
    all_objects: list[Object],
) -> None:
    """The namespace enforces it: a pod that does not would never start."""
    user = instructions("USER")[-1].value[0]
    seen = [found for one in all_objects for found in pods(one)]
    assert len(seen) >= 3
    for name, pod in seen:
        whole = pod["securityContext"]
        assert whole["runAsNonRoot"] is True, name
        assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
        assert f"{whole['runAsUser']}:{whole['runAsGroup']}" == user
        kinds = {key for v in pod.get("volumes", []) for key in v if key != "name"}
        assert kinds <= {"configMap", "persistentVolumeClaim"}
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["capabilities"] == {"drop": ["ALL"]}
            there = container["resources"]
            assert there["limits"]["memory"] == there["requests"]["memory"]
            assert "cpu" in there["requests"]
    scaler = find(all_objects, "RayCluster")["spec"]["autoscalerOptions"]
    assert scaler["securityContext"]["allowPrivilegeEscalation"] is False


def test_no_secret_is_written_down() -> None:
    for path in sorted((ROOT / "k8s").rglob("*.yaml")):
        for one in yaml.safe_load_all(path.read_text()):
            assert not isinstance(one, dict) or one.get("kind") != "Secret", path
    for path in sorted([*(ROOT / "k8s").rglob("*"), *(ROOT / "cluster").iterdir()]):
        if path.is_file():
            assert not re.search(
                r"\b[0-9a-f]{32,}\b|AKIA[0-9A-Z]{16}", path.read_text()
            )


def test_images_and_versions_agree(overlay: str, objects: list[Object]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split()
    )
    cluster = find(objects, "RayCluster")
    assert cluster["spec"]["rayVersion"] == pins["ray"]
    variant = "cpu" if overlay == "cpu-kind" else "gpu"
    images = {
        container["image"]
        for one in objects
        for _, pod in pods(one)
        for container in pod["containers"]
    }
    assert len(images) == 1
    name, tag = images.pop().rsplit(":", 1)
    assert name.rsplit("/", 1)[-1] == project["name"]
    assert tag == f"{project['version']}-{variant}"
    args = [one.value[0] for one in instructions("ARG")]
    assert "VARIANT=cpu" in args


def test_commands_are_those_of_the_jobs(
    all_objects: list[Object], tmp_path: Path
) -> None:
    from medray.apps import parse
    from medray.training.recipe import read_recipe

    found = list(entrypoints(all_objects))
    where = {one.where for one in found}
    assert {"CronJob nightly", "RayCronJob nightly", "RayJob train"} <= where
    for one in found:
        path = ROOT / one.file
        if one.file == "jobs/nightly.py" and not path.exists():
            assert set(one.arguments[::2]) == {"--inbox", "--model", "--out"}
            continue
        assert path.is_file(), one.where
        command = _command_of(path)
        # Exits if there is no such command or option, or one is missing.
        given = parse([command, *one.arguments]).given
        places = [given["out"], *one.arguments]
        for place in places:
            if "/" in place:
                assert place.startswith(("$STORAGE/", "$(STORAGE)/")), one.where
        if command == "train":
            read_recipe(
                given["recipe"], given.get("overrides", ())
            )  # of the image, by name
    # Masks of the slides that could be done are a success.
    lenient = {one.where for one in found if "--partial-ok" in one.arguments}
    assert lenient == {"RayJob infer"}


def _command_of(path: Path) -> str:
    """The command in a job's `script(["COMMAND", *sys.argv[1:]])`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "script":
            (given,) = node.args
            assert isinstance(given, ast.List)
            first = given.elts[0]
            assert isinstance(first, ast.Constant)
            return str(first.value)
    raise AssertionError(f"{path} calls no command")


def test_failed_slides_restart_nothing(all_objects: list[Object]) -> None:
    for one in all_objects:
        if one["kind"] in ("RayJob", "RayCronJob"):
            spec = one["spec"].get("jobTemplate", one["spec"])
            assert spec["backoffLimit"] == 0
            assert spec["submissionMode"] == "HTTPMode"  # no submitter that retries
    night = find(all_objects, "CronJob")["spec"]
    assert night["concurrencyPolicy"] == "Forbid"
    job = night["jobTemplate"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    # Only a pod that was lost is replaced.
    ignored, failed = job["podFailurePolicy"]["rules"]
    assert ignored["onPodConditions"][0]["type"] == "DisruptionTarget"
    (container,) = job["template"]["spec"]["containers"]
    assert failed["onExitCodes"]["containerName"] == container["name"]
    assert failed["onExitCodes"]["operator"] == "NotIn"
    assert failed["onExitCodes"]["values"] == [137, 143]


def test_only_who_is_named_reaches_the_cluster(all_objects: list[Object]) -> None:
    policies = [o["spec"] for o in all_objects if o["kind"] == "NetworkPolicy"]
    deny = find(all_objects, "NetworkPolicy", "default-deny")["spec"]
    assert deny["podSelector"] == {}
    assert "ingress" not in deny
    assert set(deny["policyTypes"]) == {"Ingress", "Egress"}
    for policy in policies:
        for rule in policy.get("ingress", []):
            assert rule.get("from"), "an empty `from` lets everybody in"
    night = find(all_objects, "CronJob")["spec"]["jobTemplate"]["spec"]["template"]
    allowed = find(all_objects, "NetworkPolicy", "jobs-to-head")["spec"]["ingress"][0]
    chosen = allowed["from"][0]["podSelector"]["matchLabels"]
    assert chosen.items() <= night["metadata"]["labels"].items()
    monitor = find(all_objects, "PodMonitor", "medray")["spec"]
    cluster = find(all_objects, "RayCluster")
    name = cluster["metadata"]["name"]
    assert monitor["selector"]["matchLabels"] == {"ray.io/cluster": name}
    ports = {
        port["name"]: port["containerPort"]
        for _, pod in pods(cluster)
        for port in pod["containers"][0]["ports"]
    }
    scraped = {ports[one["port"]] for one in monitor["podMetricsEndpoints"]}
    open_to = find(all_objects, "NetworkPolicy", "prometheus")["spec"]["ingress"][0]
    assert scraped == {one["port"] for one in open_to["ports"]}


def test_the_dashboard_asks_for_metrics_that_exist(all_objects: list[Object]) -> None:
    from ray.autoscaler._private.prom_metrics import AutoscalerPrometheusMetrics

    text = find(all_objects, "ConfigMap", "medray-dashboard")["data"]["medray.json"]
    dashboard = json.loads(text)
    asked = {
        name
        for panel in dashboard["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\b(?:ray|autoscaler)_\w+", target["expr"])
    }
    # A label that the PodMonitor takes from the pods.
    monitor = find(all_objects, "PodMonitor", "medray")["spec"]
    assert monitor["podTargetLabels"] == ["ray.io/group"]
    asked.remove("ray_io_group")
    own = {one for one in asked if one.startswith("ray_medray_")}
    assert own == COUNTERS | {"ray_medray_regions_waiting"}
    sources = "".join(path.read_text() for path in (ROOT / "medray").glob("*.py"))
    named = set(re.findall(r'"(medray_\w+)"', sources))
    if "medray_slides_done_total" in named:  # they come with the nightly run
        # Ray puts its prefix before a counter's name, and the ending where it lacks.
        exported = {f"ray_{name.removesuffix('_total')}_total" for name in named}
        assert exported >= COUNTERS
        assert "medray_regions_waiting" in named
        rules = json.dumps(find(all_objects, "PrometheusRule")["spec"])
        alarmed = set(re.findall(r"ray_(?:medray|node)_\w+", rules))
        assert alarmed <= asked | exported
    autoscaler = {
        sample.name
        for metric in AutoscalerPrometheusMetrics(session_name="x").registry.collect()
        for sample in metric.samples
    } | {
        f"{metric.name}{'_total' * (metric.type == 'counter')}"
        for metric in AutoscalerPrometheusMetrics(session_name="x").registry.collect()
    }
    assert {one for one in asked if one.startswith("autoscaler_")} <= autoscaler
    # Ray's own panels name what its nodes export.
    panels = Path(ray.__file__).parent / "dashboard/modules/metrics/dashboards"
    known = "".join(path.read_text() for path in panels.glob("*.py"))
    for name in asked - own - autoscaler:
        assert re.search(rf"\b{name}\b", known), name
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(
        dashboard["panels"]
    )


def test_the_service_is_the_clusters_twin(
    overlay: str, all_objects: list[Object]
) -> None:
    """Same image, version and care; its own token and label, and a way for requests."""
    service, cluster = find(all_objects, "RayService"), find(all_objects, "RayCluster")
    spec = service["spec"]["rayClusterConfig"]
    for key in ("rayVersion", "authOptions", "enableInTreeAutoscaling"):
        assert spec[key] == cluster["spec"][key]
    images = {
        one["containers"][0]["image"] for o in (service, cluster) for _, one in pods(o)
    }
    assert len(images) == 1
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    port = config["http_options"]["port"]
    (app,) = config["applications"]
    (group,) = spec["workerGroupSpecs"]
    assert group["maxReplicas"] == app["args"]["max_replicas"]
    open_to = find(all_objects, "NetworkPolicy", "serve")["spec"]
    chosen = open_to["podSelector"]["matchLabels"]
    assert {"port": port, "protocol": "TCP"} in open_to["ingress"][1]["ports"]
    monitor = find(all_objects, "PodMonitor", "medray-serve")["spec"]["selector"]
    assert monitor["matchLabels"] == chosen
    for template in (spec["headGroupSpec"]["template"], group["template"]):
        assert chosen.items() <= template["metadata"]["labels"].items()
        pod = template["spec"]
        container = pod["containers"][0]
        (secret,) = container["env"]
        assert secret["name"] == "MEDRAY_SERVE_TOKEN"
        assert secret["valueFrom"]["secretKeyRef"]["name"] == "medray-serve"
        assert port in [one["containerPort"] for one in container["ports"]]
        # Where there is no bucket the model lies on the volume.
        assert ("volumeMounts" in container) == (overlay == "cpu-kind")
    cores = int(
        group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    )
    assert app["args"]["cpus"] < cores
    grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > app["args"]["timeout_s"] + 5


def test_overlays_have_few_values_to_change(overlay: str) -> None:
    values = yaml.safe_load(
        (ROOT / "k8s" / "overlays" / overlay / "values.yaml").read_text()
    )["data"]
    expected = {"image", "storage"}
    if overlay != "cpu-kind":
        expected |= {"identity", "gpus"}
    assert set(values) == expected
    built = build(ROOT / "k8s" / "overlays" / overlay)
    said = json.dumps(built)
    assert all(value in said for value in values.values())
    assert all(one["metadata"]["name"] != "values" for one in built)


def test_a_laptop_has_room_for_what_is_said() -> None:
    """All pods of a night on kind, against the sum in docs/kubernetes.md."""
    objects = build(ROOT / "k8s" / "overlays" / "cpu-kind")
    cluster, night = find(objects, "RayCluster"), find(objects, "CronJob")
    asked = [
        pod["containers"][0]["resources"]["requests"]
        for one in (cluster, night)
        for _, pod in pods(one)
    ] + [cluster["spec"]["autoscalerOptions"]["resources"]["requests"]]
    cpus = sum(read_quantity(one["cpu"]) for one in asked)
    memory = sum(read_quantity(one["memory"]) for one in asked) / 2**30
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    assert f"ask for {cpus:.1f} CPUs and\n{memory:.1f} GiB" in text


def test_the_costs_follow_from_windows_and_prices() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    rows = re.findall(
        r"^\| [\w ]+ \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.M
    )
    assert len(rows) == 3
    for speed, price, *costs in rows:
        for windows, cost in zip((25, 12_000), costs, strict=True):
            expected = 1000 * windows / (int(speed) * 3600) * float(price)
            assert float(cost) == pytest.approx(expected, abs=0.006)
