"""Notes of what this process spends, as lines of JSON in a file of its own.

The environment variable MEDRAY_COSTS names the folder. Each line is written when it is
known: processes are killed, and Ray's end without a word. tests/costs.py reads them.

What is watched are spans: imports of the modules and calls of the functions named below,
and what tests/costs.py adds. A span has the seconds and the CPU seconds of its process
from its begin to its end, less those of the spans within it, so they may be summed.
"""

import atexit
import functools
import importlib.machinery
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

FOLDER = os.environ["MEDRAY_COSTS"]
# Modules of which the import is a span.
IMPORTS = ("torch", "torchvision", "timm", "segmentation_models_pytorch", "ray")
# Functions of which a call is a span: module, function, kind and name of the span.
CALLS = (
    ("medray.training.train_model", "train_with", "training", "a model (`train_with`)"),
    ("medray.training.worker", "train_as", "training", "its loop (`train_as`)"),
    ("medray.mil.train", "train_slides", "training", "of whole slides"),
    ("medray.apps.demo", "demo", "demo", "without its trainings"),
    ("ray._private.worker", "init", "Ray", "connecting"),
    ("ray._private.worker", "shutdown", "Ray", "shutdown"),
    ("ray._private.node", "Node.start_head_processes", "Ray", "start of a head"),
    ("ray._private.node", "Node.start_ray_processes", "Ray", "start of a node"),
)
# And a class with whose objects one works `with`.
SESSIONS = (
    "playwright.sync_api._context_manager",
    "PlaywrightContextManager",
    "browser",
    "a session of Playwright",
)

_TICKS = os.sysconf("SC_CLK_TCK")
_open = threading.local()
_path = ""  # of this process's file


def stat(pid: int | str) -> tuple[str, str, float]:
    """Return a process's key, its program's name and its CPU seconds.

    The key is the process id with the time of its start: ids are used again.

    Raises:
        OSError: It is no more.
    """
    with open(f"/proc/{pid}/stat") as file:
        text = file.read()
    begin, end = text.index("("), text.rindex(")")
    fields = text[end + 2 :].split()
    key = f"{text[:begin].strip()}-{fields[19]}"
    return key, text[begin + 1 : end], (int(fields[11]) + int(fields[12])) / _TICKS


def note(kind: str, name: str, **more: Any) -> None:
    """Append a line to this process's file."""
    line = json.dumps({"kind": kind, "name": name} | more) + "\n"
    file = os.open(_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(file, line.encode())
    os.close(file)


@contextmanager
def span(kind: str, name: str, **more: Any) -> Iterator[None]:
    """Note what is spent within, less what spans within it spend."""
    outer = getattr(_open, "inner", None)
    inner = _open.inner = [0.0, 0.0]
    since, cpu_since = time.perf_counter(), time.process_time()
    try:
        yield
    finally:
        wall, cpu = time.perf_counter() - since, time.process_time() - cpu_since
        note(kind, name, wall=wall - inner[0], cpu=cpu - inner[1], **more)
        _open.inner = outer
        if outer is not None:
            outer[0] += wall
            outer[1] += cpu


def _watch_call(owner: Any, function: str, kind: str, name: str) -> None:
    """Make each call of a function or method a span."""
    call = getattr(owner, function)

    @functools.wraps(call)
    def watched(*args: Any, **options: Any) -> Any:
        with span(kind, name):
            return call(*args, **options)

    setattr(owner, function, watched)


def _watch_sessions(owner: Any, kind: str, name: str) -> None:
    """Make a span of what is between begin and end of a class's objects."""
    enter, leave = owner.__enter__, owner.__exit__

    def begin(self: Any) -> Any:
        self._spent = span(kind, name)
        self._spent.__enter__()
        return enter(self)

    def end(self: Any, *why: Any) -> Any:
        try:
            return leave(self, *why)
        finally:
            if "_spent" in self.__dict__:
                self.__dict__.pop("_spent").__exit__(None, None, None)

    owner.__enter__, owner.__exit__ = begin, end


def _watch(module: Any) -> None:
    """Watch what is named above of a module that has just been loaded."""
    for place, function, kind, name in CALLS:
        if place == module.__name__:
            *outer, last = function.split(".")
            _watch_call(functools.reduce(getattr, outer, module), last, kind, name)
    place, cls, kind, name = SESSIONS
    if place == module.__name__:
        _watch_sessions(getattr(module, cls), kind, name)


class _Finder:
    """Finds the watched modules, and watches their import or what is in them."""

    places = frozenset(call[0] for call in (*CALLS, SESSIONS))

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in IMPORTS and name not in self.places:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            if name in IMPORTS:
                with span("import", name):
                    load(module)
            else:
                load(module)
                _watch(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _begin(kind: str) -> None:
    """Note that this process is there."""
    global _path
    _path = os.path.join(FOLDER, f"{stat('self')[0]}.jsonl")
    note(kind, " ".join(sys.orig_argv))


def _fork() -> None:
    """Note a fork, which may become another program at once, as Ray's servers do."""
    _open.__dict__.clear()
    _begin("fork")


def _end() -> None:
    note("end", "", cpu=time.process_time())


_begin("process")
os.register_at_fork(after_in_child=_fork)
atexit.register(_end)
sys.meta_path.insert(0, _Finder())
