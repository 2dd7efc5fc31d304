"""Whether networks are compiled: settled once, when a run or its features begin."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from medray.errors import CompileError
from medray.inference.run import RunSettings, read_run
from medray.models import Compile, has_gpu_driver
from medray.storage import Ledger, files
from medray.types import Executor

log = logging.getLogger(__name__)


def settle_compile(settings: RunSettings, out: str, executor: Executor) -> RunSettings:
    """Settle whether a run is compiled: as it was begun, else as its devices are.

    Args:
        settings: Of the request.
        out: Folder of the run; it need not be there.
        executor: Where it runs.
    """
    prediction = settings.options.prediction
    if prediction.compile != "auto":
        return settings
    kept = None
    if files.exists(files.join(out, "run.yaml")):
        kept = read_run(out).options.prediction.compile
    return with_compile(settings, choose_compile(kept, executor))


def with_fallback[S, T](
    work: Callable[[S], T], settings: S, fallback: S | None, uri: str
) -> T:
    """Work with compiled networks; where they cannot be compiled, without.

    Args:
        work: Takes settings, keeps them in its folder, and works.
        settings: To begin with.
        fallback: The same, not compiled; None: compiling was asked for.
        uri: File of the settings in the folder of the work.

    Returns:
        What `work` returns.

    Raises:
        CompileError: The networks cannot be compiled, and that was asked for, or a
            region is done already: nothing is mixed.
    """
    try:
        return work(settings)
    except CompileError as error:
        out = uri.rpartition("/")[0]
        if fallback is None or fallback == settings or not _is_empty(out):
            raise
        log.warning("%s; nothing is done yet: it begins again not compiled", error)
    files.remove(uri)
    return work(fallback)


def _is_empty(out: str) -> bool:
    ledger = Ledger(out)
    done = any(row["status"] == "done" for row in ledger.slides.values())
    return not done and not any(ledger.regions.values())


def with_compile(settings: RunSettings, compile: Compile) -> RunSettings:
    """Return settings with another choice."""
    prediction = replace(settings.options.prediction, compile=compile)
    return replace(settings, options=replace(settings.options, prediction=prediction))


def choose_compile(kept: Compile | None, executor: Executor) -> Compile:
    """Return whether networks are compiled where that was left open.

    Args:
        kept: What the settings of what was begun say; None: nothing was.
        executor: Where it runs, settled.

    Returns:
        `on` or `off`: what was begun goes on as it was, whatever the devices; what is
        new is compiled for GPUs.
    """
    if kept is not None:
        return "on" if kept == "on" else "off"
    if executor == "ray":
        # Imported here: without Ray there is no cluster.
        from medray.execution import cluster

        cluster.connect()
        return "on" if cluster.predicts_on_gpus() else "off"
    if not has_gpu_driver():
        return "off"
    # Imported here: with it comes torch, a second before anything is read.
    from medray.models import choose_device

    return "on" if choose_device().type == "cuda" else "off"
