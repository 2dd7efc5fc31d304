"""Slides and a frozen encoder -> a vector for each tile of tissue.

The way of a region is that of `medray.infer`, with other work at the ends:

    plan       slides become regions of tiles, numbers only: which hold tissue
    GPU worker an actor for each GPU: reads ahead, encodes tiles, writes behind
    commit     the driver notes the region; with its last one a slide is put together
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from medray.datasets import with_overrides
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
from medray.inference import SlideFacts, choose_compile, with_fallback
from medray.mil.features import FeatureSettings, parts_uri
from medray.mil.tiles import (
    Bool,
    SeenTiles,
    TilesRecord,
    TilesTask,
    cut_tiles,
    finish_tiles,
    plan_tiles,
    read_tiles,
    sum_up,
    tile_bytes,
    write_tiles,
)
from medray.models import Compile, Precision
from medray.slides import Slide, SlideFile, find_slides
from medray.storage import (
    Ledger,
    files,
    from_dict,
    keep_settings,
    locked,
    read_yaml,
)
from medray.types import Executor, Layers

# Side of a region in pixels, about.
_REGION = 3584


def embed(
    slides: Sequence[str],
    *,
    encoder: str,
    weights: str,
    out: str,
    tile_mpp: float = 0.5,
    mpp: float | str | None = None,
    scene: int | None = None,
    plane: int | None = None,
    tile: int = 224,
    tissue: float = 0.25,
    precision: Precision = "auto",
    compile: Compile = "auto",
    region: int = 0,
    executor: Executor = "auto",
) -> Summary:
    """Make features of slides: one zarr a slide in OUT/features.

    Running the same command again finishes what is missing and does nothing twice.

    Args:
        slides: Files, globs, folders, s3:// or gs:// addresses, or a dataset.
        encoder: A network of timm, by its name there.
        weights: File of its weights: safetensors, or a state dict by torch.save.
        out: Folder to make.
        tile_mpp: Microns per pixel of the tiles.
        mpp: Microns per pixel of level 0 of the slides, over what their files say; or a
            CSV (slide,mpp) with those of some.
        scene: Which of several slides in a file, from 0 in the file's order.
        plane: Which of several focal planes, from 0.
        tile: Their side, pixels.
        tissue: Least share of tissue of a tile.
        precision: Of the encoder's arithmetic; with float32 features are stored as
            float32, else as float16.
        compile: Compile the encoder for the device; auto: for a GPU.
        region: Side of a region in tiles; 0: about 3584 pixels.
        executor: Where it runs: Ray, processes of this machine, or this one (local).
            `auto`: Ray, but processes where no cluster is named and the files are few.

    Raises:
        ConfigError: The request is wrong, or OUT holds features of another encoder or
            of other settings, or another process works there.
        CompileError: The encoder cannot be compiled, as was asked for, or as what is
            there was. Where it was left open (`auto`) it is then not compiled.
        StoreError: OUT cannot be written, or the slides' store does not answer.
        StoppedError: SIGTERM or Ctrl-C; what is complete is kept.
    """
    from medray.mil.encoder import settle_encoder

    if not 32 <= tile <= 2048:
        raise ConfigError(f"tile: expected 32 to 2048 px, found {tile}")
    weights, out = files.absolute(weights), files.absolute(out)
    names = ("medray", "torch", "timm", "tifffile", "imagecodecs")
    settings = FeatureSettings(
        encoder=settle_encoder(encoder, weights, tile=tile, mpp=tile_mpp),
        weights=weights,
        tissue=tissue,
        precision=precision,
        region=region or max(1, round(_REGION / tile)),
        versions={name: importlib.metadata.version(name) for name in names},
    )
    with locked(out, "embed") as check:
        found = with_overrides(find_slides(slides), mpp=mpp, scene=scene, plane=plane)
        executor = settle_executor(executor, [slide.uri for slide in found])
        chosen = choose_compile(_kept(out), executor) if compile == "auto" else compile
        return with_fallback(
            lambda settings: _embed(found, settings, out, executor, check),
            replace(settings, compile=chosen),
            replace(settings, compile="off") if compile == "auto" else None,
            files.join(out, "features.yaml"),
        )


def _kept(out: str) -> Compile | None:
    """Return whether what was begun is compiled; None: nothing was begun."""
    uri = files.join(out, "features.yaml")
    if not files.exists(uri):
        return None
    return from_dict(FeatureSettings, read_yaml(uri), uri).compile


def _embed(
    wanted: list[SlideFile],
    settings: FeatureSettings,
    out: str,
    executor: Executor,
    check: Callable[[], None],
) -> Summary:
    keep_settings(files.join(out, "features.yaml"), settings)

    def prepare(_: list[SlideFile]) -> None:
        if executor == "ray":
            _check_memory(settings)

    ledger = Ledger(out)
    stage = stage_of(settings, out)
    summary = run_stage(
        stage, wanted, ledger, executor=executor, check=check, prepare=prepare
    )
    ledger.close()
    if summary.done or summary.failed:
        for slide, row in ledger.slides.items():
            if row["status"] == "done":
                files.remove(parts_uri(out, slide))
    return summary


type EmbedStage = Stage[SlideFacts, Bool, SeenTiles, TilesRecord, None]


def stage_of(settings: FeatureSettings, out: str) -> EmbedStage:
    """Return what embedding does with slides."""
    return Stage(
        name="embed",
        out=out,
        record=TilesRecord,
        plan=functools.partial(_plan, settings=settings),
        read=functools.partial(read_tiles, settings=settings),
        device=Device(
            load=functools.partial(_load, settings),
            source=_source,
            layers=_layers,
            read_bytes=tile_bytes,
        ),
        write=functools.partial(write_tiles, settings=settings, out=out),
        finish=functools.partial(finish_tiles, settings=settings, out=out),
        slide_row=sum_up,
        timeout=settings.timeout,
    )


def _check_memory(settings: FeatureSettings) -> None:
    """Check that a node has the memory that embedding may need.

    Raises:
        ConfigError: It has less.
    """
    # Imported here: without Ray there is no cluster whose memory counts.
    from medray.execution import cluster, memory

    side, encoder = settings.region, settings.encoder
    pixels = 3 * (side * encoder.tile) ** 2
    written = 4 * side**2 * encoder.dimensions
    gpu_worker = memory.GPU_WORKER_BYTES + 2 * files.size(settings.weights)
    # The tiles are a copy of the region's pixels; batches add little.
    bound, _ = memory.bounds_of(pixels, written, pixels, gpu_worker)
    memory.check_budget(bound, cluster.memory_per_node())


def _plan(
    source: SlideInput, _: str, slide: Slide, settings: FeatureSettings
) -> tuple[SlideFacts, list[PlannedRegion[Bool]]]:
    """Return a slide's facts and its regions."""
    return plan_tiles(slide, settings, source.file.mpp)


def _load(settings: FeatureSettings, threads: int) -> Any:
    from medray.mil.encoder import Embedder

    return Embedder.from_file(
        settings.encoder,
        settings.weights,
        settings.precision,
        settings.dtype,
        compiled=settings.compile == "on",
        threads=threads,
    )


def _source(task: TilesTask, seen: SeenTiles, arrays: Layers) -> Any:
    from medray.mil.encoder import TilePixels

    return TilePixels(cut_tiles(arrays["pixels"], seen.tiles))


def _layers(result: Any) -> Layers:
    return {"features": result.features}
