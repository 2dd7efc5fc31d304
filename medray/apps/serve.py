"""A model folder -> an HTTP service on Ray Serve.

The way of a request, top to bottom:

    HTTP      token, type and size are checked, the body goes to a file (serve_app.py)
    read      a thread decodes the image and plans its windows (served.py)
    predict   images that wait are predicted together; one thread has the device
    finish    a thread makes the class with probabilities, or the mask

Each replica holds the model once. How many there are follows the requests under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import ray
from ray import serve as ray_serve
from ray.util.metrics import Counter, Histogram

from medray.apps.serve_app import Bounds, build_api, token_digest
from medray.apps.served import Answer, Format, Kind, Prepared, Served, check_model
from medray.errors import ConfigError, MedrayError, StoppedError, StoreError
from medray.execution import cluster
from medray.execution.signals import Stopping, stopping
from medray.models.config import Precision
from medray.storage import files

log = logging.getLogger(__name__)
T = TypeVar("T")

APP = "medray"
"""What the application is called in Ray Serve."""

TOKEN = "MEDRAY_SERVE_TOKEN"
"""The environment variable of the token that requests must carry."""

_LEAST_TOKEN = 16  # characters
_BATCH = 16  # images that are predicted together, at most
_WAIT_S = 0.005  # for others, when the device is free
_IN_HAND = 8  # images that a replica holds as pixels
_UNDER_WAY = 32  # requests that a replica holds
_WAITING = 128  # requests that wait for one; more get 503
_STUCK = 10  # times the time limit, after which a replica is taken to hang


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What is served, and how; the `args` of a Serve config file.

    Attributes:
        model: Folder of the model.
        report: Of `medray evaluate` of a classifier of images, for its temperature.
        precision: Of the arithmetic.
        min_replicas: That are always there.
        max_replicas: That there are at most.
        cpus: Cores of a replica; 0: shares of the smallest node.
        gpus: GPUs of a replica; -1: one where the cluster has any.
        bounds: Of a request.
        token_file: Holds the token, if the environment does not.
    """

    model: str
    report: str = ""
    precision: Precision = "auto"
    min_replicas: int = 1
    max_replicas: int = 1
    cpus: int = 0
    gpus: int = -1
    bounds: Bounds = field(default_factory=Bounds)
    token_file: str = ""

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"replicas: expected 1 or more, and at most the greatest number, found "
                f"{self.min_replicas} to {self.max_replicas}"
            )


def serve(settings: ServeSettings, *, host: str = "127.0.0.1", port: int = 8000) -> Any:
    """Serve a model until a signal comes.

    Args:
        settings: What and how.
        host: Address to listen at; one that others reach needs a token.
        port: Likewise.

    Raises:
        ConfigError: The request is wrong, there is no model, or the port is taken.
        FormatError: The model is damaged.
        StoppedError: SIGTERM or Ctrl-C; the requests under way were answered.
    """
    digest = _read_token(settings.token_file)
    if not digest and not _is_loopback(host):
        raise ConfigError(
            f"--host {host}: others can reach it, so requests need a token; set "
            f"{TOKEN} to one of {_LEAST_TOKEN} or more characters, or give --token-file"
        )
    settings = replace(
        settings,
        model=files.absolute(settings.model),
        report=files.absolute(settings.report) if settings.report else "",
    )
    _check_free(host, port)
    # What is wrong with the model is said before anything starts.
    kind = check_model(settings.model, settings.report, settings.precision)
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
            if _started(asked):
                _say_ready(settings.model, kind, host, port, token=bool(digest))
            while not asked.signal:
                time.sleep(0.2)
        finally:
            # Replicas finish what they have; the proxy takes nothing more.
            ray_serve.delete(APP)
            ray_serve.shutdown()
    raise StoppedError(asked.signal, "the requests under way were answered")


def _started(asked: Stopping) -> bool:
    """Wait until requests are taken, or a signal comes.

    Raises:
        MedrayError: The replicas do not start.
    """
    while not asked.signal:
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
        args: Of `ServeSettings`, those of `Bounds` beside them; `$NAME` in the places
            is taken from the environment. The token must be there: a cluster's address
            is reached by others.

    Raises:
        ConfigError: They are wrong, or there is no token.
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
    digest = _read_token(settings.token_file)
    if not digest:
        raise ConfigError(f"the environment has no {TOKEN}; set it on every node")
    return _deploy(settings, digest)


def _deploy(settings: ServeSettings, digest: str) -> ray_serve.Application:
    """Say how many replicas there may be, and what each takes."""
    gpus = settings.gpus if settings.gpus >= 0 else min(1, cluster.gpus())
    cpus = settings.cpus or max(1, cluster.cpus_per_node() // settings.max_replicas)
    deployment = ray_serve.deployment(
        name="Endpoint",
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "initial_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": _IN_HAND / 2,
        },
        max_ongoing_requests=_UNDER_WAY,
        max_queued_requests=_WAITING,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        graceful_shutdown_timeout_s=settings.bounds.timeout_s + 5,
        health_check_period_s=5,
    )(_Endpoint)
    app: ray_serve.Application = deployment.bind(settings, digest, cpus)
    return app


@ray_serve.ingress()
class _Endpoint:
    """A replica: the model and the app in front of it."""

    def __init__(self, settings: ServeSettings, digest: str, cpus: int) -> None:
        """Load the model and run it once; requests come when that is done."""
        self._bounds, self._digest = settings.bounds, digest
        self._served = Served(
            settings.model,
            report=settings.report,
            precision=settings.precision,
            max_pixels=int(settings.bounds.max_mpixel * 1e6),
            threads=cpus,
        )
        # Decoding and compressing; the device has a thread to itself.
        self._threads = ThreadPoolExecutor(_IN_HAND, "hand")
        self._device = ThreadPoolExecutor(1, "device")
        self._room = asyncio.Semaphore(_IN_HAND)
        self._since: float | None = None
        self._requests = Counter(
            "medray_serve_requests",
            "Requests, by what came of them.",
            tag_keys=("route", "status"),
        )
        self._seconds = Histogram(
            "medray_serve_seconds",
            "From a request's head to its answer.",
            boundaries=[0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100],
            tag_keys=("route",),
        )
        self._pixels = Counter("medray_serve_pixels", "Pixels of images answered for.")
        self._images = Histogram(
            "medray_serve_batch_images",
            "Images that were predicted together.",
            boundaries=[1, 2, 4, 8, 16],
        )

    def __serve_build_asgi_app__(self) -> Any:
        """Give Ray Serve the app; it calls this once the model is loaded."""
        return build_api(self, self._bounds, self._digest, self._note)

    def check_health(self) -> None:
        """Tell Ray Serve to replace a replica whose device hangs."""
        limit = _STUCK * self._bounds.timeout_s
        if self._since is not None and time.monotonic() - self._since > limit:
            raise RuntimeError(f"a batch has not ended for {limit:g} s")

    @property
    def kind(self) -> Kind:
        """What the model can be asked for."""
        return self._served.kind

    def describe(self) -> dict[str, Any]:
        """Say what the model is."""
        return self._served.describe()

    async def ask(self, path: str, mpp: float | None, form: Format) -> Answer:
        """Answer for an image in a file; see `medray.apps.served`."""
        async with self._room:
            image = await self._by_hand(self._served.read, path, mpp)
            found = await self._predict(image)
            if isinstance(found, MedrayError):
                raise found
            return await self._by_hand(self._served.finish, image, found, form)

    async def _by_hand(self, do: Callable[..., T], *args: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, do, *args)

    @ray_serve.batch(max_batch_size=_BATCH, batch_wait_timeout_s=_WAIT_S)  # type: ignore[untyped-decorator]
    async def _predict(self, images: list[Prepared]) -> list[Any]:
        """Predict what waits: of each image what `finish` takes."""
        self._images.observe(len(images))
        self._since = time.monotonic()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._device, self._served.predict, images
            )
        finally:
            self._since = None

    def _note(self, route: str, status: int, seconds: float, pixels: int) -> None:
        self._requests.inc(tags={"route": route, "status": str(status)})
        self._seconds.observe(seconds, tags={"route": route})
        if pixels:
            self._pixels.inc(pixels)


# --- what is asked for ----------------------------------------------------------------


def _read_token(path: str) -> str:
    """Give the digest of the token; "" if there is none.

    Raises:
        ConfigError: It is too short, or its file cannot be read.
    """
    token = os.environ.get(TOKEN, "")
    if path:
        try:
            token = files.read_bytes(path).decode().strip()
        except (OSError, StoreError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--token-file {path}: cannot be read: {error}"
            ) from error
    if (path or token) and len(token) < _LEAST_TOKEN:
        raise ConfigError(
            f"the token has {len(token)} characters, expected {_LEAST_TOKEN} or more; "
            f'make one with python -c "import secrets; print(secrets.token_urlsafe())"'
        )
    return token_digest(token) if token else ""


def _is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def _check_free(host: str, port: int) -> None:
    """Refuse a port that is taken: Ray Serve would tell it late.

    Raises:
        ConfigError: It is, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen at {host} port {port} ({error.strerror}); give another "
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
    """Give where Ray's nodes export metrics for Prometheus."""
    return [
        f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        for node in ray.nodes()
        if node["Alive"] and node.get("MetricsExportPort")
    ]
