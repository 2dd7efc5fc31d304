"""Segment slides: slides and models -> one OME-Zarr mask per slide, slides.parquet.

The path of a region, top to bottom:

    plan       list each slide's regions and which of them hold tissue; no pixels yet
    GPU worker one actor per GPU takes batches of regions and keeps its device busy:
      read     I/O processes read regions and their halos ahead, up to a byte limit
      predict  windows of successive regions share batches; the result is classes
      write    the same I/O processes write the classes as the region's shards
    commit     the driver records the region; the last one finishes its slide

Pixels travel from readers to the GPU worker and from there to writers; the driver only
handles coordinates and counts. No two processes write the same shard, and work done
twice writes the same bytes, so any process may die and be restarted. Regions that the
driver has recorded are not computed again.

One file, because it is the path of a slide through `medray infer`, top to bottom.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from medray.errors import ConfigError
from medray.execution import (
    Device,
    PlannedRegion,
    SlideInput,
    Stage,
    Summary,
    run_stage,
    settle_executor,
)
from medray.geometry import Rectangle, region_side, region_windows
from medray.inference.compiling import settle_compile, with_compile, with_fallback
from medray.inference.plan import coarse_mask, plan_slide
from medray.inference.postprocess import Cleaning
from medray.inference.regions import (
    Blocks,
    FinishedMask,
    InferRegion,
    InferSlide,
    RegionRecord,
    SeenRegion,
    SlideFacts,
    Within,
    finish_slide,
    read_region,
    wanted_windows,
    write_region,
)
from medray.inference.run import (
    Options,
    RunSettings,
    against_plan,
    create_mask,
    open_run,
    raw_uri,
)
from medray.inference.slide_rows import slide_row
from medray.models import (
    check_runtime,
    is_exported,
    model_digest,
    read_config,
    seen_by,
    weights_uri,
    write_seen,
)
from medray.slides import Slide, SlideFile, Working, find_slides
from medray.storage import Ledger, files, locked, named_digest, ome_zarr
from medray.types import Executor, Layers, UInt8

log = logging.getLogger(__name__)


def infer(
    slides: Sequence[str | SlideFile],
    *,
    model: str | Sequence[str],
    out: str,
    options: Options | None = None,
    executor: Executor = "auto",
) -> Summary:
    """Segment slides with a model: one OME-Zarr mask per slide in OUT/masks.

    Running the same command again computes what is missing and nothing twice.

    Args:
        slides: Files, globs, folders, s3:// or gs:// addresses, or a dataset; or slide
            files with ids.
        model: Model folder, as `medray train` writes it, or several: an ensemble.
        out: Folder of the run; made if needed.
        options: What is predicted and how; by default as the model was trained.
        executor: Where to run: Ray, processes of this machine, or this process (local).
            `auto`: Ray, but processes where no cluster is named and the files are few.

    Raises:
        ConfigError: The request is wrong, or OUT holds a run of another model or of
            other settings, or another process works there.
        CompileError: Networks cannot be compiled, although this was requested or the
            run in OUT was compiled. With `auto` a new run goes on without.
        StoreError: OUT cannot be written, or the store of the slides does not answer.
        StoppedError: SIGTERM or Ctrl-C; what is complete is kept.

    Examples:
        >>> run = medray.infer(["slides"], model="model", out="masks", executor="local")
        >>> run.done, run.skipped
        (4, 0)
        >>> run = medray.infer(["slides"], model="model", out="masks", executor="local")
        >>> run.done, run.skipped
        (0, 4)
    """
    options = options or Options()
    settings = settings_of([model] if isinstance(model, str) else model, options)
    out = files.absolute(out)
    with locked(out, "infer") as check:
        wanted = _wanted(slides, options)
        executor = settle_executor(executor, [slide.uri for slide in wanted])
        open_ended = settings.options.prediction.compile == "auto"
        return with_fallback(
            lambda settings: _infer(wanted, settings, out, executor, check),
            settle_compile(settings, out, executor),
            with_compile(settings, "off") if open_ended else None,
            files.join(out, "run.yaml"),
        )


def _wanted(slides: Sequence[str | SlideFile], options: Options) -> list[SlideFile]:
    """Return the requested slides, with the resolution that the request gives."""
    # Imported here: it imports annotation readers, which I/O workers do not need.
    from medray.datasets import with_overrides

    ready = [slide for slide in slides if isinstance(slide, SlideFile)]
    named = [slide for slide in slides if isinstance(slide, str)]
    return with_overrides(
        ready + (find_slides(named) if named or not ready else []),
        mpp=options.mpp,
        scene=options.scene,
        plane=options.plane,
    )


def _infer(
    wanted: list[SlideFile],
    settings: RunSettings,
    out: str,
    executor: Executor,
    check: Callable[[], None],
) -> Summary:
    open_run(out, settings)
    # Copied into the run: its models may be gone when it is evaluated.
    if (seen := seen_by(settings.models)) is not None:
        write_seen(out, seen)
    wanted, areas = slides_within(wanted, settings.options.within)

    def prepare(todo: list[SlideFile]) -> None:
        if executor == "ray":
            # Imported here: only a cluster's memory matters.
            from medray.inference.memory import check_memory

            check_memory(settings)
        if settings.options.coarse > 1:
            _first_pass(todo, settings, out, executor, check)

    ledger = Ledger(out)
    summary = run_stage(
        stage_of(settings, out),
        wanted,
        ledger,
        annotations=areas,
        executor=executor,
        check=check,
        prepare=prepare,
    )
    ledger.close()
    if summary.done or summary.failed:
        _remove_raw(out, settings, ledger)
        for about, words in against_plan(out, ledger.slides.values()).items():
            log.info("%s: %s", about, words)
    return summary


def slides_within(
    wanted: list[SlideFile], within: str | None
) -> tuple[list[SlideFile], dict[str, str]]:
    """Keep the slides that have an annotation to predict within.

    Args:
        wanted: The slides of the request.
        within: Folder of the annotations; None keeps all slides.

    Returns:
        The kept slides, and their annotation files by slide id.

    Raises:
        ConfigError: No slide has an annotation.
    """
    if within is None:
        return wanted, {}
    from medray.annotations import match_annotations

    areas = match_annotations(wanted, within)
    found = [slide for slide in wanted if slide.slide in areas]
    if not found:
        raise ConfigError(f"{within}: no annotation is named like a slide")
    return found, areas


type InferStage = Stage[SlideFacts, Blocks, SeenRegion, RegionRecord, FinishedMask]


def stage_of(settings: RunSettings, out: str, name: str = "infer") -> InferStage:
    """Return the work of a run on its slides; `name` is shown in its progress."""
    return Stage(
        name=name,
        out=out,
        record=RegionRecord,
        plan=functools.partial(_plan, settings=settings, out=out),
        create=functools.partial(_create, settings=settings, out=out),
        read=functools.partial(read_region, settings=settings),
        device=Device(
            load=functools.partial(_load, settings),
            source=functools.partial(_source, settings),
            layers=_layers,
            read_bytes=functools.partial(_halo_bytes, settings),
        ),
        write=functools.partial(write_region, settings=settings, out=out),
        finish=functools.partial(finish_slide, settings=settings, out=out),
        slide_row=functools.partial(slide_row, classes=settings.classes),
        timeout=settings.options.timeout,
    )


def _remove_raw(out: str, settings: RunSettings, ledger: Ledger) -> None:
    """Remove the uncleaned masks of finished slides."""
    if settings.options.clean:
        for slide, row in ledger.slides.items():
            if row["status"] == "done":
                files.remove(raw_uri(out, slide))


def settings_of(models: Sequence[str], options: Options) -> RunSettings:
    """Return the settings of a run of these models.

    Raises:
        ConfigError: A folder is not a model, or the models do not match.
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
    if any(map(is_exported, folders)):
        options = _not_compiled(options)
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


def _not_compiled(options: Options) -> Options:
    """Return the options of a run with an exported model of another runtime."""
    prediction = options.prediction
    if prediction.compile == "on":
        raise ConfigError(
            "compile: a model of `medray export` is another runtime's and not "
            "compiled; give --compile off, or the model that was trained"
        )
    return replace(options, prediction=replace(prediction, compile="off"))


def _first_pass(
    slides: list[SlideFile],
    settings: RunSettings,
    out: str,
    executor: Executor,
    check: Callable[[], None],
) -> None:
    """Predict at a coarser level first, to find where to predict at full resolution."""
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
    stage = stage_of(coarse, out, "coarse")
    run_stage(stage, slides, ledger, executor=executor, check=check)
    ledger.close()


# --- plan ----------------------------------------------------------------------------


def _plan(
    source: SlideInput, _: str, slide: Slide, settings: RunSettings, out: str
) -> tuple[SlideFacts, list[PlannedRegion[Blocks]]]:
    """Return a slide's facts and its regions."""
    within = None
    if source.annotation:
        within = Within(source.annotation, source.uri, source.fingerprint)
    coarse = coarse_mask(out, source.slide) if settings.options.coarse > 1 else ""
    return plan_slide(
        slide, settings, within=within, coarse=coarse, given_mpp=source.file.mpp
    )


def _create(slide: InferSlide, settings: RunSettings, out: str) -> None:
    """Create a slide's empty mask."""
    create_mask(slide.slide, slide.digest, slide.facts.working, settings, out)


# --- predict --------------------------------------------------------------------------


def _load(settings: RunSettings, threads: int) -> Any:
    from medray.models import Predictor

    how = settings.options.prediction
    return Predictor.from_folders(settings.models, how, threads=threads)


def _source(
    settings: RunSettings, task: InferRegion, seen: SeenRegion, arrays: Layers
) -> Any:
    working = task.slide.facts.working
    return region_pixels(settings, working, task.region, seen, arrays["pixels"])


def region_pixels(
    settings: RunSettings,
    working: Working,
    region: Rectangle,
    seen: SeenRegion,
    pixels: UInt8,
) -> Any:
    """Return a region as the predictor's input (`RegionPixels`)."""
    from medray.models import RegionPixels

    size = (working.height, working.width)
    stitch = settings.options.prediction.stitch
    plan = region_windows(region, *size, settings.windows, stitch)
    wanted = wanted_windows(working, region, seen.blocks, settings)
    return RegionPixels(pixels, plan, *size, wanted)


def _layers(result: Any) -> Layers:
    """Return the arrays of a `RegionClasses` to write."""
    names = ("labels", "probabilities", "uncertainty", "disagreement")
    layers = {name: getattr(result, name) for name in names}
    return {name: layer for name, layer in layers.items() if layer is not None}


def _halo_bytes(settings: RunSettings, task: InferRegion) -> int:
    working = task.slide.facts.working
    size = (working.height, working.width)
    stitch = settings.options.prediction.stitch
    halo = region_windows(task.region, *size, settings.windows, stitch).halo
    return 3 * halo.height * halo.width
