"""Runs and trainings in one process and one loop: what the distributed must equal."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from medray.datasets.overrides import with_overrides
from medray.errors import MedrayError
from medray.execution.commit import Commit, changed_slides
from medray.execution.progress import Progress
from medray.inference.infer import (
    _plan,
    _slide_row,
    region_pixels,
    settings_of,
    slides_within,
)
from medray.inference.postprocess import Cleaning
from medray.inference.regions import finish_slide, read_region, write_region
from medray.inference.run import Options, RunSettings, open_run
from medray.models.config import ModelConfig
from medray.models.predict import Predictor
from medray.slides.discovery import find_slides
from medray.storage.ledger import Ledger
from medray.training.recipe import Recipe
from medray.training.train import Training, train_with
from medray.training.worker import train_as
from medray.training.world import World

Row = dict[str, Any]


class CrashError(Exception):
    """The process is gone; what it had not written is lost."""


def infer(
    slides: Path,
    predictor: Predictor,
    model: Path | str | Sequence[Path],
    out: Path,
    options: Options,
    crash_after: int = -1,
) -> Commit:
    """Do what is missing of a run; die after so many regions, if that is not below
    0."""
    models = [model] if isinstance(model, Path | str) else model
    settings = settings_of([str(folder) for folder in models], options)
    if options.coarse > 1:
        assert settings.model_mpp is not None
        coarse = replace(
            settings,
            model_mpp=settings.model_mpp * options.coarse,
            options=replace(
                settings.options, coarse=1, outlines=False, clean=Cleaning()
            ),
        )
        _work_off(slides, predictor, coarse, f"{out}/coarse", -1)
    return _work_off(slides, predictor, settings, str(out), crash_after)


def _work_off(
    slides: Path,
    predictor: Predictor,
    settings: RunSettings,
    run: str,
    crash_after: int,
) -> Commit:
    open_run(run, settings)
    ledger = Ledger(run)
    within = settings.options.within
    options = settings.options
    found = with_overrides(
        find_slides([str(slides)]),
        mpp=options.mpp,
        scene=options.scene,
        plane=options.plane,
    )
    wanted, areas = slides_within(found, within)
    commit = Commit(ledger, _slide_row)
    progress = Progress("serial", len(wanted))

    def note(row: dict) -> None:
        nonlocal crash_after
        header = commit.take(row, progress)
        if header is not None:
            header |= {"records": commit.records(header)}
            result: Row | Exception
            try:
                result = finish_slide(settings, run, header)
            except MedrayError as error:
                result = error
            commit.finished(header, result, progress)
        if "record" in row:
            crash_after -= 1
            if crash_after == -1:
                raise CrashError

    if crash_after == 0:
        raise CrashError
    for row in changed_slides(wanted, ledger, areas):
        header, regions = _plan(row, settings, run)
        if not regions:
            note(header)
        for region in regions:
            todo, pixels = read_region(header | region, settings)
            layers = {}
            if pixels is not None:
                layers = _predict(predictor, todo, pixels, settings)
            if "error" not in todo:
                todo = write_region(todo, layers, settings, run)
            note(todo)
    commit.close(progress)
    ledger.close()
    return commit


def _predict(predictor: Predictor, row: dict, pixels, settings) -> dict:
    source = region_pixels(settings, row, pixels)
    (result,) = predictor.predict([source])
    layers = {
        name: getattr(result, name)
        for name in ("labels", "probabilities", "uncertainty", "disagreement")
    }
    return {name: layer for name, layer in layers.items() if layer is not None}


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
