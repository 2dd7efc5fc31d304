"""Serve a model folder over HTTP, on Ray Serve.

The path of a request, top to bottom:

    HTTP      token, type and size are checked, the body goes to a file (api.py)
    read      a thread decodes the image and plans its windows (model.py)
    predict   images that wait are predicted together; one thread has the device
    finish    a thread makes the class with probabilities, or the mask

Each replica holds the model once. Ray Serve scales replicas by the requests in flight.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import serve as ray_serve

from medray.apps.serve.model import Kind, check_model
from medray.apps.serve.replica import IN_HAND, Endpoint
from medray.apps.serve.requests import Bounds
from medray.apps.serve.settings import LEAST_TOKEN, TOKEN, ServeSettings, read_token
from medray.errors import ConfigError, MedrayError, StoppedError
from medray.execution import cluster, stopping
from medray.models import Compile, Precision
from medray.storage import files

log = logging.getLogger(__name__)

APP = "medray"
"""Name of the application in Ray Serve."""

_UNDER_WAY = 32  # requests that a replica holds
_WAITING = 128  # requests that wait for one; more get 503


def serve(
    model: str,
    *,
    report: str = "",
    host: str = "127.0.0.1",
    port: int = 8000,
    replicas: tuple[int, int] = (1, 1),
    max_mpixel: float = 64.0,
    max_mbyte: float = 256.0,
    timeout_s: float = 120.0,
    token_file: str = "",
    precision: Precision = "auto",
    compile: Compile = "auto",
) -> Any:
    """Serve a model over HTTP until a signal comes.

    Args:
        model: Folder of a model, from `medray train` or `medray export`.
        report: Report of a classifier, from `medray evaluate`: use its temperature.
        host: Address to listen on. One that others reach needs a token.
        port: Port to listen on.
        replicas: Least and most copies of the model, as many as the requests need.
        max_mpixel: Largest image, megapixels.
        max_mbyte: Largest body of a request, megabytes.
        timeout_s: Timeout of an answer, seconds.
        token_file: File of the token that requests must carry, unless
            MEDRAY_SERVE_TOKEN has it.
        precision: Precision of the model's arithmetic.
        compile: Compile the network for the device; auto: for a GPU.

    Raises:
        ConfigError: The request is wrong, there is no model, or the port is taken.
        FormatError: The model is damaged.
        StoppedError: SIGTERM or Ctrl-C; the requests under way were answered.
    """
    settings = ServeSettings(
        model=files.absolute(model),
        report=files.absolute(report) if report else "",
        precision=precision,
        compile=compile,
        min_replicas=replicas[0],
        max_replicas=replicas[1],
        bounds=Bounds(max_mpixel=max_mpixel, max_mbyte=max_mbyte, timeout_s=timeout_s),
        token_file=token_file,
    )
    digest = read_token(settings.token_file)
    if not digest and not _is_loopback(host):
        raise ConfigError(
            f"--host {host}: others can reach it, so requests need a token; set "
            f"{TOKEN} to one of {LEAST_TOKEN} or more characters, or give --token-file"
        )
    _check_free(host, port)
    # Errors of the model are reported before anything starts.
    kind = check_model(
        settings.model, settings.report, settings.precision, settings.compile
    )
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    cluster.connect()
    target = ray_serve.RunTarget(_deploy(settings, digest), APP, "/")
    ray_serve.start(
        proxy_location="HeadOnly",
        http_options={"host": host, "port": port},
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )
    with stopping() as asked:  # Ray has handlers of its own, which these replace
        try:
            ray_serve.run_many([target], wait_for_applications_running=False)
            if _started(lambda: asked.signal):
                _say_ready(settings.model, kind, host, port, token=bool(digest))
            while not asked.signal:
                time.sleep(0.2)
        finally:
            # Replicas finish their requests; the proxy accepts no new ones.
            ray_serve.delete(APP)
            ray_serve.shutdown()
    raise StoppedError(asked.signal, "the requests under way were answered")


def _started(is_asked: Callable[[], int]) -> bool:
    """Wait until requests are accepted, or a signal arrives.

    Raises:
        MedrayError: The replicas do not start.
    """
    while not is_asked():
        app = ray_serve.status().applications[APP]
        if app.status == "RUNNING":
            return True
        if app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise MedrayError(f"the service did not start: {app.message}")
        time.sleep(0.2)
    return False


def build_app(args: dict[str, Any]) -> ray_serve.Application:
    """Build the application of a Serve config file, as Kubernetes has one.

    Args:
        args: Fields of `ServeSettings` and of `Bounds` together; `$NAME` in paths is
            taken from the environment. A token is required: others reach a cluster's
            address.

    Raises:
        ConfigError: The arguments are wrong, or there is no token.
    """
    names = Bounds.__dataclass_fields__
    try:
        bounds = Bounds(**{key: args[key] for key in names if key in args})
        others = {key: value for key, value in args.items() if key not in names}
        for key in {"model", "report", "token_file"} & set(others):
            others[key] = os.path.expandvars(others[key])
        settings = ServeSettings(**others, bounds=bounds)
    except TypeError as error:
        raise ConfigError(f"args of the Serve config: {error}") from error
    digest = read_token(settings.token_file)
    if not digest:
        raise ConfigError(f"the environment has no {TOKEN}; set it on every node")
    return _deploy(settings, digest)


def _deploy(settings: ServeSettings, digest: str) -> ray_serve.Application:
    """Return the application, with the range and resources of its replicas."""
    gpus = settings.gpus if settings.gpus >= 0 else min(1, cluster.gpus())
    cpus = settings.cpus or max(1, cluster.cpus_per_node() // settings.max_replicas)
    deployment = ray_serve.deployment(
        name="Endpoint",
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "initial_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": IN_HAND / 2,
        },
        max_ongoing_requests=_UNDER_WAY,
        max_queued_requests=_WAITING,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=settings.bounds.timeout_s + 5,
        health_check_period_s=5,
    )(Endpoint)
    app: ray_serve.Application = deployment.bind(settings, digest, cpus)
    return app


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _check_free(host: str, port: int) -> None:
    """Refuse a port that is in use, earlier than Ray Serve would.

    Raises:
        ConfigError: It is in use, or the host is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot listen at {host} port {port} ({error}); give another "
                f"--port or --host"
            ) from error


def _say_ready(model: str, kind: Kind, host: str, port: int, *, token: bool) -> None:
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    extra = f' -H "Authorization: Bearer ${TOKEN}"' if token else ""
    log.info("ready  %s serves %s", url, model)
    log.info(
        "try    curl --data-binary @IMAGE.png -H 'Content-Type: image/png'%s "
        "%s/%s --output ANSWER",
        extra,
        url,
        kind,
    )
    for address in _metrics():
        log.info("metrics  %s", address)


def _metrics() -> Sequence[str]:
    """Return the addresses where Ray's nodes export metrics for Prometheus."""
    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node.get("MetricsExportPort")
    ]
