"""Joining a Ray cluster: its address, whether a head answers there, or a local one."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
from typing import Any

import psutil
import ray

from medray.errors import ConfigError, MedrayError, TerminatedError

log = logging.getLogger(__name__)

TOKEN_ADVICE = (
    "give it the token of the head: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or "
    "RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"
)
# Seconds for a connection, names looked up included, and for an answer.
_PORT_S, _ANSWER_S = 5.0, 8.0
# How often a local cluster is started before that is given up.
_STARTS = 3
_FORM = "expected HOST:PORT of its head (port 6379; IPv6 as [ADDRESS]:PORT), or auto"
_PLACE = re.compile(
    r"(?P<host>[A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+(?:%[\w.-]+)?\]):(?P<port>[0-9]{1,5})",
    re.ASCII,
)


def connect() -> None:
    """Connect to Ray: the cluster of RAY_ADDRESS or of this job, else a local one.

    A local cluster that is started here asks for a token, Ray's default. One that may
    be running here is only taken if RAY_ADDRESS says so (`auto`): Ray would look for it
    by a file that outlives clusters that were killed, and wait minutes for those.

    Raises:
        ConfigError: RAY_ADDRESS is none, or a local one does not start.
        MedrayError: The cluster does not answer, or is of another version.
    """
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    address = os.environ.get("RAY_ADDRESS", "")
    if address and address != "local":
        _join(address)
        return
    for trial in range(_STARTS):
        try:
            # No user sees its dashboard; without it the start is 2 s shorter.
            _init(address="local", include_dashboard=False)
            return
        except Exception as error:
            # Ray gives its processes 30 s, which cannot be changed; those that were too
            # slow it ends with this process.
            if type(error) is not Exception or "timed out" not in f"{error}":
                raise
            log.warning("Ray has not started in 30 s (%d of %d)", trial + 1, _STARTS)
    raise ConfigError(
        f"Ray did not start on this machine: its processes took more than 30 s, "
        f"{_STARTS} times. Is the machine overloaded, or short of memory? "
        "/tmp/ray/session_latest/logs has what they say"
    )


def says_more() -> bool:
    """Return whether medray logs at DEBUG level."""
    return logging.getLogger("medray").isEnabledFor(logging.DEBUG)


def _join(address: str) -> None:
    there = check_head(address)
    if there != ray.__version__:
        raise MedrayError(
            f"{address}: runs Ray {there}, here is {ray.__version__}; use one image, "
            f"or one version, everywhere"
        )
    try:
        _init()
    except Exception as error:  # of many kinds: another Python, no node of it here, ...
        said = " ".join(f"{error}".split())[:500]
        raise MedrayError(
            f"{address}: the head answers, but this machine cannot join ({said}); "
            f"`medray submit` runs a command there, and `medray doctor` looks at it"
        ) from error


def _init(**options: Any) -> None:
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=says_more(), **options)
    except SystemExit as error:  # Ray's answer to SIGTERM
        if error.code == signal.SIGTERM:
            raise TerminatedError from error
        raise
    # Ray's C++ now takes SIGTERM for a crash and prints its stack; whoever waited for
    # it before waits again.
    if threading.current_thread() is threading.main_thread():
        after = before if callable(before) else signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, after)


def kill_workers() -> None:
    """Kill what the raylet of a local cluster has started, before this process ends.

    The kernel kills the raylet with this process; its agents might stay, and if it went
    first, Ray would end this process by a code of its own.
    """
    for child in psutil.Process().children():
        if child.name() == "raylet":
            for process in child.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()


def parse_address(address: str) -> tuple[str, int]:
    """Return host (an IPv6 one without brackets) and port of HOST:PORT.

    Raises:
        ConfigError: It is another kind of address, or none.
    """
    found = _PLACE.fullmatch(address)
    if found and 0 < int(found["port"]) < 1 << 16:
        return found["host"].strip("[]"), int(found["port"])
    hint = ""
    if address.startswith(("http://", "https://")):
        hint = "; this is a dashboard's, for `medray doctor` and `medray submit`"
    elif address.startswith("ray://"):
        hint = "; Ray's client cannot run medray, `medray submit` starts it there"
    raise ConfigError(f"address of Ray: found {address!r:.200}, {_FORM}{hint}")


def check_head(address: str) -> str:
    """Return the version of the Ray whose head answers at an address, soon.

    Ray itself would wait for minutes for one that is not there.

    Args:
        address: HOST:PORT, or `auto`: the one that runs on this machine.

    Raises:
        ConfigError: It is no such address.
        MedrayError: None answers.
    """
    if address == "auto":
        address = _address_here()
    host, port = parse_address(address)
    if isinstance(refused := _within(_PORT_S, _knock, host, port), Exception):
        raise MedrayError(
            f"{address}: nobody answers there ({refused}); see that the head runs, "
            f"that the address is right (port 6379), and that no firewall or "
            f"NetworkPolicy lies between"
        ) from refused
    found = _within(_ANSWER_S, _version_there, address)
    if isinstance(found, str):
        return found
    # gRPC's errors are pages; their codes are words.
    said = found.code().name if hasattr(found, "code") else f"{found}"
    if said == "UNAUTHENTICATED" or type(found).__name__ == "AuthenticationError":
        raise MedrayError(f"{address}: refuses the token; {TOKEN_ADVICE}") from found
    raise MedrayError(
        f"{address}: takes connections, but no head of Ray answers ({said}); see that "
        f"this is the head's port (6379), and look at its logs and load"
    ) from found


def _address_here() -> str:
    # Imported here, private as it is: `auto` is what Ray makes of it.
    from ray._private.services import get_ray_address_from_environment

    before = os.environ.pop("RAY_ADDRESS", None)  # else it is that
    try:
        return str(get_ray_address_from_environment("auto", None))
    except ConnectionError as error:
        raise MedrayError(
            "auto: no Ray runs on this machine; start one by `ray start --head`, or "
            "without RAY_ADDRESS medray starts its own"
        ) from error
    finally:
        if before is not None:
            os.environ["RAY_ADDRESS"] = before


def _within(seconds: float, function: Any, *args: Any) -> Any:
    """Return a function's result, or raise its error; TimeoutError if that is late.

    In a thread, which is left behind then: looking up a name cannot be ended.
    """
    found: list[Any] = [TimeoutError(f"no answer in {seconds:.0f} s")]

    def call() -> None:
        try:
            found.append(function(*args))
        except Exception as error:  # whatever it is, the caller reports it
            found.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[-1]


def _knock(host: str, port: int) -> None:
    socket.create_connection((host, port), _PORT_S).close()


def _version_there(address: str) -> str:
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with init_grpc_channel(address) as channel:
        heads = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        request = gcs_service_pb2.CheckAliveRequest()
        return str(heads.CheckAlive(request, timeout=_ANSWER_S).ray_version)
