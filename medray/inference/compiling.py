"""Whether a run's networks are compiled: settled once, when it begins."""

from __future__ import annotations

from dataclasses import replace

from medray.inference.run import RunSettings, read_run
from medray.models import Compile
from medray.storage import files
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
