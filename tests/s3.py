"""A real S3 server on loopback, and a proxy before it that counts and misbehaves."""

import contextlib
import http.client
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

from medray.storage import object_store

EXPIRED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>ExpiredToken</Code>'
    b"<Message>The provided token has expired.</Message></Error>"
)


class Proxy:
    """What lies between medray and the server.

    Attributes:
        fetched: Bytes of objects that were read.
        requests: How many requests came.
        busy: Share of the requests that are answered with 503.
        delay: Seconds that each request waits.
        closed: Objects whose path ends like this are answered with 403.
        expired: Every request is answered as one with an expired token.
    """

    def __init__(self, host: str, port: int, seed: int = 0) -> None:
        self.fetched = self.requests = 0
        self.busy, self.delay, self.expired = 0.0, 0.0, False
        self.closed = ""
        self._random = Random(seed)
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def _body(self) -> bytes | None:
                if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                    length = int(self.headers.get("Content-Length") or 0)
                    return self.rfile.read(length) if length else None
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                while self.rfile.readline().strip():  # trailers
                    pass
                return body

            def _pass(self) -> None:
                passed_on = {
                    key: value
                    for key, value in self.headers.items()
                    if key.lower() not in ("transfer-encoding", "expect")
                }
                status, headers, answer = proxy._answer(
                    self.command, self.path, passed_on, self._body(), (host, port)
                )
                self.send_response_only(status)
                for key, value in headers:
                    if key.lower() not in ("content-length", "transfer-encoding"):
                        self.send_header(key, value)
                if self.command == "HEAD":
                    sizes = [v for k, v in headers if k.lower() == "content-length"]
                    self.send_header("Content-Length", sizes[0] if sizes else "0")
                else:
                    self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                if self.command != "HEAD":
                    with contextlib.suppress(ConnectionError):  # it did not wait
                        self.wfile.write(answer)

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _pass  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _answer(
        self, command: str, path: str, headers: dict, body: bytes | None, to: tuple
    ) -> tuple[int, list, bytes]:
        with self._lock:
            self.requests += 1
            refused = self._random.random() < self.busy
        time.sleep(self.delay)
        if self.expired:
            return 400, [("Content-Type", "application/xml")], EXPIRED
        if self.closed and path.endswith(self.closed):
            return 403, [], b"<Error><Code>AccessDenied</Code></Error>"
        if refused:
            return 503, [], b"<Error><Code>SlowDown</Code></Error>"
        connection = http.client.HTTPConnection(*to, timeout=60)
        try:
            connection.request(command, path, body, headers)
            response = connection.getresponse()
            data = response.read()
        except OSError:  # the server has gone
            return 502, [], b""
        finally:
            connection.close()
        if command == "GET" and "list-type" not in path:
            with self._lock:
                self.fetched += len(data)
        return response.status, response.getheaders(), data

    def heal(self) -> None:
        self.busy, self.delay, self.expired = 0.0, 0.0, False
        self.closed = ""

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


KEY, SECRET = "AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI-K7MDENG-bPxRfiCYEXAMPLEKEY"


@contextlib.contextmanager
def serving() -> Iterator[tuple[Proxy, dict[str, str]]]:
    """Serve S3; give the proxy and the environment that leads to it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    proxy = Proxy(host, port)
    environment = {
        "AWS_ENDPOINT_URL": proxy.endpoint,
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }
    connection = http.client.HTTPConnection(host, port)
    connection.request("PUT", "/bucket")
    assert connection.getresponse().status == 200
    connection.close()
    object_store._bucket.cache_clear()  # of a server that was there before
    yield proxy, environment
    object_store._bucket.cache_clear()
    proxy.close()
    server.stop()
