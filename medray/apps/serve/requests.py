"""Write the body of a request to a file, with the suffix of its format."""

from __future__ import annotations

import os
from dataclasses import dataclass

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from medray.apps.serve.images import START, SUFFIXES, image_format
from medray.errors import check_positive

# Content types by format; for octet-stream the first bytes decide.
CONTENT_TYPES = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/bmp": "BMP",
    "image/tiff": "TIFF",
    "image/webp": "WebP",
    "image/gif": "GIF",
    "application/octet-stream": "",
}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Limits of a request.

    Attributes:
        max_mpixel: Most megapixels of an image.
        max_mbyte: Most megabytes of a body.
        timeout_s: Timeout from a request's headers to its answer, seconds.
    """

    max_mpixel: float = 64.0
    max_mbyte: float = 256.0
    timeout_s: float = 120.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive(
            max_mpixel=self.max_mpixel,
            max_mbyte=self.max_mbyte,
            timeout_s=self.timeout_s,
        )


async def receive(request: Request, folder: str, bounds: Bounds) -> str:
    """Write the body of a request to a file with the suffix of its format.

    Raises:
        HTTPException: It is too large, not an image, or not of its content type.
    """
    stated = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    expected = ", ".join(CONTENT_TYPES)
    if stated not in CONTENT_TYPES:
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
                start = (start + chunk)[:START] if len(start) < START else start
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
            f"the body ({received} bytes) is no PNG, JPEG, BMP, TIFF, WebP or GIF; "
            f"send the image file itself, for example with curl --data-binary @FILE",
        )
    if CONTENT_TYPES[stated] not in ("", found):
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
        # Keep the connection and discard the rest of the body: the client reads the
        # answer only then.
    )
