"""The peak memory of a run: of all processes that were started with its mark."""

import json
import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARK = "MEDRAY_BENCHMARK"


@dataclass
class Peak:
    """The most memory seen so far, bytes."""

    bytes: int = 0

    @property
    def mib(self) -> int:
        return self.bytes >> 20


@contextmanager
def watched(seconds: float = 0.5) -> Iterator[Peak]:
    """Measure the marked processes' memory every `seconds`."""
    peak, stop = Peak(), threading.Event()

    def watch() -> None:
        while not stop.wait(seconds):
            peak.bytes = max(peak.bytes, _resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()


def run_watched(command: list[str]) -> tuple[dict[str, Any], Peak]:
    """Run a command that ends with a line of JSON; return that and its peak memory."""
    with watched() as peak:
        done = subprocess.run(
            command,
            env=os.environ | {MARK: os.environ.get(MARK, "1")},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            check=True,
        )
    return json.loads(done.stdout.splitlines()[-1]), peak


def _resident() -> int:
    """Sum the marked processes' memory; pages that several share are shared out."""
    mark = f"{MARK}={os.environ.get(MARK, '1')}\0"
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if mark in (entry / "environ").read_text():
                text = (entry / "smaps_rollup").read_text()
                total += int(text.split("Pss:")[1].split()[0]) << 10
        except (OSError, IndexError):
            continue
    return total
