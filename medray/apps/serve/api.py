"""The HTTP side of `medray serve`: what comes in is bounded, what goes out helps.

POST /classify or /segment takes an image as the body and its content type; whatever is
wrong with a request is said by a status of 4xx and JSON with a `detail`: what was
found, what was expected, what to do.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import importlib.metadata
import logging
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from medray.apps.serve.model import (
    SUFFIXES,
    Answer,
    Format,
    Kind,
    TooLargeError,
    image_format,
)
from medray.errors import SlideError
from medray.slides.base import SANE_MPP
from medray.slides.resolution import MOST_ENLARGED

log = logging.getLogger(__name__)

# Content types by format; octet-stream leaves it to the bytes.
_TYPES = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/bmp": "BMP",
    "image/tiff": "TIFF",
    "application/octet-stream": "",
}
_BEARER = HTTPBearer(auto_error=False, description="the token of `medray serve`")


class Model(Protocol):
    """What answers; see `medray.apps.serve.model.Served`."""

    @property
    def kind(self) -> Kind:
        """What it can be asked for."""
        ...

    def describe(self) -> dict[str, Any]:
        """Say what the model is."""
        ...

    async def ask(self, path: str, mpp: float | None, form: Format) -> Answer:
        """Answer for an image in a file."""
        ...


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What a request may cost.

    Attributes:
        max_mpixel: Megapixels of an image.
        max_mbyte: Megabytes of a body.
        timeout_s: Seconds from a request's head to its answer.
    """

    max_mpixel: float = 64.0
    max_mbyte: float = 256.0
    timeout_s: float = 120.0


class Problem(BaseModel):
    """Why a request was refused, and what to do."""

    detail: str


class Health(BaseModel):
    """That the service is there."""

    status: Literal["ok"]


class Class(BaseModel):
    """The class of an image."""

    name: str = Field(alias="class", description="the likeliest class")
    label: int = Field(description="its label value", ge=0)
    probabilities: dict[str, float] = Field(description="by class, they sum to one")
    temperature: float | None = Field(description="of the calibration; null: none")
    height: int = Field(description="of the image, pixels", ge=1)
    width: int = Field(description="of the image, pixels", ge=1)
    mpp: float | None = Field(description="microns per pixel of the image")
    mpp_from: Literal["image", "request", "unknown"]
    note: str = Field(description="what was done to come to the model's resolution")
    model_digest: str


class About(BaseModel):
    """The model that is served, and what it takes."""

    name: str
    digest: str
    architecture: str
    encoder: str
    endpoint: str = Field(description="the one that works with this model")
    classes: list[str] = Field(description="names by label value")
    mpp: float | None = Field(description="microns per pixel that it works at")
    window: int = Field(description="side of its input, pixels")
    stride: int = Field(description="between neighbouring windows, pixels")
    temperature: float | None
    max_mpixel: float
    max_mbyte: float
    timeout_s: float


def token_digest(token: str) -> str:
    """Name a token without telling it."""
    return hashlib.sha256(token.encode()).hexdigest()


def build_api(
    model: Model,
    bounds: Bounds,
    digest: str = "",
    note: Callable[[str, int, float, int], None] = lambda *_: None,
) -> FastAPI:
    """Build the app of one replica.

    Args:
        model: Answers.
        bounds: Of a request.
        digest: `token_digest` of the token that requests must carry; "": none.
        note: Is told each request's path, status, seconds and pixels, for metrics.
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
    refusals = _problems(401) if digest else {}
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

    # A replica gets requests once its model is loaded and has run, so to answer at all
    # is to be ready.
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
                    path = await _receive(request, folder, bounds)
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
        # Coarser ones cannot be brought to the model's.
        le=MOST_ENLARGED * works_at if works_at else SANE_MPP[1],
        description="microns per pixel, over what the image says",
    )
    posted: dict[str, Any] = {
        "openapi_extra": {"requestBody": _body()},
        "responses": refusals | _problems(400, 409, 413, 415, 422, 503, 504),
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
    """Ask the model, and say what it refuses without naming the file here."""
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


# --- what comes in --------------------------------------------------------------------


async def _receive(request: Request, folder: str, bounds: Bounds) -> str:
    """Write the body of a request to a file named by its format.

    Raises:
        HTTPException: It is too large, no image, or not what its type says.
    """
    stated = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    expected = ", ".join(_TYPES)
    if stated not in _TYPES:
        raise HTTPException(
            415,
            f"content type: expected one of {expected}, found {stated[:80] or 'none'}; "
            f"send the image itself as the body, with its type",
        )
    most = int(bounds.max_mbyte * 1e6)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > most:
        raise _too_long(length, most)
    received, start = 0, b""
    place = os.path.join(folder, "body")
    try:
        with open(place, "wb") as file:
            async for chunk in request.stream():
                received += len(chunk)
                if received > most:
                    raise _too_long(f"more than {most}", most)
                start = (start + chunk)[:8] if len(start) < 8 else start
                file.write(chunk)
    except ClientDisconnect:
        raise HTTPException(
            400, f"the body ended after {received} bytes; send it whole"
        ) from None
    except OSError as error:
        raise HTTPException(
            503, f"the image cannot be kept here ({error.strerror}); try again later"
        ) from error
    found = image_format(start)
    if found is None:
        raise HTTPException(
            422,
            f"the body ({received} bytes) is no PNG, JPEG, BMP or TIFF image; send the "
            f"image file itself, for example with curl --data-binary @FILE",
        )
    if _TYPES[stated] not in ("", found):
        raise HTTPException(
            415, f"the content type says {stated}, the body is {found}; correct one"
        )
    path = os.path.join(folder, f"image{SUFFIXES[found]}")
    os.rename(place, path)
    return path


def _too_long(found: str, most: int) -> HTTPException:
    return HTTPException(
        413,
        f"the body has {found} bytes, at most {most} are taken; send a smaller image, "
        f"or give it to `medray infer`",
        # The connection stays: what still comes is thrown away, and the answer is read.
    )


# --- what is said of it ---------------------------------------------------------------


def _body() -> dict[str, Any]:
    """Describe the body of a request for OpenAPI."""
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "required": True,
        "description": "the image file itself",
        "content": dict.fromkeys(_TYPES, binary),
    }


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    said = {
        400: "the body ended too early",
        401: "no token, or a wrong one",
        409: "the model does something else",
        413: "too many bytes or pixels",
        415: "another content type",
        422: "no image, a damaged one, one that does not suit the model, a wrong query",
        503: "too many requests at a time, or no place for the image",
        504: "it took too long",
    }
    return {
        status: {"model": Problem, "description": said[status]} for status in statuses
    }
