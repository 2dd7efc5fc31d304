"""Slides and a model -> one OME-Zarr mask a slide, and slides.parquet.

The way of a region, top to bottom:

    plan     a slide becomes rows of numbers: which regions hold tissue
    read     a region and its halo become one uint8 array
    predict  an actor cuts windows, runs the model, blends, takes the likeliest class
    write    the region's classes become one shard of the mask
    commit   the driver notes the region; with its last region a slide is done

No two tasks write one shard, and a task that runs twice writes the same bytes, so any
worker may die or be repeated. What the driver has noted is not computed again.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data

from medray import cluster
from medray.commit import HEADER, Commit, Row, Summary, changed_slides
from medray.errors import ConfigError, MedrayError
from medray.grid import Rectangle, Windows, plan_regions, region_windows
from medray.models.config import model_digest, read_config
from medray.progress import Progress
from medray.run import RunSettings, create_mask, mask_uri, open_run, probabilities_uri
from medray.slides import ArraySlide, Slide, open_slide
from medray.slides.digest import slide_digest
from medray.slides.levels import choose_level
from medray.slides.listing import find_slides
from medray.slides.tissue import tissue_share
from medray.store import files, omezarr
from medray.store.ledger import Ledger, slide_key

log = logging.getLogger(__name__)
UInt8 = npt.NDArray[np.uint8]


def infer(
    slides: Sequence[str],
    *,
    model: str,
    out: str,
    mpp: float | None = None,
    precision: str = "auto",
    probabilities: bool = False,
    everywhere: bool = False,
    region: int = omezarr.REGION,
) -> Summary:
    """Segment slides with a model: one OME-Zarr mask a slide in OUT/masks.

    Running the same command again finishes what is missing and does nothing twice.

    Args:
        slides: Files, globs, folders, s3:// or gs:// addresses.
        model: Model folder, as `medray train` writes it.
        out: Folder of the run; made if needed.
        mpp: Microns per pixel of slides whose files do not say.
        precision: auto, float32, bfloat16 or float16.
        probabilities: Store class probabilities too (uint8).
        everywhere: Predict glass as well as tissue.
        region: Side of a region in pixels, a multiple of 512.

    Raises:
        ConfigError: The request is wrong, or OUT holds a run of another model or of
            other settings.
    """
    settings = _settings(model, mpp, precision, probabilities, everywhere, region)
    out = files.absolute(out)
    open_run(out, settings)
    ledger = Ledger(out)
    wanted = find_slides(slides)
    todo = changed_slides(wanted, ledger)
    log.info("%d slides, %d of them to do, into %s", len(wanted), len(todo), out)
    skipped = len(wanted) - len(todo)
    if not todo:
        return Summary(out, 0, skipped, {}, 0, 0.0)
    cluster.connect()
    start = time.perf_counter()
    commit = Commit(ledger, functools.partial(_finish_mask, settings, out), _slide_row)
    with Progress("infer", len(todo)) as progress:
        for row in _chain(todo, settings, out, ledger):
            commit.take(row, progress)
        commit.finish(progress)
    ledger.close()
    return commit.summary(out, skipped, time.perf_counter() - start)


def _settings(
    model: str,
    mpp: float | None,
    precision: str,
    probabilities: bool,
    everywhere: bool,
    region: int,
) -> RunSettings:
    model = files.absolute(model)
    config = read_config(model)
    if precision not in ("auto", "float32", "bfloat16", "float16"):
        raise ConfigError(
            f"precision {precision!r}: expected auto, float32, bfloat16 or float16"
        )
    return RunSettings(
        model=model,
        model_digest=model_digest(model),
        classes=config.classes,
        windows=config.window,
        model_mpp=config.mpp,
        mpp=mpp,
        precision=precision,
        probabilities=probabilities,
        everywhere=everywhere,
        region=region,
        versions={
            name: importlib.metadata.version(name)
            for name in ("medray", "torch", "tifffile", "imagecodecs", "zarr")
        },
    )


def _chain(
    todo: list[Row], settings: RunSettings, out: str, ledger: Ledger
) -> Iterator[Row]:
    """Run plan -> read -> predict -> write over Ray Data; give a row a region."""
    committed = {key: sorted(regions) for key, regions in ledger.regions.items()}
    side = settings.region + 2 * settings.windows.size
    shared = {"settings": settings, "out": out}
    with cluster.streaming(block_bytes=3 * side * side):
        rows = (
            ray.data.from_items(todo, override_num_blocks=min(len(todo), 1000))
            .map_batches(
                _plan,
                batch_size=1,
                num_cpus=0.25,
                fn_kwargs={**shared, "committed": committed},
            )
            .repartition(target_num_rows_per_block=1)
            .map_batches(
                _read, batch_size=1, num_cpus=0.5, fn_kwargs={"settings": settings}
            )
            .map_batches(
                _Predict,
                batch_size=4,
                batch_format="pyarrow",
                compute=_actors(),
                fn_constructor_args=(settings,),
                **_actor_resources(),
            )
            .map_batches(
                _write,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=0.25,
                fn_kwargs=shared,
            )
        )
        for row in rows.iter_rows():
            yield json.loads(row["json"])


def _actors() -> ray.data.ActorPoolStrategy:
    if cluster.gpus():
        return ray.data.ActorPoolStrategy(min_size=1, max_size=cluster.gpus())
    nodes = sum(node["Alive"] for node in ray.nodes())
    return ray.data.ActorPoolStrategy(size=nodes)


def _actor_resources() -> dict[str, float]:
    """One actor a GPU; without GPUs one a node, which leaves a core for reading."""
    if cluster.gpus():
        return {"num_gpus": 1}
    return {"num_cpus": max(1, cluster.cpus_per_node() - 1)}


# --- plan -----------------------------------------------------------------------------


def _plan(
    batch: Row, *, settings: RunSettings, out: str, committed: dict[str, list[int]]
) -> Iterator[Row]:
    """One slide to its header row and a row for each region that is to be computed."""
    slide, uri = str(batch["slide"][0]), str(batch["uri"][0])
    before, stamp = json.loads(batch["before"][0]), str(batch["stamp"][0])
    header: Row = {"slide": slide, "uri": uri, "stamp": stamp, "index": HEADER}
    rows: list[Row] = []
    try:
        digest = slide_digest(uri)
        header["digest"] = digest
        if before and before["digest"] == digest:
            unchanged = before | {"stamp": stamp, "uri": uri}
            yield _packed(header | {"unchanged": unchanged, "todo": 0})
            return
        with open_slide(uri) as opened:
            facts, rows = _plan_slide(opened, settings)
        header |= facts | {"classes": settings.classes.names}
        done = set(committed.get(slide_key(slide, digest), ()))
        create_mask(slide, digest, facts, settings, out)
        rows = [row for row in rows if row["index"] not in done]
    except (MedrayError, OSError, MemoryError) as error:
        header["error"] = f"{error}"
    yield _packed(header | {"todo": len(rows)})
    for row in rows:
        yield _packed(
            {key: header[key] for key in ("slide", "uri", "digest")} | facts | row
        )


def _packed(row: Row, pixels: bytes | memoryview = b"") -> Row:
    """Make a block of one row: everything small as JSON, pixels as bytes."""
    return {"json": [json.dumps(row)], "pixels": [pixels]}


def _plan_slide(slide: Slide, settings: RunSettings) -> tuple[Row, list[Row]]:
    """Give a slide's facts and its regions with tissue, from a few coarse pixels."""
    level, note = choose_level(slide, settings.model_mpp, settings.mpp)
    chosen = slide.levels[level]
    height, width = chosen.height, chosen.width
    mpp = slide.mpp or settings.mpp
    if mpp is None and settings.model_mpp is not None:
        mpp = settings.model_mpp / chosen.downsample
    regions = list(plan_regions(height, width, settings.region))
    # A flat slide of one region is decoded once: its tissue is found when it is read.
    at_reading = len(regions) == 1 and len(slide.levels) == 1
    blocks = None
    if not settings.everywhere and not at_reading:
        blocks = tissue_share(slide, height, width, omezarr.PATCH) > 0
    rows = [
        {"index": i, "region": [r.y, r.x, r.height, r.width], "blocks": part.tolist()}
        for i, r in enumerate(regions)
        if (part := _blocks_of(r, blocks)).any()
    ]
    facts = {
        "level": level,
        "downsample": chosen.downsample,
        "mpp": None if mpp is None else mpp * chosen.downsample,
        "height": height,
        "width": width,
        "level0_height": slide.levels[0].height,
        "level0_width": slide.levels[0].width,
        "regions": len(rows),
        "note": note,
        "tissue_at_reading": at_reading and not settings.everywhere,
    }
    return facts, rows


def _blocks_of(
    region: Rectangle, blocks: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.bool_]:
    """Give which 512 px blocks of a region hold tissue."""
    y0, x0 = region.y // omezarr.PATCH, region.x // omezarr.PATCH
    y1, x1 = -(-region.bottom // omezarr.PATCH), -(-region.right // omezarr.PATCH)
    if blocks is None:
        return np.ones((y1 - y0, x1 - x0), dtype=bool)
    return blocks[y0:y1, x0:x1]


# --- read -----------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _opened(uri: str, digest: str) -> Slide:
    """Keep the slides at hand open; the digest tells a replaced file apart."""
    return open_slide(uri)


def _read(batch: Row, *, settings: RunSettings) -> Row:
    """Read one region with its halo; an unreadable one becomes a row with why."""
    row = json.loads(batch["json"][0])
    if row["index"] == HEADER:
        return _packed(row)
    start = time.time()
    try:
        pixels = _read_halo(_opened(row["uri"], row["digest"]), row, settings.windows)
        if row["tissue_at_reading"]:
            row["blocks"] = _tissue_of(pixels, row["height"], row["width"])
    except (MedrayError, OSError, MemoryError) as error:
        return _packed(row | {"error": f"{error}"})
    row |= {"read_at": start, "read_s": time.time() - start}
    if not np.any(row["blocks"]):
        return _packed(row)
    return _packed(row, pixels.tobytes())


def _read_halo(slide: Slide, row: Row, windows: Windows) -> UInt8:
    """Read the pixels of every window that touches a region.

    Returns:
        (halo height, halo width, 3) uint8; a slide smaller than a window is continued
        by its mirror image.
    """
    height, width = row["height"], row["width"]
    halo = region_windows(Rectangle(*row["region"]), height, width, windows).halo
    bottom, right = min(halo.bottom, height), min(halo.right, width)
    pixels = slide.read(halo.y, halo.x, bottom - halo.y, right - halo.x, row["level"])
    pad = ((0, halo.bottom - bottom), (0, halo.right - right), (0, 0))
    return np.pad(pixels, pad, mode="symmetric") if np.any(pad) else pixels


def _tissue_of(pixels: UInt8, height: int, width: int) -> list[list[bool]]:
    """Find the tissue of a slide that has been read whole."""
    slide = ArraySlide(pixels[:height, :width])
    blocks = tissue_share(slide, height, width, omezarr.PATCH) > 0
    return blocks.tolist()  # type: ignore[no-any-return]


# --- predict --------------------------------------------------------------------------


class _Predict:
    """The actor that holds the model."""

    def __init__(self, settings: RunSettings) -> None:
        from medray.models.predict import (
            Precision,
            Predictor,
            choose_device,
            use_threads,
        )

        if choose_device().type == "cpu":
            use_threads(cluster.cpus_per_node())
        precision: Precision = settings.precision  # type: ignore[assignment]
        self._windows = settings.windows
        self._predictor = Predictor.from_folder(
            settings.model, precision=precision, probabilities=settings.probabilities
        )

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Give the classes of a few regions; rows without pixels pass through."""
        from medray.models.predict import RegionPixels

        rows = [json.loads(text) for text in batch["json"].to_pylist()]
        inputs: list[tuple[Row, RegionPixels]] = []
        for row, value in zip(rows, batch["pixels"], strict=True):
            buffer = value.as_buffer()
            if not buffer.size:
                yield _table(row)
                continue
            region = Rectangle(*row["region"])
            size = (row["height"], row["width"])
            plan = region_windows(region, *size, self._windows)
            shape = (plan.halo.height, plan.halo.width, 3)
            pixels = np.frombuffer(buffer, np.uint8).reshape(shape)
            inputs.append((row, RegionPixels(pixels, plan, *size)))
        start = time.time()
        results = self._predictor.predict([pixels for _, pixels in inputs])
        for (row, _), result in zip(inputs, results, strict=True):
            row |= {"predict_s": (time.time() - start) / len(inputs)}
            parts = [result.labels]
            if result.probabilities is not None:
                parts.append(result.probabilities)
            yield _table(row, b"".join(part.tobytes() for part in parts))


def _table(row: Row, pixels: bytes = b"") -> pa.Table:
    return pa.table(
        {
            "json": pa.array([json.dumps(row)], pa.string()),
            "pixels": pa.array([pixels], pa.large_binary()),
        }
    )


# --- write ----------------------------------------------------------------------------


def _write(batch: pa.Table, *, settings: RunSettings, out: str) -> Row:
    """Write one region's shard; a slide of one region gets its pyramid at once."""
    row = json.loads(batch["json"][0].as_py())
    if row["index"] == HEADER or "error" in row:
        return {"json": [json.dumps(row)]}
    start = time.time()
    region = Rectangle(*row["region"])
    pixels = np.frombuffer(batch["pixels"][0].as_buffer(), np.uint8)
    shape = (1 + len(settings.classes) * settings.probabilities, *_shape(region))
    layers = pixels.reshape(shape) if pixels.size else np.zeros(shape, np.uint8)
    layers = np.where(_mask_of(row["blocks"], region), layers, np.uint8(0))
    counts = np.bincount(layers[0].ravel(), minlength=len(settings.classes))
    try:
        omezarr.write_region(mask_uri(out, row["slide"]), region, layers[0])
        if settings.probabilities:
            uri = probabilities_uri(out, row["slide"])
            omezarr.write_region(uri, region, layers[1:])
        if row["regions"] == 1:
            _finish_mask(settings, out, row["slide"])
    except (MedrayError, OSError) as error:
        return {"json": [json.dumps(row | {"error": f"{error}"})]}
    record = {key: row[key] for key in ("read_at", "read_s", "predict_s") if key in row}
    record |= {"class_px": counts.tolist(), "write_s": time.time() - start}
    row["record"] = record | {"written_at": time.time()}
    return {"json": [json.dumps(row)]}


def _shape(region: Rectangle) -> tuple[int, int]:
    return region.height, region.width


def _mask_of(blocks: list[list[bool]], region: Rectangle) -> npt.NDArray[np.bool_]:
    """Enlarge a region's tissue blocks to its pixels, (height, width)."""
    ones = np.ones((omezarr.PATCH, omezarr.PATCH), dtype=bool)
    whole = np.kron(np.asarray(blocks, dtype=bool), ones)
    return whole[: region.height, : region.width]


def _finish_mask(settings: RunSettings, out: str, slide: str) -> None:
    """Build the pyramid, once all regions are written."""
    omezarr.build_pyramid(mask_uri(out, slide))
    if settings.probabilities:
        omezarr.build_pyramid(probabilities_uri(out, slide))


# --- commit ---------------------------------------------------------------------------


def _slide_row(header: Row, regions: list[Row]) -> Row:
    """Sum up a finished slide for slides.parquet."""
    row = {key: header[key] for key in _FACTS}
    classes = header["classes"]
    counts = np.zeros(len(classes), np.int64)
    for region in regions:
        counts += np.asarray(region["class_px"])
    counts[0] += header["height"] * header["width"] - counts.sum()
    row |= {f"px_{name}": int(n) for name, n in zip(classes, counts, strict=True)}
    for part in ("read_s", "predict_s", "write_s"):
        row[part] = sum(region.get(part, 0.0) for region in regions)
    row["first_read_at"] = min((r["read_at"] for r in regions), default=None)
    row["last_write_at"] = max((r["written_at"] for r in regions), default=None)
    return row


_FACTS = (
    "level",
    "downsample",
    "mpp",
    "height",
    "width",
    "level0_height",
    "level0_width",
    "regions",
    "note",
)
