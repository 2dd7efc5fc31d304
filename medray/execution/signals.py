"""SIGTERM and Ctrl-C: what is complete is kept, then the stage stops."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

GRACE_S = 15.0
"""Seconds after a signal in which regions under way may still be completed."""


class Stopping:
    """Whether a signal has asked to stop, and which."""

    signal = 0


@contextlib.contextmanager
def stopping() -> Iterator[Stopping]:
    """Note SIGTERM and SIGINT instead of ending at once; the second one ends at once.

    Signals reach the main thread only; elsewhere nothing is changed.
    """
    asked = Stopping()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.signal:
            raise KeyboardInterrupt
        asked.signal = number

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
