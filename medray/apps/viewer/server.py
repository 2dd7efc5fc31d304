"""A run as pages in a browser: a gallery of its slides, and each slide in depth.

The way of a request, top to bottom:

    guard    the host's name, the token, headers that keep pages to themselves (guard)
    route    a fixed table; slides are looked up in the run, nothing is made a path
    draw     in a thread: a tile of the slide (tiles), its mask or its truth (layers)
    answer   a picture or JSON (answers); what went wrong in words that help

Nothing is ever written.
"""

from __future__ import annotations

import functools
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from medray.apps.viewer.answers import (
    asset_response,
    read_assets,
    report_response,
    run_response,
    slide_response,
    thumbnail_response,
    tile_response,
    worst_response,
)
from medray.apps.viewer.guard import LOOPBACK, error_response, guarded_app
from medray.apps.viewer.run import ViewedRun, open_viewed
from medray.errors import ConfigError, MedrayError, StoppedError
from medray.execution import stopping


@dataclass(frozen=True)
class Viewing:
    """What is being served.

    Attributes:
        url: To open in a browser; with the token where one is needed.
        run: Folder of the run.
        report: Folder of the report; empty without.
        truth: Where the truth lies; empty when unknown.
        slides: How many the run has so far.
    """

    url: str
    run: str
    report: str
    truth: str
    slides: int

    def __str__(self) -> str:
        report = self.report or "none; give --report to see it"
        truth = self.truth or "none; give --truth to see it"
        return (
            f"run     {self.run} ({self.slides} slides)\n"
            f"report  {report}\n"
            f"truth   {truth}\n"
            f"open    {self.url}\n"
            f"Ctrl-C ends it"
        )


def view(
    run: str,
    *,
    report: str | None = None,
    truth: str | None = None,
    slides: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: bool = False,
    announce: Callable[[Viewing], None] = lambda _: None,
) -> None:
    """Serve a run until a signal ends it.

    Args:
        run: Folder of a run, as `medray infer` writes it; it may be half done.
        report: Folder of its report (`report` next to the run, if it is there).
        truth: Dataset or folder of annotations (what the report was made of).
        slides: Folder that the slides were moved to.
        host: Address to listen on; any but a loopback one asks for a token.
        port: Port to listen on (0: any that is free).
        token: Ask for a token on loopback too, where others use this machine.
        announce: Receives once what is served, and where.

    Raises:
        ConfigError: There is no such run, or the port is not available.
        StoppedError: A signal ended it.
    """
    viewed = open_viewed(run, report=report, truth=truth, slides=slides)
    secret = secrets.token_urlsafe(24) if token or host not in LOOPBACK else ""
    listening = _listen(host, port)
    name = f"[{host}]" if ":" in host else host
    url = f"http://{name}:{listening.getsockname()[1]}/"
    url += f"?token={secret}" if secret else ""
    app = build_app(viewed, token=secret)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        timeout_graceful_shutdown=2,
    )
    count = len(viewed.rows())
    with stopping() as asked, listening:
        announce(Viewing(url, viewed.uri, viewed.report, viewed.truth, count))
        _Server(config, lambda: asked.signal).run(sockets=[listening])
    if asked.signal:
        raise StoppedError(asked.signal, "nothing was changed")


class _Server(uvicorn.Server):
    """One that also ends by a signal which came before it had its own handlers."""

    def __init__(self, config: uvicorn.Config, is_asked: Callable[[], int]) -> None:
        super().__init__(config)
        self._is_asked = is_asked

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self._is_asked():
            self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, or asyncio leaves Nagle's algorithm on: 40 ms per tile.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(128)
        return listening
    except (OSError, OverflowError) as error:
        listening.close()
        raise ConfigError(
            f"cannot listen on {host}, port {port} ({error}); choose another --port, "
            f"or 0 for any that is free"
        ) from error


def build_app(viewed: ViewedRun, *, token: str = "") -> ASGIApp:
    """Build the application: pages, what they ask for, and the guard around it.

    Args:
        viewed: The run.
        token: What a browser must have shown once; empty: only names of this machine
            are answered.
    """
    assets = read_assets()

    def page(name: str, request: Request) -> Response:
        return asset_response(assets, name, request)

    def asset(request: Request) -> Response:
        return asset_response(assets, request.path_params["name"], request)

    get = functools.partial(Route, methods=["GET"])
    app = Starlette(
        routes=[
            get("/", _answered(functools.partial(page, "gallery.html"))),
            get("/slide", _answered(functools.partial(page, "slide.html"))),
            get("/static/{name}", _answered(asset)),
            get("/report", _answered(functools.partial(report_response, viewed))),
            get("/api/run", _answered(functools.partial(run_response, viewed))),
            get("/api/slide", _answered(functools.partial(slide_response, viewed))),
            get("/api/worst", _answered(functools.partial(worst_response, viewed))),
            get("/thumbnail", _answered(functools.partial(thumbnail_response, viewed))),
            get(
                "/tile/{layer}/{zoom:int}/{y:int}/{x:int}",
                _answered(functools.partial(tile_response, viewed)),
            ),
        ]
    )
    return guarded_app(app, token)


def _answered(answer: Callable[[Request], Response]) -> Callable[[Request], Any]:
    """Run a route in a thread; answer errors in words."""

    async def endpoint(request: Request) -> Response:
        try:
            return await run_in_threadpool(answer, request)
        except LookupError as error:
            return error_response(404, error.args[0])
        except ValueError as error:
            return error_response(400, f"{error}")
        except (MedrayError, OSError) as error:
            return error_response(409, f"{error}")

    return endpoint
