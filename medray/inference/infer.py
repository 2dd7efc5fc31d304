"""Slides and models -> one OME-Zarr mask a slide, and slides.parquet.

The way of a region, top to bottom:

    plan       slides become regions, numbers only: which hold tissue
    GPU worker an actor for each GPU takes batches of them and keeps its device busy:
      read     its processes read regions and their halos ahead, some bytes of them
      predict  windows of successive regions share batches; classes come out
      write    the same processes write the classes as the region's shards
    commit     the driver notes the region; with its last region a slide is finished

Pixels go from the readers to the GPU worker and from the GPU worker to the writers; the
driver only sees numbers. No two processes write one shard, and work that is done twice
writes the same bytes, so any process may die or be repeated. What the driver has noted
is not computed again.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from medray.datasets.overrides import with_overrides
from medray.errors import ConfigError, SlideError
from medray.execution import cluster
from medray.execution.commit import (
    Commit,
    Summary,
    add_note,
    changed_slides,
    plan_one,
    start_row,
)
from medray.execution.gpu_worker import Layers, Work, start_gpu_workers
from medray.execution.memory import check_budget
from medray.execution.progress import Progress
from medray.execution.scheduler import keeping, schedule, start_workers
from medray.geometry import Rectangle, region_side, region_windows
from medray.inference.memory import bounds
from medray.inference.plan import coarse_mask, plan_slide, wanted_windows
from medray.inference.postprocess import Cleaning
from medray.inference.regions import finish_slide, read_region, write_region
from medray.inference.run import (
    Options,
    RunSettings,
    against_plan,
    create_mask,
    open_run,
    raw_uri,
)
from medray.models.config import check_runtime, model_digest, read_config, weights_uri
from medray.slides import Slide
from medray.slides.cache import log_copies
from medray.slides.discovery import SlideFile, find_slides
from medray.slides.resolution import working_of
from medray.storage import files, ome_zarr
from medray.storage.digests import named_digest
from medray.storage.ledger import Ledger
from medray.storage.lock import locked
from medray.types import Row, UInt8

log = logging.getLogger(__name__)


def infer(
    slides: Sequence[str | SlideFile],
    *,
    model: str | Sequence[str],
    out: str,
    options: Options | None = None,
) -> Summary:
    """Segment slides with a model: one OME-Zarr mask a slide in OUT/masks.

    Running the same command again finishes what is missing and does nothing twice.

    Args:
        slides: Files, globs, folders, s3:// or gs:// addresses, or a dataset; or the
            very files, with their ids.
        model: Model folder, as `medray train` writes it, or several: an ensemble.
        out: Folder of the run; made if needed.
        options: How; by default the model's way.

    Raises:
        ConfigError: The request is wrong, or OUT holds a run of another model or of
            other settings, or another process works there.
        StoreError: OUT cannot be written, or the slides' store does not answer.
        StoppedError: SIGTERM or Ctrl-C; what is complete is kept.
    """
    options = options or Options()
    settings = settings_of([model] if isinstance(model, str) else model, options)
    out = files.absolute(out)
    with locked(out, "infer") as check:
        return _infer(slides, settings, out, check)


def _infer(
    slides: Sequence[str | SlideFile],
    settings: RunSettings,
    out: str,
    check: Callable[[], None],
) -> Summary:
    options = settings.options
    open_run(out, settings)
    ledger = Ledger(out)
    ready = [slide for slide in slides if isinstance(slide, SlideFile)]
    named = [slide for slide in slides if isinstance(slide, str)]
    wanted = ready + (find_slides(named) if named or not ready else [])
    wanted = with_overrides(
        wanted, mpp=options.mpp, scene=options.scene, plane=options.plane
    )
    wanted, areas = slides_within(wanted, options.within)
    todo = changed_slides(wanted, ledger, areas)
    log.info("%d slides, %d of them to do, into %s", len(wanted), len(todo), out)
    skipped = len(wanted) - len(todo)
    if not todo:
        return Summary(out, 0, skipped, {}, 0, 0.0)
    log_copies(row["uri"] for row in todo)
    cluster.connect()
    most, there = bounds(settings)[0], cluster.memory_per_node()
    check_budget(most, there)
    log.info(
        "%d GPU workers, regions of %d px, at most %.1f of %.1f GiB of memory a node",
        cluster.gpu_workers(),
        settings.options.region,
        most / 2**30,
        there / 2**30,
    )
    if options.coarse > 1:
        names = {row["slide"] for row in todo}
        coarse = [slide for slide in wanted if slide.slide in names]
        _first_pass(coarse, settings, out, check)
    start = time.perf_counter()
    commit = _work_off("infer", todo, settings, out, ledger, check)
    _remove_raw(out, settings, ledger)
    for about, words in against_plan(out, ledger.slides.values()).items():
        log.info("%s: %s", about, words)
    return commit.summary(out, skipped, time.perf_counter() - start)


def slides_within(
    wanted: list[SlideFile], within: str | None
) -> tuple[list[SlideFile], dict[str, str]]:
    """Leave the slides that have an annotation to stay within.

    Args:
        wanted: The slides of the request.
        within: Folder of the annotations; None leaves all slides.

    Returns:
        Those slides, and the annotation of each by its id.

    Raises:
        ConfigError: There is none.
    """
    if within is None:
        return wanted, {}
    from medray.annotations.matching import match_annotations

    areas = match_annotations(wanted, within)
    found = [slide for slide in wanted if slide.slide in areas]
    if not found:
        raise ConfigError(f"{within}: no annotation is named like a slide")
    return found, areas


def _work_off(
    stage: str,
    todo: list[Row],
    settings: RunSettings,
    out: str,
    ledger: Ledger,
    check: Callable[[], None],
) -> Commit:
    """Do the slides and commit them."""
    commit = Commit(ledger, _slide_row)
    plan = functools.partial(_plan, settings=settings, out=out)
    finish = functools.partial(finish_slide, settings, out)
    timeout = settings.options.timeout
    with (
        Progress(stage, len(todo)) as progress,
        keeping(ledger),
        start_workers(plan, finish, len(todo), timeout) as workers,
        start_gpu_workers(_work(settings, out), len(todo)) as gpu_workers,
    ):
        batch = 16 if cluster.gpus() else 8
        schedule(todo, workers, gpu_workers, commit, progress, batch, check)
    ledger.close()
    return commit


def _remove_raw(out: str, settings: RunSettings, ledger: Ledger) -> None:
    """Remove the masks before cleaning of slides that are done for good."""
    if settings.options.clean:
        for slide, row in ledger.slides.items():
            if row["status"] == "done":
                files.remove(raw_uri(out, slide))


def settings_of(models: Sequence[str], options: Options) -> RunSettings:
    """Settle what a run of these models will be.

    Raises:
        ConfigError: A folder is no model, or the models do not fit each other.
    """
    folders = tuple(files.absolute(model) for model in models)
    configs = [read_config(folder) for folder in folders]
    config = configs[0]
    for folder, each in zip(folders, configs, strict=True):
        if each.morphology is not None:
            raise ConfigError(
                f"{folder}: takes measures of nucleus and cytoplasm beside the pixels, "
                f"which slides do not have; `medray evaluate` it with a dataset of "
                f"images with contours, or train with model.morphology=false"
            )
    for folder, other in zip(folders, configs, strict=True):
        for name in ("classes", "window", "mpp"):
            if getattr(other, name) != getattr(config, name):
                raise ConfigError(
                    f"{folder}: models of one ensemble need the same {name}, found "
                    f"{getattr(other, name)} beside {getattr(config, name)}"
                )
    thresholds = options.prediction.thresholds
    if thresholds and len(thresholds) != len(config.classes):
        raise ConfigError(
            f"thresholds: expected {len(config.classes)}, one for each of "
            f"{list(config.classes.names)}, found {len(thresholds)}"
        )
    if options.within:
        options = replace(options, within=files.absolute(options.within))
    if isinstance(options.mpp, str):
        options = replace(options, mpp=files.absolute(options.mpp))
    side = options.region or region_side(config.window, ome_zarr.PATCH)
    for folder in folders:
        check_runtime(folder)
    deciding = ["medray", "torch", "tifffile", "imagecodecs", "zarr"]
    if any(weights_uri(folder).endswith(".onnx") for folder in folders):
        deciding.append("onnxruntime")
    digests = [model_digest(folder) for folder in folders]
    whole = named_digest(" ".join(digests).encode())
    return RunSettings(
        models=folders,
        model_digest=digests[0] if len(digests) == 1 else whole,
        classes=config.classes,
        windows=config.window,
        model_mpp=config.mpp,
        options=replace(options, region=side),
        versions={name: importlib.metadata.version(name) for name in deciding},
    )


def _first_pass(
    slides: list[SlideFile],
    settings: RunSettings,
    out: str,
    check: Callable[[], None],
) -> None:
    """Predict at a coarser level, to know where it is worth looking closely."""
    options = settings.options
    if settings.model_mpp is None:
        raise ConfigError("coarse needs a model that names its microns per pixel")
    coarse = replace(
        settings,
        model_mpp=settings.model_mpp * options.coarse,
        options=replace(options, coarse=1, outlines=False, clean=Cleaning()),
    )
    out = files.join(out, "coarse")
    open_run(out, coarse)
    ledger = Ledger(out)
    todo = changed_slides(slides, ledger)
    if todo:
        _work_off("coarse", todo, coarse, out, ledger, check)


# --- plan ----------------------------------------------------------------------------


def _plan(row: Row, settings: RunSettings, out: str) -> tuple[Row, list[Row]]:
    """Return a slide's header and the regions to do; its mask is made, empty."""

    def cut(header: Row, slide: Slide) -> tuple[Row, list[Row]]:
        coarse = coarse_mask(out, row["slide"]) if settings.options.coarse > 1 else ""
        within, fingerprint = header["annotation"], header["fingerprint"]
        given = header["given_mpp"]
        facts, regions = plan_slide(slide, settings, within, coarse, fingerprint, given)
        return facts | {"classes": settings.classes.names}, regions

    def make(header: Row) -> None:
        place = header["slide"], header["digest"], working_of(header)
        create_mask(*place, settings, out)

    return plan_one(row, out, cut, make)


# --- predict --------------------------------------------------------------------------


def _work(settings: RunSettings, out: str) -> Work:
    """Say what the run's GPU workers do with a region."""
    return Work(
        load=functools.partial(_load, settings),
        read=functools.partial(read_region, settings=settings),
        source=functools.partial(region_pixels, settings),
        layers=_layers,
        write=functools.partial(write_region, settings=settings, out=out),
        read_bytes=functools.partial(_halo_bytes, settings),
        timeout=settings.options.timeout,
    )


def _load(settings: RunSettings, threads: int) -> Any:
    from medray.models.predict import Predictor

    how = settings.options.prediction
    return Predictor.from_folders(settings.models, how, threads=threads)


def region_pixels(settings: RunSettings, row: Row, pixels: UInt8) -> Any:
    """Return a region as the model takes it (`RegionPixels`); its windows are noted."""
    from medray.models.canvas import RegionPixels

    size = (row["height"], row["width"])
    windows, how = settings.windows, settings.options.prediction
    plan = region_windows(Rectangle(*row["region"]), *size, windows, how.stitch)
    wanted = wanted_windows(row, settings)
    row["windows"] = int(wanted.sum())
    return RegionPixels(pixels, plan, *size, wanted)


def _layers(result: Any) -> Layers:
    """Return what of a `RegionClasses` is written."""
    names = ("labels", "probabilities", "uncertainty", "disagreement")
    layers = {name: getattr(result, name) for name in names}
    return {name: layer for name, layer in layers.items() if layer is not None}


def _halo_bytes(settings: RunSettings, row: Row) -> int:
    size = (row["height"], row["width"])
    stitch = settings.options.prediction.stitch
    region = Rectangle(*row["region"])
    halo = region_windows(region, *size, settings.windows, stitch).halo
    return 3 * halo.height * halo.width


# --- commit ---------------------------------------------------------------------------


def _slide_row(header: Row, regions: list[Row]) -> Row:
    """Sum up a finished slide for slides.parquet.

    Raises:
        SlideError: Nothing of the slide could be read.
    """
    row = start_row(header, regions)
    total = header["height"] * header["width"]
    unreadable = sum(region.get("unreadable_px", 0) for region in regions)
    if unreadable and unreadable >= sum(sum(region["class_px"]) for region in regions):
        raise SlideError(next(r["why"] for r in regions if "why" in r))
    if unreadable:
        why = next(r["why"] for r in regions if r.get("unreadable_px"))
        add_note(row, f"{unreadable / total:.2%} of its pixels cannot be read: {why}")
    row["unreadable_px"] = unreadable
    classes = header["classes"]
    counts = np.zeros(len(classes), np.int64)
    for region in regions:
        counts += np.asarray(region["class_px"])
    counts[0] += total - counts.sum()
    for one in (header, *regions):  # what finishing added
        counts = np.asarray(one.get("cleaned_px", counts))
        row["merkle_root"] = one.get("merkle_root", row.get("merkle_root"))
    row |= {f"px_{name}": int(n) for name, n in zip(classes, counts, strict=True)}
    looked_at = sum(region["predicted_px"] for region in regions)
    row["predicted_px"] = looked_at
    counts[0] = max(0, looked_at - int(counts[1:].sum()))
    row["label"] = classes[int(counts.argmax())] if looked_at else classes[0]
    for layer, most in (("uncertainty", 255), ("disagreement", 1)):
        if looked_at and regions[0].get(f"{layer}_sum") is not None:
            total = sum(region[f"{layer}_sum"] for region in regions)
            row[layer] = total / most / looked_at
    if looked_at and all("p_sum" in region for region in regions):
        row |= _probabilities(regions, classes, looked_at)
    row["windows"] = sum(region.get("windows", 0) for region in regions)
    return row


def _probabilities(
    regions: list[Row], classes: Sequence[str], looked_at: int
) -> dict[str, float]:
    """Return the mean and highest probability of each class where it was predicted."""
    sums = np.sum([region["p_sum"] for region in regions], axis=0) / 255 / looked_at
    most = np.max([region["p_max"] for region in regions], axis=0) / 255
    row: dict[str, float] = {}
    for name, mean, highest in zip(classes, sums, most, strict=True):
        row |= {f"mean_p_{name}": float(mean), f"max_p_{name}": float(highest)}
    return row
