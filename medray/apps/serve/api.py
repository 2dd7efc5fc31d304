"""The HTTP side of `medray serve`: limits on requests, errors that say what to do.

POST /classify or /segment takes an image as the body, with its content type. A wrong
request is answered by status 4xx and JSON with a `detail`: what was found, what was
expected, what to do.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import importlib.metadata
import logging
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Protocol

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException

from medray.apps.serve.images import TooLargeError
from medray.apps.serve.model import Answer, Format, Kind
from medray.apps.serve.requests import Bounds, receive
from medray.apps.serve.schema import (
    About,
    Class,
    Health,
    describe_body,
    describe_problems,
)
from medray.errors import SlideError
from medray.slides import MOST_ENLARGED, SANE_MPP

log = logging.getLogger(__name__)

_BEARER = HTTPBearer(auto_error=False, description="the token of `medray serve`")


class Model(Protocol):
    """A model that answers requests; see `medray.apps.serve.model.Served`."""

    @property
    def kind(self) -> Kind:
        """Endpoints that it supports."""
        ...

    def describe(self) -> dict[str, Any]:
        """Describe the model."""
        ...

    async def ask(self, path: str, mpp: float | None, form: Format) -> Answer:
        """Return the answer for an image in a file."""
        ...


def token_digest(token: str) -> str:
    """Return a token's digest, which does not reveal it."""
    return hashlib.sha256(token.encode()).hexdigest()


def build_api(
    model: Model,
    bounds: Bounds,
    digest: str = "",
    note: Callable[[str, int, float, int], None] = lambda *_: None,
) -> FastAPI:
    """Build the app of one replica.

    Args:
        model: The model that answers.
        bounds: Limits of a request.
        digest: `token_digest` of the token that requests must carry; "": none.
        note: Callback for metrics: each request's path, status, seconds, pixels.
    """
    api = FastAPI(
        title="medray",
        version=importlib.metadata.version("medray"),
        summary="Classes and masks of pathology images.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
    )

    def check_token(
        given: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
    ) -> None:
        found = token_digest(given.credentials) if given else ""
        if not hmac.compare_digest(found, digest):
            what = "a token that is not the service's" if given else "no token"
            raise HTTPException(
                401,
                f"found {what}; send the header 'Authorization: Bearer TOKEN' with the "
                f"token that the service was started with",
                {"WWW-Authenticate": "Bearer"},
            )

    closed: dict[str, Any] = {}
    refusals = describe_problems(401) if digest else {}
    if digest:
        closed["dependencies"] = [Depends(check_token)]

    @api.middleware("http")
    async def counted(request: Request, call: Callable[..., Awaitable[Any]]) -> Any:
        start, status = time.perf_counter(), 500
        try:
            response = await call(request)
            status = response.status_code
            return response
        finally:
            path = getattr(request.scope.get("route"), "path", "other")
            pixels = getattr(request.state, "pixels", 0)
            note(path, status, time.perf_counter() - start, pixels)

    @api.get("/healthz", summary="Is the process there?")
    async def healthz() -> Health:
        return Health(status="ok")

    # A replica gets requests once its model is loaded and has run, so any answer means
    # that it is ready.
    @api.get("/readyz", summary="Is a model loaded?")
    async def readyz() -> Health:
        return Health(status="ok")

    @api.get("/model", summary="What is served", responses=refusals, **closed)
    async def about() -> About:
        return About(
            **model.describe(),
            max_mpixel=bounds.max_mpixel,
            max_mbyte=bounds.max_mbyte,
            timeout_s=bounds.timeout_s,
        )

    async def answer(
        kind: Kind, request: Request, mpp: float | None, form: Format = "png"
    ) -> Response:
        if model.kind != kind:
            name = model.describe()["name"]
            raise HTTPException(
                409,
                f"the model {name} cannot {kind}: it is there to {model.kind}; POST "
                f"the image to /{model.kind}",
            )
        try:
            async with asyncio.timeout(bounds.timeout_s):
                with tempfile.TemporaryDirectory(prefix="medray-") as folder:
                    path = await receive(request, folder, bounds)
                    found = await _ask(model, path, mpp, form)
        except TimeoutError:
            raise HTTPException(
                504,
                f"no answer within {bounds.timeout_s:g} s; send a smaller image, send "
                f"it faster, or start `medray serve` with a longer --timeout-s",
            ) from None
        request.state.pixels = found.pixels
        return Response(found.body, media_type=found.media_type, headers=found.headers)

    works_at = model.describe()["mpp"]
    asked_mpp: Any = Query(
        None,
        ge=SANE_MPP[0],
        # A coarser image cannot be brought to the model's resolution.
        le=MOST_ENLARGED * works_at if works_at else SANE_MPP[1],
        description="microns per pixel, over what the image says",
    )
    posted: dict[str, Any] = {
        "openapi_extra": {"requestBody": describe_body()},
        "responses": refusals | describe_problems(400, 409, 413, 415, 422, 503, 504),
    }

    @api.post(
        "/classify",
        summary="An image's class and its probabilities",
        response_model=Class,
        **closed,
        **posted,
    )
    async def classify(request: Request, mpp: float | None = asked_mpp) -> Response:
        return await answer("classify", request, mpp)

    masks = {
        "description": "the label of each pixel of the image, or its objects",
        "content": {
            "image/png": {"schema": {"type": "string", "format": "binary"}},
            "application/geo+json": {"schema": {"type": "object"}},
        },
        "headers": {
            name: {"description": what, "schema": {"type": "string"}}
            for name, what in (
                ("medray-model", "digest of the model"),
                ("medray-mpp", "microns per pixel of the image, or unknown"),
                ("medray-mpp-from", "image, request or unknown"),
                ("medray-note", "what was done to come to the model's resolution"),
            )
        },
    }

    @api.post(
        "/segment",
        summary="An image's mask",
        response_class=Response,
        **closed,
        **(posted | {"responses": posted["responses"] | {200: masks}}),
    )
    async def segment(
        request: Request, mpp: float | None = asked_mpp, format: Format = "png"
    ) -> Response:
        return await answer("segment", request, mpp, format)

    @api.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        detail = error.detail
        if error.status_code == 404:
            detail = f"there is no {request.url.path}; see /openapi.json"
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another")
            detail = f"found {request.method}, expected {allowed}; see /openapi.json"
        return JSONResponse({"detail": detail}, error.status_code, error.headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        said = "; ".join(
            f"{one['loc'][-1]}: {one['msg']}, found {one['input']!r:.80}"
            for one in error.errors()
        )
        return JSONResponse({"detail": said}, 422)

    @api.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        log.exception("serve: a request failed", exc_info=error)
        detail = f"medray failed ({type(error).__name__}); the replica's log says more"
        return JSONResponse({"detail": detail}, 500)

    return api


async def _ask(model: Model, path: str, mpp: float | None, form: Format) -> Answer:
    """Ask the model; its errors go to the client without the name of the local file."""
    try:
        return await model.ask(path, mpp, form)
    except SlideError as error:
        said = f"{error}".replace(f"{path}: ", "").replace(path, "the image")
        status = 413 if isinstance(error, TooLargeError) else 422
        raise HTTPException(status, said.replace("--mpp", "?mpp=")) from error
    except MemoryError as error:
        raise HTTPException(
            413, "decoding it takes more memory than there is; send a smaller image"
        ) from error
