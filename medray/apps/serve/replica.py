"""A replica of a service: the model, its threads, and the app in front of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ray import serve as ray_serve
from ray.util.metrics import Counter, Histogram

from medray.apps.serve.api import build_api
from medray.apps.serve.model import Answer, Format, Kind, Prepared, Served
from medray.apps.serve.settings import ServeSettings
from medray.errors import MedrayError

T = TypeVar("T")

_BATCH = 16  # most images that are predicted together
_WAIT_S = 0.005  # wait for further images when the device is free
IN_HAND = 8  # most images that a replica holds decoded

_STUCK = 10  # of the timeout, after which a replica counts as hanging


@ray_serve.ingress()
class Endpoint:
    """A replica: the model and the app in front of it."""

    def __init__(self, settings: ServeSettings, digest: str, cpus: int) -> None:
        """Load the model and run it once; then requests are accepted."""
        self._bounds, self._digest = settings.bounds, digest
        self._served = Served(
            settings.model,
            report=settings.report,
            precision=settings.precision,
            compile=settings.compile,
            max_pixels=int(settings.bounds.max_mpixel * 1e6),
            threads=cpus,
        )
        # Decoding and compression; the device has its own thread.
        self._threads = ThreadPoolExecutor(IN_HAND, "hand")
        self._device = ThreadPoolExecutor(1, "device")
        self._room = asyncio.Semaphore(IN_HAND)
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
        """Return Ray Serve the app; it calls this once the model is loaded."""
        return build_api(self, self._bounds, self._digest, self._note)

    def check_health(self) -> None:
        """Raise if the device hangs; Ray Serve then replaces the replica."""
        limit = _STUCK * self._bounds.timeout_s
        if self._since is not None and time.monotonic() - self._since > limit:
            raise RuntimeError(f"a batch has not ended for {limit:g} s")

    @property
    def kind(self) -> Kind:
        """Endpoints that the model supports."""
        return self._served.kind

    def describe(self) -> dict[str, Any]:
        """Describe the model."""
        return self._served.describe()

    async def ask(self, path: str, mpp: float | None, form: Format) -> Answer:
        """Return the answer for an image in a file; see `medray.apps.serve.model`."""
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
        """Predict the waiting images; return the input of `finish` for each."""
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
