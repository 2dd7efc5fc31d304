"""A run as pages in a browser: a gallery of its slides, and each slide in depth.

The way of a request, top to bottom:

    guard    the host's name, the token, headers that keep pages to themselves
    route    a fixed table; slides are looked up in the run, nothing is made a path
    draw     in a thread: a tile of the slide, its mask or its truth (view_tiles)
    answer   a picture or JSON; what went wrong in words that help

Nothing is ever written.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.resources
import logging
import re
import secrets
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

from medray.apps.view_run import (
    COLORS,
    ViewedRun,
    describe_run,
    describe_slide,
    open_viewed,
    source_of,
    version_of,
)
from medray.apps.view_tiles import (
    TILE,
    UNSURE,
    as_heat,
    as_jpeg,
    as_overlay,
    difference_tile,
    mask_tile,
    open_unchanged,
    probability_tile,
    slide_tile,
    tile_region,
    truth_outlines,
    uncertainty_tile,
    worst_regions,
)
from medray.errors import ConfigError, MedrayError
from medray.evaluation.html import INK
from medray.execution.signals import StoppedError, Stopping, stopping
from medray.slides import read_thumbnail
from medray.storage import files

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.datastructures import MutableHeaders
    from starlette.requests import HTTPConnection, Request
    from starlette.responses import JSONResponse, RedirectResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
except ImportError as error:
    raise ConfigError(
        f"the viewer needs packages that are not here ({error.name}); install "
        f"`medray[view]`"
    ) from error

log = logging.getLogger(__name__)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_THUMBNAIL = 384  # pixels
_LAYERS = ("slide", "mask", "probability", "uncertainty", "difference", "truth")
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# A report has its style and script within itself: it is shown as a stranger's page.
_REPORT_POLICY = (
    "sandbox allow-scripts allow-popups; default-src 'none'; img-src data:; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; frame-ancestors 'none'"
)


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
        report: Folder of a report on it; None: `report` beside it, if it is there.
        truth: Dataset or folder of annotations; None: what the report was made of.
        slides: Folder with the slides, where they were moved.
        host: Address to listen on; any but a loopback one asks for a token.
        port: 0: any that is free.
        token: Ask for a token on loopback too, where others use this machine.
        announce: Told once what is served, and where.

    Raises:
        ConfigError: There is no such run, or the port cannot be had.
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
        _Server(config, asked).run(sockets=[listening])
    if asked.signal:
        raise StoppedError(asked.signal, "nothing was changed")


class _Server(uvicorn.Server):
    """One that also ends by a signal which came before it had its own handlers."""

    def __init__(self, config: uvicorn.Config, asked: Stopping) -> None:
        super().__init__(config)
        self._asked = asked

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self._asked.signal:
            self.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, or asyncio leaves Nagle's algorithm on: 40 ms a tile.
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
    assets = _assets()

    def page(name: str, request: Request) -> Response:
        return _asset(assets, name, request)

    def asset(request: Request) -> Response:
        return _asset(assets, request.path_params["name"], request)

    get = functools.partial(Route, methods=["GET"])
    app = Starlette(
        routes=[
            get("/", _answered(functools.partial(page, "gallery.html"))),
            get("/slide", _answered(functools.partial(page, "slide.html"))),
            get("/static/{name}", _answered(asset)),
            get("/report", _answered(functools.partial(_report, viewed))),
            get("/api/run", _answered(functools.partial(_run, viewed))),
            get("/api/slide", _answered(functools.partial(_slide, viewed))),
            get("/api/worst", _answered(functools.partial(_worst, viewed))),
            get("/thumbnail", _answered(functools.partial(_thumbnail, viewed))),
            get(
                "/tile/{layer}/{zoom:int}/{y:int}/{x:int}",
                _answered(functools.partial(_tile, viewed)),
            ),
        ]
    )
    return _guarded(app, token)


# --- guard ----------------------------------------------------------------------------


def _guarded(app: ASGIApp, token: str) -> ASGIApp:
    """Let in who may come in, and tell browsers to keep pages to themselves."""
    cookie = f"medray_{hashlib.sha256(token.encode()).hexdigest()[:8]}"

    def is_token(said: str) -> bool:
        return secrets.compare_digest(said.encode(), token.encode())

    def refusal(connection: HTTPConnection) -> Response | None:
        if not token:
            # A page elsewhere may have its own name point to this machine.
            host = re.sub(r":\d+$", "", connection.headers.get("host", ""))
            if host.strip("[]").lower() in LOOPBACK:
                return None
            return _error(403, "open it by the address that `medray view` printed")
        if is_token(connection.query_params.get("token", "")):
            rest = parse_qsl(connection.url.query, keep_blank_values=True)
            query = urlencode([(key, value) for key, value in rest if key != "token"])
            # By path alone, and not `//elsewhere`, so that nobody is sent elsewhere.
            path = "/" + connection.url.path.lstrip("/\\")
            answer = RedirectResponse(path + (f"?{query}" if query else ""), 303)
            answer.set_cookie(cookie, token, httponly=True, samesite="lax")
            return answer
        if is_token(connection.cookies.get(cookie, "")):
            return None
        return _error(403, "open the address with ?token=… that `medray view` printed")

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # nothing else is spoken here

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                headers.setdefault("Content-Security-Policy", _POLICY)
                headers.setdefault("Cache-Control", "no-cache")
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers["Cross-Origin-Resource-Policy"] = "same-origin"
                message["headers"] = headers.raw
            await send(message)

        answer = refusal(HTTPConnection(scope)) or app
        await answer(scope, receive, marked)

    return guarded


def _answered(answer: Callable[[Request], Response]) -> Callable[[Request], Any]:
    """Run a route in a thread; say in words what it cannot give."""

    async def endpoint(request: Request) -> Response:
        try:
            return await run_in_threadpool(answer, request)
        except LookupError as error:
            return _error(404, error.args[0])
        except ValueError as error:
            return _error(400, f"{error}")
        except (MedrayError, OSError) as error:
            return _error(409, f"{error}")

    return endpoint


def _error(status: int, said: str) -> Response:
    return JSONResponse({"error": said}, status)


# --- answer ---------------------------------------------------------------------------


def _assets() -> dict[str, tuple[bytes, str]]:
    """Read the pages and what they need: bytes and type by name.

    Raises:
        ConfigError: Leaflet is not installed.
    """
    kinds = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
    found = {
        item.name: item.read_bytes()
        for item in importlib.resources.files("medray.apps")
        .joinpath("static")
        .iterdir()
        if item.is_file()
    }
    try:
        packed = importlib.metadata.files("XStatic-Leaflet") or []
    except importlib.metadata.PackageNotFoundError:
        packed = []
    for file in packed:
        if file.name in ("leaflet.js", "leaflet.css"):
            found[file.name] = file.read_binary()
    if not {"leaflet.js", "leaflet.css"} <= found.keys():
        raise ConfigError("the viewer needs XStatic-Leaflet; install `medray[view]`")
    return {
        name: (data, kinds[name.rpartition(".")[2]])
        for name, data in found.items()
        if name.rpartition(".")[2] in kinds
    }


def _asset(
    assets: dict[str, tuple[bytes, str]], name: str, request: Request
) -> Response:
    if name not in assets:
        raise LookupError(f"there is no {name!r}")
    data, kind = assets[name]
    return _kept(request, data, kind, "no-cache")


def _kept(request: Request, data: bytes, kind: str, cache: str) -> Response:
    """Return bytes by their digest, or only say that the browser has them."""
    tag = f'"{hashlib.blake2b(data, digest_size=12).hexdigest()}"'
    headers = {"ETag": tag, "Cache-Control": cache}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=kind, headers=headers)


def _picture(request: Request, row: dict[str, Any], data: bytes, kind: str) -> Response:
    """Return a picture; one of a finished slide by its version is cached for a day."""
    final = row["status"] == "done" and _asked(request, "v") == version_of(row)
    cache = "private, max-age=86400, immutable" if final else "private, no-cache"
    return _kept(request, data, kind, cache)


def _asked(request: Request, name: str) -> str:
    return request.query_params.get(name, "")


def _report(viewed: ViewedRun, request: Request) -> Response:
    if not viewed.report:
        raise LookupError("there is no report; give --report, or `medray evaluate`")
    data = files.read_bytes(files.join(viewed.report, "report.html"))
    answer = _kept(request, data, "text/html", "no-cache")
    answer.headers["Content-Security-Policy"] = _REPORT_POLICY
    return answer


def _run(viewed: ViewedRun, request: Request) -> Response:
    return JSONResponse(describe_run(viewed))


def _slide(viewed: ViewedRun, request: Request) -> Response:
    row = viewed.row(_asked(request, "slide"))
    return JSONResponse(describe_slide(viewed, row))


def _worst(viewed: ViewedRun, request: Request) -> Response:
    row = viewed.row(_asked(request, "slide"))
    source = source_of(viewed, row)
    if not source.mask or not (source.truth or source.uncertainty):
        raise LookupError(
            "this slide has no mask, or neither a truth to compare it with nor an "
            "uncertainty (infer with --quality)"
        )
    return JSONResponse(worst_regions(source, viewed.settings.classes))


def _thumbnail(viewed: ViewedRun, request: Request) -> Response:
    row = viewed.row(_asked(request, "slide"))
    slide = open_unchanged(source_of(viewed, row))
    pixels, _, _ = read_thumbnail(slide, _THUMBNAIL)
    return _picture(request, row, as_jpeg(pixels), "image/jpeg")


def _tile(viewed: ViewedRun, request: Request) -> Response:
    """Draw one tile; `shown` names the classes, or differences, to be seen."""
    layer = request.path_params["layer"]
    if layer not in _LAYERS:
        raise LookupError(f"there are the layers {', '.join(_LAYERS)}, found {layer!r}")
    zoom, y, x = (request.path_params[name] for name in ("zoom", "y", "x"))
    classes = viewed.settings.classes
    row = viewed.row(_asked(request, "slide"))
    source = source_of(viewed, row)
    region, step = tile_region(source, zoom, y, x)
    shown = _shown(_asked(request, "shown"))
    if layer == "slide":
        pixels = slide_tile(open_unchanged(source), region, step)
        return _picture(request, row, as_jpeg(pixels, side=TILE), "image/jpeg")
    if layer != "truth" and not source.mask:
        raise LookupError("this slide has no mask")
    if layer in ("truth", "difference") and not source.truth:
        raise LookupError("this slide has no truth")
    if layer == "probability":
        if not source.probabilities:
            raise LookupError("the run kept no probabilities; infer with them")
        shares = probability_tile(source, region, step)
        data = as_heat(shares, classes.colors, shown)
    elif layer == "uncertainty":
        if not source.uncertainty:
            raise LookupError("the run kept no uncertainty; infer with --quality")
        data = as_heat(uncertainty_tile(source, region, step)[None], (UNSURE,), {0})
    elif layer == "truth":
        lines = truth_outlines(source, region, step, classes)
        # In the differences the colours of classes have other meanings.
        dark = [INK] * len(classes) if _asked(request, "dark") else classes.colors
        data = as_overlay(lines, dark, shown)
    else:
        if layer == "difference":
            values = difference_tile(source, region, step, classes)
            colors: Sequence[str] = COLORS
        else:
            values, colors = mask_tile(source, region, step), classes.colors
        data = as_overlay(values, colors, shown)
    return _picture(request, row, data, "image/png")


def _shown(text: str) -> set[int]:
    if not re.fullmatch(r"(\d{1,3}(,\d{1,3})*)?", text, re.ASCII):
        raise ValueError(f"shown: expected values such as 1,2, found {text[:40]!r}")
    return {int(part) for part in text.split(",") if part}
