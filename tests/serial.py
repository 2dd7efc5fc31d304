"""Runs and trainings in one process and one loop: what the distributed must equal."""

import contextlib
import functools
import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import medray
from medray.execution.commit import Summary
from medray.execution.stage import AnyStage
from medray.inference.infer_run import stage_of
from medray.inference.run import Options
from medray.models.config import ModelConfig
from medray.models.predict import Predictor
from medray.storage.ledger import Ledger
from medray.training.recipe import Recipe
from medray.training.train_model import Training, train_with
from medray.training.worker import train_as
from medray.training.world import World


class CrashError(Exception):
    """The process is gone; what it had not written is lost."""


def infer(
    slides: Path | str,
    predictor: Predictor,
    model: Path | str | Sequence[Path],
    out: Path | str,
    options: Options,
    crash_after: int = -1,
) -> Summary:
    """Do what is missing of a run by a model that is loaded; die after so many regions,
    if that is not below 0."""
    models = [model] if isinstance(model, Path | str) else model
    written = itertools.count()

    def stage(*args: Any) -> AnyStage:
        made = stage_of(*args)
        assert made.device is not None
        device = replace(made.device, load=lambda _: predictor)
        write = functools.partial(dying_write, made.write, written, crash_after)
        if made.name != "infer":
            write = made.write
        return replace(made, device=device, write=write)

    with contextlib.ExitStack() as patched:
        patched.enter_context(patch("medray.inference.infer_run.stage_of", stage))
        if crash_after >= 0:
            nothing = lambda _: contextlib.nullcontext()  # noqa: E731
            patched.enter_context(patch.object(Ledger, "kept", nothing))
        return medray.infer(
            [str(slides)],
            model=[str(folder) for folder in models],
            out=str(out),
            options=options,
            executor="local",
        )


def dying_write(write: Any, written: Any, crash_after: int, *args: Any) -> Any:
    if next(written) == crash_after:
        raise CrashError
    return write(*args)


def train(recipe: Recipe, data: str, out: str) -> Training:
    """Train without Ray Train."""

    def run(settings: Recipe, contract: ModelConfig, name: str) -> None:
        run_loop(settings, contract, data, out, name)

    return train_with(run, recipe, data, out)


def run_loop(
    settings: Recipe, contract: ModelConfig, data: str, out: str, name: str
) -> None:
    """What stands for `medray.training.launch.run_workers`: the loop, as a worker that is
    alone."""
    torch.set_num_threads(os.cpu_count() or 1)
    train_as(World(0, 1, torch.device("cpu")), settings, contract, data, out, name)
