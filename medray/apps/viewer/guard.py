"""Access control of the viewer's pages, and security headers for browsers."""

from __future__ import annotations

import hashlib
import re
import secrets
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def guarded_app(app: ASGIApp, token: str) -> ASGIApp:
    """Wrap an app with access control, and with headers that keep pages private."""
    cookie = f"medray_{hashlib.sha256(token.encode()).hexdigest()[:8]}"

    def is_token(said: str) -> bool:
        return secrets.compare_digest(said.encode(), token.encode())

    def refusal(connection: HTTPConnection) -> Response | None:
        if not token:
            # A page elsewhere may have its own name point to this machine.
            host = re.sub(r":\d+$", "", connection.headers.get("host", ""))
            if host.strip("[]").lower() in LOOPBACK:
                return None
            return error_response(
                403, "open it by the address that `medray view` printed"
            )
        if is_token(connection.query_params.get("token", "")):
            rest = parse_qsl(connection.url.query, keep_blank_values=True)
            query = urlencode([(key, value) for key, value in rest if key != "token"])
            # By path alone, and not `//elsewhere`: the redirect stays on this host.
            path = "/" + connection.url.path.lstrip("/\\")
            answer = RedirectResponse(path + (f"?{query}" if query else ""), 303)
            answer.set_cookie(cookie, token, httponly=True, samesite="lax")
            return answer
        if is_token(connection.cookies.get(cookie, "")):
            return None
        return error_response(
            403, "open the address with ?token=… that `medray view` printed"
        )

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


def error_response(status: int, said: str) -> Response:
    """Return an error as JSON."""
    return JSONResponse({"error": said}, status)
