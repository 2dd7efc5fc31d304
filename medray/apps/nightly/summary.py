"""The summary of a night: summary.html for people, summary.json for programs."""

from __future__ import annotations

import json
import logging
import urllib.parse
import urllib.request
from http.client import HTTPException
from typing import Any

from medray.apps.nightly.drift import Drift, as_text
from medray.errors import ConfigError
from medray.evaluation import render
from medray.storage import files

log = logging.getLogger(__name__)

_MAX_ROWS = 500  # slides in a table of the page; summary.json has them all
_WEBHOOK_S = 10.0


def write_summary(folder: str, summary: dict[str, Any]) -> None:
    """Write both; the JSON last: with it a night is committed.

    Args:
        folder: Of the night.
        summary: As medray.apps.nightly.finish gathers it.
    """
    slides = summary["slides"]
    by_status = {
        status: [slide for slide in slides if slide["status"] == status]
        for status in ("done", "failed", "given up", "quarantined")
    }
    start = f"nights/{summary['night']}/"
    page = render(
        "night.html.jinja",
        title=f"Night {summary['night']}",
        summary=summary,
        done=by_status["done"][:_MAX_ROWS],
        done_count=len(by_status["done"]),
        failed=by_status["failed"],
        given_up=by_status["given up"],
        quarantined=by_status["quarantined"],
        poor=[slide for slide in slides if slide["flagged"]],
        values=sorted({name for slide in slides for name in slide["values"]}),
        flagged=[as_text(Drift(**one)) for one in summary["drift"] if one["flagged"]],
        outliers=sorted({name for one in summary["drift"] for name in one["outliers"]}),
        links={
            slide["file"]: slide["mask"].removeprefix(start)
            for slide in by_status["done"]
        },
    )
    files.write_bytes(files.join(folder, "summary.html"), page.encode())
    files.write_json(files.join(folder, "summary.json"), summary)


def check_webhook(address: str) -> None:
    """Check that a webhook's address is one.

    Raises:
        ConfigError: It is not. The address is not named: it may hold a secret.
    """
    parts = urllib.parse.urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError("webhook: expected http:// or https:// and a host")


def send_summary(webhook: str | None, summary: dict[str, Any]) -> None:
    """POST a summary; the night does not fail if it is not delivered."""
    if not webhook:
        return
    host = urllib.parse.urlsplit(webhook).hostname
    body = json.dumps(summary, sort_keys=True).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(webhook, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=_WEBHOOK_S) as response:
            log.info("webhook at %s: %s", host, response.status)
    except (OSError, HTTPException, ValueError) as error:
        said = getattr(error, "reason", None) or type(error).__name__
        log.warning("webhook at %s did not take the summary: %s", host, said)
