"""Kill something at a random moment, look at what is left, finish it, and again.

Each round runs `medray infer` on a cluster of two nodes of this machine and kills, at a
moment drawn from a seed: a process that reads, one that writes, one that predicts, one
that plans, a node, the driver, or everything. Then it is run again, if it did not go on
by itself, and the outputs must be byte for byte those of an undisturbed run, nothing
that was committed may be computed again, and no file may be left over.

Work is counted by shards: each write is a new inode, so none escapes. What may be done
twice is what was under way: two batches of each GPU worker that was lost, or of all GPU
workers when the driver was.

Run: python -m benchmarks.robustness.chaos --rounds 100
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from benchmarks import harness
from benchmarks.random_model import random_model
from medray.datasets.synthetic import write_slide
from medray.datasets.synthetic_scene import draw_scene
from medray.execution import memory
from medray.storage.ledger import Ledger

KINDS = ("reader", "writer", "gpu_worker", "planner", "node", "driver", "everything")
TITLES = {
    "reader": b"ray::RegionIO.read",
    "writer": b"ray::RegionIO.write",
    "gpu_worker": b"ray::GpuWorker",
    "planner": b"ray::SlideWorker",
}
BATCH = 8  # regions, without GPUs


class Nodes:
    """A cluster of two nodes, which can be broken and repaired."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.cluster = Cluster()
        self.head = self._add()
        self.second = self._add()

    def _add(self):
        size = {"num_cpus": 2, "object_store_memory": 200 << 20, "memory": 6 << 30}
        return self.cluster.add_node(**size)

    def lose_one(self) -> None:
        self.cluster.remove_node(self.second, allow_graceful=False)

    def mend(self) -> None:
        self.second = self._add()

    def lose_all(self) -> None:
        workers = self.titled(b"ray::")
        for node in (self.head, self.second):
            for process in node.live_processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process[1].pid, signal.SIGKILL)
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(Exception):
            self.cluster.shutdown()

    def titled(self, start: bytes) -> list[int]:
        """Return the ids of this cluster's processes whose title begins so."""
        ours = {
            process.pid
            for node in (self.head, self.second)
            for _, process in node.live_processes()
        }
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and (entry / "cmdline").read_bytes().startswith(
                    start
                ):
                    stat = (entry / "stat").read_text()
                    if int(stat.rpartition(")")[2].split()[1]) in ours:
                        found.append(int(entry.name))
        return found


class Writes:
    """Counts the writes of level-0 shards while it watches: by path, by inode."""

    def __init__(self, out: Path) -> None:
        self._out, self._seen = out, set()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch)

    def __enter__(self) -> "Writes":
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._watcher.join()
        self._look()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._look()

    def _look(self) -> None:
        for folder in self._out.glob("masks/*.ome.zarr/0/c/*"):
            with contextlib.suppress(OSError):
                for entry in os.scandir(folder):
                    if "partial" not in entry.name:
                        self._seen.add((entry.path, entry.inode()))

    @property
    def repeated(self) -> int:
        """How many writes were of a shard that had been written before."""
        return len(self._seen) - len({path for path, _ in self._seen})


def outputs(out: Path) -> dict[str, bytes]:
    found = (path for path in sorted(out.rglob("*")) if path.is_file())
    named = {str(path.relative_to(out)): path for path in found}
    return {name: p.read_bytes() for name, p in named.items() if name[:5] == "masks"}


def strays(out: Path) -> list[str]:
    """Return the files that a finished run has no use for."""
    known = ("masks/", "commits/", "run.yaml", "slides.parquet")
    names = [str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()]
    return [n for n in names if not n.startswith(known) or "partial" in n]


def committed(out: Path) -> int:
    """How many regions are committed, of slides under way and of finished ones."""
    with contextlib.suppress(FileNotFoundError):
        ledger = Ledger(str(out))
        done = {s: r for s, r in ledger.slides.items() if r["status"] == "done"}
        finished = sum(row["regions"] for row in done.values())
        return finished + sum(
            len(regions)
            for key, regions in ledger.regions.items()
            if key.split("@")[0] not in done
        )
    return 0


class Round:
    """One run, disturbed or not."""

    def __init__(self, folder: Path, out: Path, nodes: Nodes) -> None:
        self.folder, self.out, self.nodes = folder, out, nodes

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "medray.cli", "infer", "--json"]
        command += [str(self.folder / "slides"), "--model", str(self.folder / "model")]
        command += ["--out", str(self.out), "--region", "512", "--everywhere"]
        return subprocess.Popen(
            command,
            env=os.environ | {"RAY_ADDRESS": self.nodes.cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process: subprocess.Popen) -> dict:
        stdout, stderr = process.communicate(timeout=600)
        if process.returncode:
            raise SystemExit(f"{self.out}: exit {process.returncode}\n{stderr[-4000:]}")
        return json.loads(stdout.splitlines()[-1])

    def kill(self, kind: str, process: subprocess.Popen) -> bool:
        """Kill what is to be killed; False when the run ended before that."""
        if kind in TITLES:
            # Reading takes a moment: after some seconds whoever reads at times will do.
            begun = time.monotonic()
            while time.monotonic() < begun + 10 and process.poll() is None:
                late = time.monotonic() > begun + 3
                title = TITLES[kind].partition(b".")[0] if late else TITLES[kind]
                if pids := self.nodes.titled(title):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(random.choice(pids), signal.SIGKILL)
                        return True
                time.sleep(0.002)
            return False
        if process.poll() is not None:
            return False
        if kind == "node":
            self.nodes.lose_one()
        elif kind == "driver":
            process.kill()
        else:
            process.kill()
            self.nodes.lose_all()
        return True


def main(
    rounds: int = 7, seed: int | None = None, slides: int = 4
) -> Iterator[harness.Result]:
    """Kill something in each round and finish the run; exit with 1 if a mask differs.

    Args:
        rounds: Number of rounds.
        seed: Decides what is killed and when; without it the time.
        slides: Number of generated slides.
    """
    os.environ["RAY_AUTH_MODE"] = "disabled"
    seed = int(time.time()) if seed is None else seed
    random.seed(seed)
    done: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        # Stopped by Ctrl-C it still says what was found.
        with contextlib.suppress(KeyboardInterrupt):
            for one in _rounds(Path(name), rounds, seed, slides):
                done.append(one)
                yield one
        found = _certificate(done, seed)
        yield found
    raise SystemExit(0 if found["holds"] else 1)


def _rounds(
    folder: Path, count: int, seed: int, slides: int
) -> Iterator[dict[str, Any]]:
    for number in range(slides):
        scene = draw_scene(number, height=1100, width=1400)
        write_slide(folder / "slides", f"s{number}", scene, layout="pyramid")
    random_model(
        folder / "model", "segformer", "tu-test_resnet", window=(128, 96), seed=8
    )
    nodes = Nodes()
    undisturbed = Round(folder, folder / "undisturbed", nodes)
    for _ in range(2):  # the second time everything is in the caches
        subprocess.run(["rm", "-rf", undisturbed.out])
        begun = time.monotonic()
        process = undisturbed.start()
        while process.poll() is None and not committed(undisturbed.out):
            time.sleep(0.1)
        first = time.monotonic() - begun
        total = undisturbed.finish(process)["regions"]
        last = time.monotonic() - begun
    expected = outputs(undisturbed.out)
    print(
        f"seed {seed}: {total} regions, first committed after {first:.1f} s of "
        f"{last:.1f} s undisturbed",
        flush=True,
    )
    done = tries = 0
    kinds = random.sample(KINDS, len(KINDS))
    while done < count and tries < 3 * count:
        tries += 1
        kind = kinds[done % len(kinds)]
        one = Round(folder, folder / f"round{tries}", nodes)
        told = _one_round(one, kind, (0.5 * first, last), total, expected)
        subprocess.run(["rm", "-rf", one.out])
        if told is not None:
            done += 1
            yield {"round": done} | told
    nodes.lose_all()


def _certificate(rounds: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    good = [r for r in rounds if r["identical"] and not r["strays"] and r["bounded"]]
    return {
        "seed": seed,
        "rounds": len(rounds),
        "kills": dict(Counter(r["killed"] for r in rounds)),
        "identical": sum(r["identical"] for r in rounds),
        "committed_computed_again": sum(r["committed_again"] for r in rounds),
        "shards_written_again": sum(r["repeated"] for r in rounds),
        "most_written_again": max((r["repeated"] for r in rounds), default=0),
        "most_in_flight": 2 * memory.BATCHES * BATCH,
        "strays": sum(len(r["strays"]) for r in rounds),
        "holds": len(good) == len(rounds),
    }


def _one_round(
    one: Round,
    kind: str,
    span: tuple[float, float],
    total: int,
    expected: dict[str, bytes],
) -> dict | None:
    moment = random.uniform(*span)
    begun = time.monotonic()
    with Writes(one.out) as writes:
        process = one.start()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        if not one.kill(kind, process):
            one.finish(process)
            return None
        stands = kind not in ("driver", "everything")
        at_kill = committed(one.out)
        if stands:
            summary = one.finish(process)
            again = 0
            if kind == "node":
                one.nodes.mend()
        else:
            process.communicate()
            if kind == "everything":
                ray.shutdown()
                one.nodes.start()
            at_kill = committed(one.out)
            summary = one.finish(one.start())
            # What the second run computed, less what was missing.
            again = summary["regions"] - (total - at_kill)
    gpu_workers = 2 if kind in ("driver", "everything", "node") else 1
    return {
        "killed": kind,
        "moment_s": round(moment, 2),
        "committed_at_kill": at_kill,
        "went_on_by_itself": stands,
        "committed_again": again,
        "repeated": writes.repeated,
        "bounded": again == 0
        and writes.repeated <= gpu_workers * memory.BATCHES * BATCH,
        "identical": outputs(one.out) == expected and summary["failed"] == {},
        "strays": strays(one.out),
        "seconds": round(time.monotonic() - begun, 1),
    }


if __name__ == "__main__":
    harness.run(main)
