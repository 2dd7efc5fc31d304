"""Notices to a running training: a request to stop, or a node that leaves."""

from __future__ import annotations

import contextlib
import time
from typing import Literal

import ray

from medray.errors import MedrayError
from medray.execution import cluster
from medray.storage import files
from medray.training.world import World

_REST_S = 2.0  # between two looks; a store may take a request for each

type Notice = Literal["", "save", "stop"]


class AskedToStopError(Exception):
    """The training was asked to stop, and has: its state is written."""


def ask_to_stop(out: str) -> None:
    """Ask the workers of a training to write their state and to stop."""
    files.write_bytes(_stop_uri(out), b"")


def is_asked_to_stop(out: str) -> bool:
    """Return whether a training was asked to stop."""
    return files.exists(_stop_uri(out))


def withdraw_stop(out: str) -> None:
    """Withdraw a request to stop, also for a training that was killed."""
    files.remove(_stop_uri(out))


def _stop_uri(out: str) -> str:
    return files.join(out, "checkpoints", "stop")


class Notices:
    """Reads notices that are new since the last call, as one rank of the world."""

    def __init__(self, out: str) -> None:
        """Listen for the training that makes a model folder."""
        self._out = out
        self._leaving: set[str] = set()
        self._looked = time.monotonic()

    def hear(self, world: World) -> Notice:
        """Return what to do after this step; all of the world stop at the same one."""
        heard = self._look() if world.rank == 0 else ""
        return "stop" if world.any(heard == "stop") else heard

    def _look(self) -> Notice:
        if time.monotonic() < self._looked + _REST_S:
            return ""
        self._looked = time.monotonic()
        # A store or a head that does not answer now is asked again.
        with contextlib.suppress(MedrayError, ray.exceptions.RayError):
            if is_asked_to_stop(self._out):
                return "stop"
            # Ray Train's own notice is a barrier of all workers in each step.
            leaving = cluster.leaving_nodes() if ray.is_initialized() else set()
            new, self._leaving = leaving - self._leaving, leaving
            return "save" if new else ""
        return ""
