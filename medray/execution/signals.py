"""SIGTERM and Ctrl-C: what is complete is kept, then the stage stops."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from medray.errors import MedrayError, StoppedError, TerminatedError

GRACE_S = 15.0
"""Seconds after a signal in which regions under way may still be completed."""


class Stopping:
    """Whether a signal has asked to stop, and which."""

    signal = 0


@contextlib.contextmanager
def stopping() -> Iterator[Stopping]:
    """Record SIGTERM and SIGINT instead of ending at once; a second one ends at once.

    Signals reach the main thread only; elsewhere nothing is changed.
    """
    asked = Stopping()

    def note(number: int, frame: FrameType | None) -> None:
        if asked.signal:
            raise TerminatedError if number == signal.SIGTERM else KeyboardInterrupt
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


def call_stoppable(
    function: Callable[[], Any],
    ask: Callable[[], None],
    kept: Callable[[], str],
) -> Any:
    """Return the result of a function of Ray, called in a thread; a signal ends it.

    Ray Train and Ray Tune wait where no signal reaches Python, and take Ctrl-C for
    themselves in the main thread.

    Args:
        function: What to call.
        ask: Asks what it has started to stop.
        kept: Says what is kept.

    Raises:
        StoppedError: A signal came.
    """
    found: list[Any] = []
    failed: list[BaseException] = []

    def call() -> None:
        try:
            found.append(function())
        except BaseException as error:  # raised below, where it is waited for
            failed.append(error)

    thread = threading.Thread(target=call, daemon=True)
    with stopping() as asked:
        thread.start()
        while thread.is_alive() and not asked.signal:
            thread.join(0.2)
        if asked.signal:
            with contextlib.suppress(MedrayError):  # where it cannot hear
                ask()
            deadline = time.monotonic() + GRACE_S
            while thread.is_alive() and time.monotonic() < deadline:
                thread.join(0.2)
            raise StoppedError(asked.signal, kept())
    if failed:
        raise failed[0]
    return found[0]
