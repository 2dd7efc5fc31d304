"""A stream over nodes that join, die and are drained; see test_nodes.py."""

import os
import signal
import sys
import time
from pathlib import Path

import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from medray.errors import LostError
from medray.execution.stream import Stream

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Slow:
    """Notes where a row is begun, and takes its time."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def __call__(self, row: dict) -> int:
        node = ray.get_runtime_context().get_node_id()
        with self.log.open("a") as log:
            log.write(f"{row['i']} {node}\n")
        if row.get("kills"):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(row.get("seconds", 2))
        return row["i"]


def stream_of(log: Path) -> Stream:
    return Stream(Slow(log), num_cpus=1, timeout=lambda _: 60, bounded=True, expected=1)


def begun(log: Path) -> list[tuple[int, str]]:
    lines = log.read_text().splitlines() if log.exists() else []
    return [(int(i), node) for i, node in map(str.split, lines)]


def take_all(stream: Stream) -> dict:
    found = []
    while stream.busy:
        found += [(row["i"], result) for row, result in stream.take()]
    assert len(found) == len(dict(found))
    return dict(found)


def nodes_die(cluster: Cluster, log: Path) -> None:
    """A row at hand on four nodes that are lost is no row that kills."""
    with stream_of(log) as stream:
        stream.give([{"i": 6, "seconds": 0}, {"i": 7}])  # the cluster has no core yet
        node = cluster.add_node(num_cpus=1)
        for lost in range(5):
            while sum(i == 7 for i, _ in begun(log)) <= lost:
                stream.take(0.1)
            if lost < 4:
                cluster.remove_node(node, allow_graceful=False)
                node = cluster.add_node(num_cpus=1)
        assert take_all(stream)[7] == 7
        stream.give([{"i": 8, "kills": True}])
        assert isinstance(take_all(stream)[8], LostError)
    assert sum(i == 8 for i, _ in begun(log)) == 3
    cluster.remove_node(node)


def a_node_is_told_to_go(cluster: Cluster, log: Path) -> None:
    """It finishes what it has, begins nothing more, and its place is taken."""
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    with stream_of(log) as stream:
        # Two wait at each process.
        stream.give([{"i": i, "seconds": 5} for i in range(4)])
        while len({node for _, node in begun(log)}) < 2:
            stream.take(0.1)
        first = nodes[0].node_id
        in_100_s = int(time.time() + 100) * 1000
        why = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        accepted, _ = GcsClient(cluster.address).drain_node(first, why, "", in_100_s)
        assert accepted
        told = len(begun(log))
        stream.give([{"i": i, "seconds": 0.5} for i in range(4, 20)])
        third = cluster.add_node(num_cpus=1)
        assert sorted(take_all(stream)) == [*range(20)]
    later = [node for _, node in begun(log)[told:]]
    assert first not in later, (first, later)
    assert set(later) == {nodes[1].node_id, third.node_id}
    assert len(begun(log)) == 20, "a row was begun twice"


def a_node_dies_and_none_comes(cluster: Cluster, log: Path) -> None:
    """A node dies and none takes its place: the other one does the rest."""
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    with stream_of(log) as stream:
        stream.give([{"i": i, "seconds": 3} for i in range(6)])
        while len({node for _, node in begun(log)}) < 2:
            stream.take(0.1)
        cluster.remove_node(nodes[0], allow_graceful=False)
        assert take_all(stream) == {i: i for i in range(6)}
        end = time.monotonic()
    assert time.monotonic() - end < 15


def main(name: str, log: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray.init(cluster.address, log_to_driver=False)
    globals()[name](cluster, log)
    ray.shutdown()
    cluster.shutdown()
    print("as it should be")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
