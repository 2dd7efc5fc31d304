"""GPU nodes that come with the work and go after it, and what preemption costs.

The autoscaler is Ray's own (v2). What it may start are the worker groups of
k8s/overlays/gke-gpu: kustomize builds them, and Ray's own translation for KubeRay makes
them into the autoscaler's configuration. Only the provider is another: nodes are
raylets on this machine, with this machine's cores, and GPUs that are only said to be
there, so GPU workers predict on CPUs; and idle nodes go after seconds instead of
minutes.

    python -m benchmarks.scaling.autoscale picture --out OUT  # 0 -> N -> 0, a timeline
    python -m benchmarks.scaling.autoscale curve --out OUT  # cost by preempted nodes

A preempted node is killed (SIGKILL, without notice), which is the worst that a cloud
does; the masks of every run have to be those of the first, byte for byte.
"""

import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks import harness
from benchmarks.harness import ROOT
from medray.geometry import plan_regions

OVERLAY = ROOT / "k8s" / "overlays" / "gke-gpu"
HEAD = "ray.head.default"  # as the provider of fake nodes calls its type
HEAD_ID = "head"
PORT, AGENT_PORT = 6393, 52410
SIZE, REGION = (1500, 2000), 512  # of slides and of regions, pixels


# --- the cluster ----------------------------------------------------------------------


def ray_cluster(gpus: int, folder: Path) -> dict[str, Any]:
    """The overlay's RayCluster with its value `gpus`, as kustomize builds it."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise FileNotFoundError("kubectl: not on this machine; it builds the overlay")
    shutil.copytree(ROOT / "k8s", folder / "k8s")
    overlay = folder / OVERLAY.relative_to(ROOT)
    values = yaml.safe_load((overlay / "values.yaml").read_text())
    values["data"]["gpus"] = str(gpus)
    (overlay / "values.yaml").write_text(yaml.safe_dump(values))
    command = [kubectl, "kustomize", str(overlay)]
    built = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (found,) = (o for o in yaml.safe_load_all(built) if o["kind"] == "RayCluster")
    return found


FAKE_NODES = (
    "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
)


def autoscaling(
    cluster: dict[str, Any], *, idle_s: float, provider: str = FAKE_NODES
) -> dict[str, Any]:
    """The autoscaler's configuration: KubeRay's, over nodes of this machine."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    derive = autoscaling_config._derive_autoscaling_config_from_ray_cr
    config = derive(cluster)
    groups = config["available_node_types"]
    groups[HEAD] = groups.pop(config["head_node_type"])
    for group in groups.values():
        there = group["resources"]
        there["CPU"] = min(there["CPU"], os.cpu_count() or 1)
        del there["memory"]  # each raylet finds this machine's
        group["idle_timeout_s"] = idle_s
    return config | {
        "head_node_type": HEAD,
        "idle_timeout_minutes": idle_s / 60,
        "provider": {
            "type": "external",
            "module": provider,
            "gcs_address": f"127.0.0.1:{PORT}",
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "docker": {},
        "rsync_exclude": [],
        "rsync_filter": [],
    }


def processes(text: bytes, file: str = "cmdline") -> list[int]:
    """Processes of whose command line or environment this is a part."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if text in (entry / file).read_bytes():
                    found.append(int(entry.name))
    return found


def start_head(
    command: list[str], environment: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """Start a head, and wait until it runs or has ended."""
    with log.open("w") as out:
        head = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        if head.poll() is not None or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return head


@contextlib.contextmanager
def scaled(
    gpus: int = 2, idle_s: float = 10.0, provider: str = FAKE_NODES, **variables: str
) -> Iterator[dict[str, str]]:
    """A head without CPUs that starts the groups' nodes; gives clients' environment.

    Args:
        gpus: How many there may be.
        idle_s: Seconds after which an idle node goes.
        provider: The class that starts nodes.
        variables: Added to the environment of the head, and so of the autoscaler.
    """
    # The folder of sockets must have a short name.
    folder = Path(tempfile.mkdtemp(prefix="mas", dir="/tmp"))
    cluster = ray_cluster(gpus, folder / "kustomize")
    config = folder / "autoscaling.yaml"
    config.write_text(
        yaml.safe_dump(autoscaling(cluster, idle_s=idle_s, provider=provider))
    )
    labels = cluster["spec"]["headGroupSpec"]["labels"]
    environment = os.environ | {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
        # As k8s/base sets it: what no node can ever meet is reported, not awaited.
        "RAY_enable_infeasible_task_early_exit": "true",
    }
    environment.pop("RAY_ADDRESS", None)
    command = [
        *(f"{Path(sys.executable).parent}/ray", "start", "--head", "--block"),
        *("--num-cpus=0", "--node-ip-address=127.0.0.1", f"--port={PORT}"),
        "--labels=" + ",".join(f"{key}={value}" for key, value in labels.items()),
        *("--include-dashboard=false", f"--temp-dir={folder}/ray"),
        # An agent that may choose has 15 s to report, too little on a busy machine.
        f"--dashboard-agent-listen-port={AGENT_PORT}",
        f"--dashboard-agent-grpc-port={AGENT_PORT + 1}",
        f"--metrics-export-port={AGENT_PORT + 2}",
        f"--runtime-env-agent-port={AGENT_PORT + 3}",
        f"--autoscaling-config={config}",
    ]
    log = folder / "head.log"
    head = start_head(command, environment | variables, log)
    if "timed out during startup" in log.read_text():
        # Ray gives a node 30 s, fixed in its source; a busy machine may take longer.
        for left in processes(f"{folder}/".encode()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        head = start_head(command, environment | variables, log)
    try:
        if "Ray runtime started" not in log.read_text():
            raise RuntimeError(f"the head does not start: {log.read_text()}")
        yield environment | {"RAY_ADDRESS": f"127.0.0.1:{PORT}"}
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(30)
        for pid in processes(f"{folder}".encode()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.kill()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def preempt(node: str) -> None:
    """End a node as a cloud does that gives no notice."""
    mark = f"RAY_CLOUD_INSTANCE_ID={node}\0".encode()
    for pid in processes(mark, "environ"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# --- what happens ---------------------------------------------------------------------

WATCH = """
import json, sys, time
import ray

out, sys.stdout = sys.stdout, sys.stderr  # Ray prints what becomes of nodes
ray.init(log_to_driver=False, logging_level="ERROR")
print("there", file=out, flush=True)
while True:
    alive = [node for node in ray.nodes() if node["Alive"]]
    free = ray._private.state.available_resources_per_node()
    found = {}
    for node in alive:
        if gpus := node["Resources"].get("GPU"):
            used = gpus - free.get(node["NodeID"], {}).get("GPU", 0)
            market = node["Labels"].get("medray/market", "")
            found[node["NodeID"]] = [gpus, used, market]
    print(json.dumps([time.time(), found]), file=out, flush=True)
    time.sleep(0.5)
"""


@dataclass
class Watched:
    """What was seen of the GPU nodes.

    Attributes:
        samples: Seconds since the start; by node its GPUs, those in use, its market;
            and how many regions were committed.
    """

    samples: list[tuple[float, dict[str, list[Any]], int]] = field(default_factory=list)

    @property
    def nodes(self) -> set[str]:
        """All GPU nodes that ever were."""
        return {node for _, there, _ in self.samples for node in there}

    @property
    def node_seconds(self) -> float:
        """How long GPU nodes were there, all together."""
        total = 0.0
        for before, after in zip(self.samples, self.samples[1:], strict=False):
            total += len(before[1]) * (after[0] - before[0])
        return total

    def working(self) -> list[str]:
        """The nodes whose GPUs are in use now."""
        there = self.samples[-1][1] if self.samples else {}
        return sorted(node for node, (_, used, _) in there.items() if used)


@contextlib.contextmanager
def watching(environment: dict[str, str], run: Path) -> Iterator[Watched]:
    """Look at the nodes twice a second."""
    command = [sys.executable, "-c", WATCH]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = process.stdout
    if not lines.readline():
        raise RuntimeError("nothing is to be seen of the cluster")
    watched, start = Watched(), time.time()

    def read() -> None:
        for line in lines:
            at, there = json.loads(line)
            before = watched.samples[-1][2] if watched.samples else 0
            regions = max(before, committed(run))  # the journal goes at the end
            watched.samples.append((at - start, there, regions))

    thread = threading.Thread(target=read)
    thread.start()
    with process:  # which waits for it, and closes what it wrote to
        try:
            yield watched
        finally:
            process.kill()
            thread.join()


def committed(run: Path) -> int:
    count = 0
    for path in run.glob("journal/*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            count += path.read_text().count("\n")
    return count


def infer(
    environment: dict[str, str],
    slides: Path,
    model: Path,
    run: Path,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """`medray infer`; gives what it answers."""
    command = [sys.executable, "-m", "medray.cli", "infer", str(slides), "--json"]
    command += ["--model", str(model), "--out", str(run), "--everywhere"]
    # Its GPUs are none: what predicts are cores, for which compiling does not pay.
    command += ["--region", str(REGION), "--precision", "float32", "--compile", "off"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            meanwhile()
            time.sleep(0.2)
        assert process.stdout is not None
        answer = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"medray infer ended with {process.returncode}: {answer}")
    found: dict[str, Any] = json.loads(answer.splitlines()[-1])
    return found


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.5)


def masks(run: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(run.glob("masks/**/*")) if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in paths}


def write_inputs(out: Path, slides: int) -> tuple[Path, Path]:
    """Generated slides, and a model with random weights."""
    from benchmarks.random_model import random_model
    from medray.datasets.synthetic import write_slide
    from medray.datasets.synthetic_scene import draw_scene

    for seed in range(slides):
        scene = draw_scene(seed, height=SIZE[0], width=SIZE[1])
        write_slide(out / "slides", f"s{seed:02d}", scene, layout="pyramid")
    # Light: what is measured is nodes that come and go, all on this machine's cores.
    model = out / "model"
    random_model(model, "segformer", "tu-test_resnet", window=(256, 192), seed=7)
    return out / "slides", model


# --- the picture ----------------------------------------------------------------------


def draw_timeline(watched: Watched, file: Path) -> None:
    import matplotlib.pyplot as plt

    seconds = [at for at, _, _ in watched.samples]
    there = [len(nodes) for _, nodes, _ in watched.samples]
    used = [sum(n[1] for n in nodes.values()) for _, nodes, _ in watched.samples]
    regions = [count for _, _, count in watched.samples]
    figure, (above, below) = plt.subplots(
        2, sharex=True, figsize=(8, 4.5), layout="constrained"
    )
    above.fill_between(seconds, there, step="post", color="#c9d8e8", label="there")
    above.step(seconds, used, where="post", color="#1f4e79", label="in use")
    above.set(ylabel="GPUs", yticks=range(max(there) + 1), ylim=(0, max(there) + 0.2))
    above.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
    below.plot(seconds, regions, color="#1f4e79")
    below.set(xlabel="seconds since the job was submitted", ylabel="regions committed")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def picture(out: Path, slides: int = 24, gpus: int = 2) -> Iterator[harness.Result]:
    """Draw how nodes come with the work and go after it.

    Args:
        out: Folder to make.
        slides: Number of generated slides.
        gpus: Number of nodes that there may be.
    """
    out = out.absolute()
    out.mkdir(parents=True)
    inputs = write_inputs(out, slides)
    run = out / "run"
    with scaled(gpus) as environment, watching(environment, run) as watched:
        summary = infer(environment, *inputs, run)
        ended = watched.samples[-1][0]
        wait_until(lambda: not watched.samples[-1][1], 120)
    # The journal goes at the end, and may do so before its last lines were seen.
    watched.samples = [
        (at, nodes, summary["regions"] if at >= ended else count)
        for at, nodes, count in watched.samples
    ]
    counts = [len(nodes) for _, nodes, _ in watched.samples]
    first = next(at for at, nodes, _ in watched.samples if nodes)
    gone = watched.samples[-1][0]
    yield {
        "slides": summary["done"],
        "regions": summary["regions"],
        "GPU nodes": [counts[0], max(counts), counts[-1]],
        "first node, s": round(first),
        "done, s": round(ended),
        "no node, s": round(gone),
    }
    (out / "timeline.json").write_text(json.dumps(watched.samples))
    draw_timeline(watched, out / "autoscaling.png")


# --- the curve ------------------------------------------------------------------------


class Preemptions:
    """A cloud that takes working nodes away, at even steps of the work."""

    def __init__(self, watched: Watched, count: int, regions: int) -> None:
        self.taken: set[str] = set()
        self._watched = watched
        self._due = [regions * k / (count + 1) for k in range(count, 0, -1)]

    def look(self) -> None:
        if not self._due or not (there := self._watched.working()):
            return
        if self._watched.samples[-1][2] >= self._due[-1]:
            self._due.pop()
            preempt(there[0])
            self.taken.add(there[0])


def curve(
    out: Path,
    slides: int = 24,
    gpus: int = 2,
    preempted: tuple[int, ...] = (0, 1, 0, 2, 0, 4),
) -> Iterator[harness.Result]:
    """Do the same slides with more and more preemptions, and add up the cost.

    Args:
        out: Folder to make.
        slides: Number of generated slides.
        gpus: Number of nodes that there may be at once.
        preempted: Numbers of nodes that are taken away, a run each.
    """
    out = out.absolute()
    out.mkdir(parents=True)
    inputs = write_inputs(out, slides)
    rows: list[dict[str, Any]] = []
    plain: dict[str, bytes] = {}
    regions = slides * len([*plan_regions(*SIZE, REGION)])
    for number, count in enumerate(preempted):
        run = out / f"run-{number}"
        with scaled(gpus) as environment, watching(environment, run) as watched:
            cloud = Preemptions(watched, count, regions)
            start = time.monotonic()
            summary = infer(environment, *inputs, run, cloud.look)
            seconds = time.monotonic() - start
            wait_until(lambda: not watched.samples[-1][1], 120)
        plain = plain or masks(run)
        rows.append(
            {
                "nodes": len(watched.nodes),
                "preempted": len(cloud.taken),
                "share": len(cloud.taken) / len(watched.nodes),
                "seconds": seconds,
                "node_s": watched.node_seconds,
                "node_s_per_slide": watched.node_seconds / slides,
                "done": summary["done"],
                "same_bytes": masks(run) == plain,
            }
        )
        yield rows[-1]
        (out / "curve.json").write_text(json.dumps(rows, indent=1))
    draw_curve(rows, out / "preemption.png")


def draw_curve(rows: list[dict[str, Any]], picture: Path) -> None:
    import matplotlib.pyplot as plt

    costs_of = [r["node_s_per_slide"] for r in rows if not r["preempted"]]
    least = statistics.median(costs_of)
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    shares = [100 * row["share"] for row in rows]
    costs = [row["node_s_per_slide"] / least for row in rows]
    axes.plot(shares, costs, "o", color="#1f4e79")
    axes.set(
        xlabel="GPU nodes that were preempted, % of those started",
        ylabel="node time a slide, of that\nwithout preemption",
        ylim=(0, None),
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    harness.run(picture, curve)
