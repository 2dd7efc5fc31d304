"""Deaths with a node speak against no row and end no run; see test_nodes.py."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from medray.errors import LostError
from medray.execution import pool_state
from medray.execution.actor_pool import Pool, poll


class Slow:
    """Notes who has a row, and takes its time."""

    def __init__(self, log: str) -> None:
        self.log = Path(log)

    def work(self, rows: list) -> Iterator[list]:
        for row in rows:
            with self.log.open("a") as log:
                log.write(f"{row}\n")
            if row["kills"]:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(2)
            yield [row["i"]]


class SlowStart(Slow):
    """Notes that it starts, and takes its time."""

    def __init__(self, log: str) -> None:
        super().__init__(log)
        with self.log.open("a") as started:
            started.write("start\n")
        time.sleep(3)


def main(log: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    node = cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False)
    log.touch()
    actor = ray.remote(Slow).options(num_cpus=1)
    with Pool(lambda: actor.remote(str(log)), "work", 1) as pool:
        pool.give([{"i": 7, "kills": False}])
        found: list = []
        for lost in range(5):
            while log.read_text().count("\n") <= lost:
                assert poll(pool) == []
            if lost < 4:
                cluster.remove_node(node, allow_graceful=False)
                node = cluster.add_node(num_cpus=1)
        while pool.busy:
            found += [result for _, _, result in poll(pool)]
        assert found == [7], found
        pool.give([{"i": 8, "kills": True}])
        while pool.busy:
            found += [result for _, _, result in poll(pool)]
        assert isinstance(found[1], LostError), found
        assert log.read_text().count("\n") == 5 + 3
    # A node is lost while an actor starts on it: no death that could end the run.
    pool_state.DEATHS = 1
    log.write_text("")
    actor = ray.remote(SlowStart).options(num_cpus=1)
    with Pool(lambda: actor.remote(str(log)), "work", 1) as pool:
        while not log.read_text():
            assert poll(pool) == []
        cluster.remove_node(node, allow_graceful=False)
        cluster.add_node(num_cpus=1)
        pool.give([{"i": 9, "kills": False}])
        while pool.busy:
            found += [result for _, _, result in poll(pool)]
        assert found[2:] == [9], found
        assert log.read_text().count("start") == 2
    ray.shutdown()
    cluster.shutdown()
    print("four nodes cost nothing, three processes a row")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
