"""How the stages use Ray: running a chain of Ray Data, and what a cluster has."""

from __future__ import annotations

import functools
import logging
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from medray.errors import ConfigError
from medray.execution.joining import TOKEN_ADVICE as TOKEN_ADVICE
from medray.execution.joining import check_head as check_head
from medray.execution.joining import connect as connect
from medray.execution.joining import kill_workers as kill_workers
from medray.execution.joining import parse_address as parse_address
from medray.execution.joining import says_more
from medray.execution.signals import call_stoppable as call_stoppable

GPUS_LABEL = "medray/gpus"

# How long a node may take to answer.
_KNOCK_S = 5.0


class End(threading.Event):
    """A flag that is set to end a chain of Ray Data at once.

    Ray Data copies its settings, and sends them to its processes; this stays here.
    """

    def __deepcopy__(self, _: object) -> End:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return End, ()


@contextmanager
def streaming(block_bytes: int, end: End) -> Iterator[None]:
    """Run Ray Data chains so that each block holds one region's pixels.

    Args:
        block_bytes: Bytes of one row with pixels. A larger block would hold regions
            back until it is full, and keep them all in memory.
        end: Ends them once it is set. What fails them is raised, not logged as well.
    """
    # Imported here: with it come pandas and more, which processes that read slides, and
    # start for each run, can do without (2 of their 4 s).
    from ray.data import DataContext

    context = DataContext.get_current().copy()
    context.target_max_block_size = block_bytes
    context.target_min_block_size = 1
    context.enable_progress_bars = False
    context.enable_rich_progress_bars = False
    context.print_on_execution_start = False
    # Of a deep copy.
    context.custom_execution_callback_classes.append(functools.partial(_Ending, end))
    # A hospital's scanner share may stall for long; the run's own limits decide.
    context.execution_no_progress_timeout_s = -1
    data_logger = logging.getLogger("ray.data")
    level = data_logger.level
    if not says_more():
        data_logger.setLevel(logging.CRITICAL)
    try:
        with DataContext.current(context):
            yield
    finally:
        data_logger.setLevel(level)


class _Ending:
    """Ends an execution of Ray Data from outside."""

    def __init__(self, end: End) -> None:
        self._end = end

    def on_execution_step(self, _: object) -> None:
        """Fail the execution if it is to end."""
        if self._end.is_set():
            from ray.data.exceptions import ExecutionTimeoutError

            # Others Ray Data takes for faults of its own, and writes a page about them.
            raise ExecutionTimeoutError("told to end")

    def before_execution_starts(self, _: object) -> None:
        """Do nothing."""

    def after_execution_succeeds(self, _: object) -> None:
        """Do nothing."""

    def after_execution_fails(self, _: object, error: Exception) -> None:
        """Do nothing."""


def cpus_per_node() -> int:
    """Return the CPU count of the smallest node that has any."""
    return min(_cpus(), default=1)


def gpu_workers() -> int:
    """Return the number of GPU workers: devices that predict.

    These are the GPUs or, where there are none, the nodes that have CPUs (the head of a
    cluster on Kubernetes often has none).
    """
    return gpus() or max(1, len(_cpus()))


def gpu_workers_now() -> int:
    """Return how many devices are there now, others having to come; at least one."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    if gpus() <= sum(int(node["Resources"].get("GPU", 0)) for node in alive):
        return gpu_workers()
    return max(1, int(ray.available_resources().get("GPU", 0)))


def _cpus() -> list[int]:
    found = (int(n["Resources"].get("CPU", 0)) for n in ray.nodes() if n["Alive"])
    return [count for count in found if count]


def memory_per_node() -> int:
    """Return the memory in bytes that Ray has on the smallest node, its store included.

    Ray takes it from the container's limit where there is one. A head without CPUs does
    no work and does not count, unless it waits for the first others.
    """
    names = ("memory", "object_store_memory")
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    working = [there for there in alive if there.get("CPU")] or alive
    return min(int(sum(there.get(name, 0) for name in names)) for there in working)


def gpus_per_node() -> int:
    """Return the most GPUs that a node has; one while those to come are awaited."""
    counts = (int(n["Resources"].get("GPU", 0)) for n in ray.nodes() if n["Alive"])
    return max(counts, default=0) or min(1, gpus())


def gpus() -> int:
    """Return the number of GPUs that the cluster has, or may have on request.

    Raises:
        ConfigError: The label `medray/gpus` of a node is no number.
    """
    return gpus_of(ray.nodes())


def predicts_on_gpus(nodes: Sequence[Mapping[str, Any]] | None = None) -> bool:
    """Return whether GPU workers have GPUs, there or to come on request.

    A GPU that Ray only pretends to have is none: of a real one its node says the type.

    Args:
        nodes: As `ray.nodes` returns them; by default it is called.
    """
    nodes = ray.nodes() if nodes is None else nodes
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    there = [node for node in alive if node.get("GPU")]
    if not there:
        return bool(gpus_of(nodes))
    return any(name.startswith("accelerator_type:") for n in there for name in n)


def gpus_of(nodes: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of GPUs that a cluster of these nodes has, or may have.

    Ray does not report what an autoscaler may add. A cluster that starts without GPUs
    states it in the label `medray/gpus` of its head; k8s/ and cluster/ set it.

    Args:
        nodes: As `ray.nodes` returns them.

    Raises:
        ConfigError: The label is no number.
    """
    alive = [node for node in nodes if node["Alive"]]
    there = sum(int(node["Resources"].get("GPU", 0)) for node in alive)
    for node in alive:
        said = node.get("Labels", {}).get(GPUS_LABEL, "0")
        if not said.isdecimal():
            raise ConfigError(
                f"the node label {GPUS_LABEL} is {said!r}: expected the number of GPUs "
                f"that the cluster may have; mend it where the head is started"
            )
        there = max(there, int(said))
    return there


def places(resources: Mapping[str, float]) -> int:
    """Return how many processes of such resources the nodes, if empty, have room for.

    Args:
        resources: `CPU` and `GPU` that one takes; 0: none.
    """
    leaving = leaving_nodes()
    there = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
    asked = {name: amount for name, amount in resources.items() if amount}
    return sum(
        min(int(node["Resources"].get(n, 0) / amount) for n, amount in asked.items())
        for node in there
    )


def leaving_nodes() -> set[str]:
    """Return the ids of nodes that are being drained, by `ray drain-node`.

    Clouds give a notice before they take a spot machine away, and Kubernetes before it
    ends a pod; k8s/ passes it on. Ray starts nothing on such a node any more.
    """
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return set(found)


def is_gone(node: str) -> bool:
    """Return whether a node is dead, is being drained, or no longer answers.

    Ray takes a node for alive until it has missed several heartbeats, 20 s and more; so
    we probe the raylet's TCP port.
    """
    if node in leaving_nodes():
        return True
    told = next((one for one in ray.nodes() if one["NodeID"] == node), None)
    if told is None or not told["Alive"]:
        return True
    try:
        place = (told["NodeManagerAddress"], told["NodeManagerPort"])
        socket.create_connection(place, timeout=_KNOCK_S).close()
    except OSError:
        return True
    return False


def node_of(actor: Any) -> str:
    """Return the id of the node on which an actor runs."""
    told = ray._private.state.actors(actor._actor_id.hex())
    return str(told.get("Address", {}).get("NodeID", ""))
