"""What can go wrong, grouped by what the caller does about it."""

from __future__ import annotations

import signal


class MedrayError(Exception):
    """Base of every error that medray raises on purpose."""


class ConfigError(MedrayError, ValueError):
    """The request is wrong: correct it and run again. Nothing has been done yet."""


class CompileError(ConfigError):
    """A network cannot be compiled for its device; without that it can be run."""


class SlideError(MedrayError):
    """One slide or its annotation cannot be used: record it, go on with the others."""


class StoreError(MedrayError):
    """Storage failed for a reason that may pass: try again."""


class FormatError(MedrayError):
    """A store, model or dataset is not what it says it is: stop."""


class LostError(MedrayError):
    """Work was given up: its processes died, or took too long."""


class StoppedError(MedrayError):
    """A signal ended a stage; running the same command again goes on.

    Attributes:
        signal: Its number.
    """

    def __init__(self, number: int, kept: str) -> None:
        """Take the signal's number, and what is kept."""
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name}: {kept}; run the same command again to go on"
        )
        self.signal = number


class TerminatedError(KeyboardInterrupt):
    """SIGTERM where no stage handles signals: like Python's own for Ctrl-C."""


def check_positive(**values: float | None) -> None:
    """Raise a ConfigError for a number that is not above 0; None is no number."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{name}: expected a number above 0, found {value}")
