"""Whether a run's networks are compiled: settled once, when it begins."""

from __future__ import annotations

from dataclasses import replace

from medray.inference.run import RunSettings, open_run, read_run
from medray.models import Compile
from medray.storage import Ledger, files
from medray.types import Executor


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
    chosen = choose_compile(kept, executor)
    options = replace(settings.options, prediction=replace(prediction, compile=chosen))
    return replace(settings, options=options)


def is_empty(out: str) -> bool:
    """Return whether a run has no region yet, and may be settled otherwise."""
    ledger = Ledger(out)
    done = any(row["status"] == "done" for row in ledger.slides.values())
    return not done and not any(ledger.regions.values())


def begin_not_compiled(settings: RunSettings, out: str) -> RunSettings:
    """Begin an empty run again with its networks as they are; return its settings."""
    prediction = replace(settings.options.prediction, compile="off")
    settings = replace(
        settings, options=replace(settings.options, prediction=prediction)
    )
    files.remove(files.join(out, "run.yaml"))
    open_run(out, settings)
    return settings


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
    # Imported here: with it comes torch, which what is gone on with can do without.
    from medray.models import choose_device

    return "on" if choose_device().type == "cuda" else "off"
