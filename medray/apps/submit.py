"""Submit a command to a Ray cluster as a job, and follow it to its end.

A job lives on the head. When the head is lost, so are the job and all that Ray knew of
it; KubeRay starts another head, and the command is submitted to that one. Every command
of medray goes on from what it has committed, so nothing is done twice.

`ray job submit` ends where its connection does. Here a lost connection says nothing:
under the same id the job is found again, also by another process after this one.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import shlex
import signal
import sys
import time
import urllib.parse
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from medray.errors import ConfigError, MedrayError, StoppedError, check_positive

log = logging.getLogger(__name__)

# Seconds for an answer, between two tries, and between two signs of life.
_ANSWER_S, _REST_S, _BEAT_S = 30.0, 5.0, 20.0
_CONNECT_S = 10.0
# How often the head may be lost with the job: a job may be what ends it.
_LOSSES = 5
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class Submitted:
    """How a job ended.

    Attributes:
        job: Its id.
        status: SUCCEEDED, FAILED or STOPPED.
        message: What Ray says of it.
        lost: How often it was submitted again because the head was lost.
        code: Exit code of its command; 1 where there is none, or a signal ended it.
    """

    job: str
    status: str
    message: str
    lost: int
    code: int

    def __str__(self) -> str:
        text = f"{self.job} {self.status}, exit code {self.code}"
        if self.lost:
            text += f"; submitted again {self.lost} times, for the head was lost"
        return text if self.status == "SUCCEEDED" else f"{text}: {self.message}"


def submit(
    command: Sequence[str],
    *,
    job: str,
    address: str | None = None,
    wait: float = 1800.0,
    stage: str = "",
) -> Submitted:
    """Submit a command as a job and follow it to its end.

    What the job writes goes to stderr. If a job of this id is there already it is
    followed, not submitted: one id per night makes it one job per night.

    Args:
        command: What the job runs, after --. The head's shell gets the words quoted.
        job: Id of the job; one that is there already is followed.
        address: http://HOST:8265, the cluster's dashboard (RAY_API_SERVER_ADDRESS).
        wait: Seconds that no head may answer before that is given up.
        stage: Metadata `stage` of the job, shown in Ray's dashboard.

    Raises:
        ConfigError: No address, or the head refuses the token or the job.
        MedrayError: No head answers, or it was lost too often.
        StoppedError: SIGTERM or Ctrl-C; the job goes on.
    """
    check_positive(wait=wait)
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", job):
        raise ConfigError(
            f"job: expected an id of letters, digits, dots, - and _; found {job!r}"
        )
    if address is None:
        address = os.environ.get("RAY_API_SERVER_ADDRESS", "")
    check_dashboard_address(address)
    body = {
        "entrypoint": shlex.join(command),
        "submission_id": job,
        "metadata": {"stage": stage} if stage else {},
    }
    return asyncio.run(_until_told(_see_through(address.rstrip("/"), body, wait)))


def check_dashboard_address(address: str) -> None:
    """Check that this is the address of a dashboard: http:// or https://, a host.

    Raises:
        ConfigError: It is not.
    """
    try:
        parts = urllib.parse.urlsplit(address)
        usable = parts.port != 0 and bool(parts.hostname)
    except ValueError:  # a port that is no number, a bracket that is never closed
        usable = False
    known = address.startswith(("http://", "https://"))
    if not (known and usable) or re.search(r"[\s\x00-\x1f?#]", address):
        raise ConfigError(
            f"address: expected the http:// address of a Ray dashboard (port 8265), "
            f"found {address!r:.200}; give --address or RAY_API_SERVER_ADDRESS"
        )


async def _until_told(following: Coroutine[Any, Any, Submitted]) -> Submitted:
    """Follow a job until a signal, which the first process of a pod else ignores."""
    task, told = asyncio.ensure_future(following), list[int]()

    def stop(number: int) -> None:
        told.append(number)
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop, number)
    try:
        return await task
    except asyncio.CancelledError as error:
        said = "no longer followed; a job that was submitted goes on"
        raise StoppedError(told[0], said) from error


def auth_token() -> str:
    """Return the cluster's token from where Ray looks for it; empty if there is none.

    See https://docs.ray.io/en/latest/ray-security/token-auth.html.
    """
    if os.environ.get("RAY_AUTH_MODE") == "disabled":
        return ""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    try:
        return Path(path).expanduser().read_text().strip()
    except OSError:
        return ""


async def _see_through(address: str, body: dict[str, Any], wait: float) -> Submitted:
    token, job = auth_token(), str(body["submission_id"])
    session = aiohttp.ClientSession(
        headers={"Authorization": f"Bearer {token}"} if token else {},
        timeout=aiohttp.ClientTimeout(total=_ANSWER_S, connect=_CONNECT_S),
    )
    there, lost, shown = False, 0, 0
    silent_since: float | None = None
    async with session:
        head = _Head(session, address)
        while True:
            try:
                found = await head.find(job)
                if found is not None and found["status"] in _ENDED:
                    return _result(job, found, lost)
                if found is None and there:
                    there, lost, shown = False, lost + 1, 0
                    log.warning("the head was lost, and %s with it: once more", job)
                    if lost > _LOSSES:
                        raise MedrayError(
                            f"{job}: the head was lost {lost} times while it ran; see "
                            f"why it ends: kubectl describe raycluster"
                        )
                if found is None:
                    await head.start(body)
                    log.info("submitted %s: %s", job, body["entrypoint"])
                elif not there:
                    log.info("%s is there already; following it", job)
                there, silent_since = True, None
                shown = await head.follow(job, shown)
            except _NoAnswerError as error:
                now = time.monotonic()
                if silent_since is None:
                    silent_since = now
                    log.info("%s: no answer (%s); waiting for a head", address, error)
                if now - silent_since >= wait:
                    raise MedrayError(
                        f"{address}: no head has answered for {wait:.0f} s ({error}); "
                        f"see whether its pod runs, then run the same command again"
                    ) from error
                await asyncio.sleep(_REST_S)


def _result(job: str, found: dict[str, Any], lost: int) -> Submitted:
    status, code = found["status"], found.get("driver_exit_code")
    if code is None:
        code = int(status != "SUCCEEDED")
    # A signal that ended the job is none to whoever looks at this process.
    code = code if 0 <= code < 128 else 1
    message = " ".join(str(found.get("message") or "").split())
    return Submitted(job, status, message[:1000], lost, code)


class _NoAnswerError(Exception):
    """There is no head now, or it cannot do what it is asked yet."""


class _Head:
    """The REST interface of Ray's jobs on a head that may go and come again.

    See https://docs.ray.io/en/latest/cluster/running-applications/job-submission/rest.html.
    """

    def __init__(self, session: aiohttp.ClientSession, address: str) -> None:
        self._session, self._address = session, address

    async def find(self, job: str) -> dict[str, Any] | None:
        """Return what is known of a job; None: there is none of this id."""
        status, text = await self._ask("GET", f"/api/jobs/{job}")
        if status == 404:
            return None
        found: dict[str, Any] = json.loads(text)
        return found

    async def start(self, body: dict[str, Any]) -> None:
        """Submit a job.

        Where that fails it may have been taken all the same: look for it again.
        """
        status, text = await self._ask("POST", "/api/jobs/", body)
        if status == 404:
            raise ConfigError(f"{self._address}: takes no jobs ({text[:200]})")

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[int, str]:
        uri = self._address + path
        try:
            async with self._session.request(method, uri, json=body) as answer:
                status, text = answer.status, await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise _NoAnswerError(f"{error}" or type(error).__name__) from error
        if status in (401, 403):
            # Imported here: with it comes Ray, which a submission does without.
            from medray.execution import cluster

            raise ConfigError(f"{uri}: refuses the token; {cluster.TOKEN_ADVICE}")
        if status >= 500:  # the head is there, its agent that starts jobs not yet
            last = text.strip().splitlines()[-1:] or [""]
            raise _NoAnswerError(f"{method}: {status} {last[0][:300]}")
        if status >= 400 and status != 404:
            raise ConfigError(f"{uri}: {text[:500]}")
        return status, text

    async def follow(self, job: str, shown: int) -> int:
        """Print what a job writes, until it ends or the head does.

        Args:
            job: Its submission id.
            shown: Characters that were printed already.

        Returns:
            Characters that are printed now.
        """
        uri = f"{self._address}/api/jobs/{job}/logs/tail"
        skip = shown
        # The dashboard answers pings; a head that vanished does not.
        timeout = aiohttp.ClientWSTimeout(ws_close=_ANSWER_S)
        try:
            async with self._session.ws_connect(
                uri, heartbeat=_BEAT_S, timeout=timeout
            ) as stream:
                async for message in stream:
                    if message.type is not aiohttp.WSMsgType.TEXT:
                        break
                    text = str(message.data)
                    sys.stderr.write(text[skip:])
                    sys.stderr.flush()
                    shown += len(text[skip:])
                    skip = max(0, skip - len(text))
        except (aiohttp.ClientError, TimeoutError) as error:
            log.debug("%s: %s", uri, error)
        await asyncio.sleep(1)
        return shown
