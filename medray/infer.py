"""Slides and models -> one OME-Zarr mask a slide, and slides.parquet.

The way of a region, top to bottom:

    plan     slides become packets of regions, numbers only: which hold tissue
    lane     an actor a GPU takes a packet and keeps its device busy:
      read     tasks read regions and their halos ahead, within a budget of bytes
      predict  windows of successive regions share batches; classes come out
      write    they write the classes as the region's shards
    commit   the driver notes the region; with its last region a slide is done

Pixels go from the readers to the lane and from the lane to the writers; the driver and
Ray Data only see packets and outcomes. No two tasks write one shard, and a task that
runs twice writes the same bytes, so any worker may die or be repeated. What the driver
has noted is not computed again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import queue
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import ray
import ray.data
from ray.util.metrics import Counter

from medray import budget, cluster
from medray.commit import HEADER, Commit, Row, Summary, changed_slides
from medray.errors import ConfigError, MedrayError, SlideError
from medray.grid import Rectangle, region_side, region_windows
from medray.models.config import model_digest, read_config
from medray.plan import coarse_mask, plan_slide, wanted_windows
from medray.progress import Progress
from medray.region import (
    RegionIO,
    finish_slide,
    opened,
    read_region,
    working_of,
    write_region,
)
from medray.run import (
    Options,
    RunSettings,
    against_plan,
    create_mask,
    open_run,
    raw_uri,
)
from medray.slides.digest import slide_digest
from medray.slides.listing import find_slides
from medray.store import files, omezarr
from medray.store.ledger import Ledger, slide_key

log = logging.getLogger(__name__)
UInt8 = npt.NDArray[np.uint8]


def infer(
    slides: Sequence[str],
    *,
    model: str | Sequence[str],
    out: str,
    options: Options | None = None,
) -> Summary:
    """Segment slides with a model: one OME-Zarr mask a slide in OUT/masks.

    Running the same command again finishes what is missing and does nothing twice.

    Args:
        slides: Files, globs, folders, s3:// or gs:// addresses, or a dataset.
        model: Model folder, as `medray train` writes it, or several: an ensemble.
        out: Folder of the run; made if needed.
        options: How; by default the model's way.

    Raises:
        ConfigError: The request is wrong, or OUT holds a run of another model or of
            other settings.
    """
    options = options or Options()
    settings = settings_of([model] if isinstance(model, str) else model, options)
    out = files.absolute(out)
    open_run(out, settings)
    ledger = Ledger(out)
    wanted = find_slides(slides)
    areas: dict[str, str] = {}
    if options.within:
        from medray.annotations.matching import match_annotations

        areas = match_annotations(wanted, options.within)
        wanted = [slide for slide in wanted if slide.slide in areas]
        if not wanted:
            raise ConfigError(f"{options.within}: no annotation is named like a slide")
    todo = changed_slides(wanted, ledger, areas)
    log.info("%d slides, %d of them to do, into %s", len(wanted), len(todo), out)
    skipped = len(wanted) - len(todo)
    if not todo:
        return Summary(out, 0, skipped, {}, 0, 0.0)
    cluster.connect()
    most, there = budget.bounds(settings)[0], cluster.memory_per_node()
    budget.check_budget(most, there)
    log.info(
        "%d lanes, regions of %d px, at most %.1f GiB of memory a node of %.1f GiB",
        cluster.lanes(),
        settings.options.region,
        most / 2**30,
        there / 2**30,
    )
    if options.coarse > 1:
        _first_pass([row["uri"] for row in todo], settings, out)
    start = time.perf_counter()
    commit = Commit(ledger, functools.partial(finish_slide, settings, out), _slide_row)
    with Progress("infer", len(todo)) as progress:
        for row in _chain(todo, settings, out, ledger):
            commit.take(row, progress)
        commit.finish(progress)
    ledger.close()
    _remove_raw(out, settings, ledger)
    for about, words in against_plan(out, ledger.slides.values()).items():
        log.info("%s: %s", about, words)
    return commit.summary(out, skipped, time.perf_counter() - start)


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
    side = options.region or region_side(config.window, omezarr.PATCH)
    digests = [model_digest(folder) for folder in folders]
    whole = hashlib.blake2b(" ".join(digests).encode(), digest_size=16).hexdigest()
    return RunSettings(
        models=folders,
        model_digest=digests[0] if len(digests) == 1 else f"blake2b:{whole}",
        classes=config.classes,
        windows=config.window,
        model_mpp=config.mpp,
        options=replace(options, region=side),
        versions={
            name: importlib.metadata.version(name)
            for name in ("medray", "torch", "tifffile", "imagecodecs", "zarr")
        },
    )


def _first_pass(slides: list[str], settings: RunSettings, out: str) -> None:
    """Predict at a coarser level, to know where it is worth looking closely."""
    options = settings.options
    if settings.model_mpp is None:
        raise ConfigError("coarse needs a model that names its microns per pixel")
    coarse = replace(
        settings,
        model_mpp=settings.model_mpp * options.coarse,
        options=replace(options, coarse=1, outlines=False),
    )
    out = files.join(out, "coarse")
    open_run(out, coarse)
    ledger = Ledger(out)
    todo = changed_slides(find_slides(slides), ledger)
    commit = Commit(ledger, functools.partial(finish_slide, coarse, out), _slide_row)
    with Progress("coarse", len(todo)) as progress:
        for row in _chain(todo, coarse, out, ledger) if todo else ():
            commit.take(row, progress)
        commit.finish(progress)
    ledger.close()


def _chain(
    todo: list[Row], settings: RunSettings, out: str, ledger: Ledger
) -> Iterator[Row]:
    """Run plan -> lanes over Ray Data; give a row a region."""
    committed = {key: sorted(regions) for key, regions in ledger.regions.items()}
    gpus = cluster.gpus()
    lanes = cluster.lanes()
    packet = 16 if gpus else 8
    share = max(1, min(packet, -(-len(todo) // (2 * lanes))))
    groups = [
        {"json": json.dumps(todo[first : first + share])}
        for first in range(0, len(todo), share)
    ]
    # Every row is a block of its own: a packet goes out when it is planned, an outcome
    # comes back when its region is written.
    with cluster.streaming(block_bytes=1):
        rows = (
            ray.data.from_items(groups, override_num_blocks=min(len(groups), 1000))
            .map_batches(
                Planner,
                batch_size=1,
                num_cpus=0.25,
                # Actors, as tasks come so rarely that each would start a process.
                compute=ray.data.ActorPoolStrategy(min_size=1, max_size=lanes),
                fn_constructor_args=(settings, out, committed, packet),
            )
            .map_batches(
                Lane,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(
                    min_size=1,
                    max_size=lanes,
                    initial_size=min(lanes, len(groups)),
                    # While one packet's last regions are written the next is predicted.
                    max_concurrent_calls_per_actor=budget.PACKETS,
                    # Twice as many wait for it: by that Ray Data sees that more lanes
                    # would help (it adds one at 1.75).
                    max_tasks_in_flight_per_actor=2 * budget.PACKETS,
                    enable_true_multi_threading=True,
                ),
                fn_constructor_args=(settings, out),
                **lane_resources(),
            )
        )
        for outcomes in rows.iter_batches(
            batch_size=None, prefetch_batches=0, batch_format="pyarrow"
        ):
            for text in outcomes["json"]:
                yield from json.loads(text.as_py())


def lane_resources() -> dict[str, float]:
    """One lane a GPU; without GPUs one a node, which leaves a core for reading."""
    if cluster.gpus():
        return {"num_gpus": 1}
    return {"num_cpus": max(1, cluster.cpus_per_node() - 1)}


# --- plan -----------------------------------------------------------------------------


class Planner:
    """Plans slides: headers, thumbnails, empty masks; no pixels at working level."""

    def __init__(
        self,
        settings: RunSettings,
        out: str,
        committed: dict[str, list[int]],
        packet: int,
    ) -> None:
        """Take what all slides share."""
        self._settings, self._out = settings, out
        self._committed, self._packet = committed, packet

    def __call__(self, batch: Row) -> Iterator[Row]:
        """Plan some slides, make their empty masks, give their regions in packets."""
        rows: list[Row] = []
        for slide in json.loads(batch["json"][0]):
            rows += _plan_one(slide, self._settings, self._out, self._committed)
            while len(rows) >= self._packet:
                yield {"json": [json.dumps(rows[: self._packet])]}
                rows = rows[self._packet :]
        if rows:
            yield {"json": [json.dumps(rows)]}


def _plan_one(
    row: Row, settings: RunSettings, out: str, committed: dict[str, list[int]]
) -> list[Row]:
    """Give a row for each region to do, or one that says why there is none."""
    header = row | {"index": HEADER, "todo": 0}
    try:
        header["digest"] = slide_digest(row["uri"])
        before = json.loads(row["before"])
        if before and before["digest"] == header["digest"]:
            # Touched, not changed: its mask stands, its row comes back.
            return [header | {"unchanged": before | {"stamp": row["stamp"]}}]
        coarse = coarse_mask(out, row["slide"]) if settings.options.coarse > 1 else ""
        slide = opened(row["uri"], header["digest"])
        facts, regions = plan_slide(slide, settings, row["annotation"], coarse)
        working = working_of(facts)
        create_mask(row["slide"], header["digest"], working, settings, out)
        done = set(committed.get(slide_key(row["slide"], header["digest"]), ()))
        regions = [region for region in regions if region["index"] not in done]
        header |= facts | {"todo": len(regions), "classes": settings.classes.names}
        if not regions and header["regions"] <= 1:
            header |= finish_slide(settings, out, row["slide"])
    except (MedrayError, OSError) as error:
        return [header | {"error": f"{error}"}]
    del header["before"]
    return [header | region for region in regions] or [header]


# --- lane -----------------------------------------------------------------------------


class Lane:
    """One device with all that keeps it busy: readers ahead of it, writers behind.

    One thread has the device to itself. Two packets may be under way: the second is
    read while the first is predicted, and predicted while the last regions of the
    first are written.
    """

    def __init__(self, settings: RunSettings, out: str) -> None:
        """Load the models onto the device."""
        self._settings, self._out = settings, out
        self._device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self._predictor = self._device.submit(self._load).result()
        gpu = self._predictor.device.type == "cuda"
        self._ahead_bytes = budget.AHEAD_BYTES[gpu]
        self._group = 8 if gpu else 1
        self._hands = _Hands(gpu)
        self._regions = Counter("medray_regions", "Regions predicted.")
        self._pixels = Counter("medray_pixels", "Pixels predicted.")
        self._failures = Counter("medray_region_failures", "Regions that failed.")
        self._waited = Counter(
            "medray_lane_waited_seconds", "How long a device waited for pixels."
        )

    def _load(self) -> Any:
        from medray.models.predict import Predictor

        predictor = Predictor.from_folders(
            self._settings.models,
            self._settings.options.prediction,
            threads=cluster.cpus_per_node(),
        )
        predictor.warm_up()
        return predictor

    def __call__(self, batch: Row) -> Iterator[Row]:
        """Work on a packet; give outcomes in its order, a few at a time.

        The order and the grouping are those of the packet, so that a repeated call
        gives the same blocks and none is lost or counted twice.
        """
        outcomes: list[Row] = []
        for row in self._work(json.loads(batch["json"][0])):
            outcomes.append(row)
            if len(outcomes) == self._group:
                yield {"json": [json.dumps(outcomes)]}
                outcomes = []
        if outcomes:
            yield {"json": [json.dumps(outcomes)]}

    def _work(self, rows: list[Row]) -> Iterator[Row]:
        ahead = _ReadAhead(self._hands, rows, self._settings, self._ahead_bytes)
        predicted: queue.Queue[Any] = queue.Queue(budget.UNWRITTEN // 3)
        predicting = self._device.submit(self._predict, ahead, predicted)
        writes: deque[tuple[Row, Any]] = deque()
        more = True
        while more or writes:
            if writes and (
                not more
                or len(writes) > budget.UNWRITTEN * 2 // 3
                or _is_ready(writes[0][1])
            ):
                yield self._outcome(*writes.popleft())
                continue
            try:
                item = predicted.get(timeout=0.1 if writes else None)
            except queue.Empty:
                continue
            if item is None:
                predicting.result()  # raises what went wrong
                more = False
            else:
                writes.append((item[0], self._start_writing(*item)))

    def _predict(self, ahead: _ReadAhead, predicted: queue.Queue[Any]) -> None:
        """Predict a packet in the device's thread; None ends what it gives."""
        try:
            for item in self._predicted(ahead):
                predicted.put(item)
        finally:
            predicted.put(None)

    def _predicted(self, ahead: _ReadAhead) -> Iterator[tuple[Row, dict[str, UInt8]]]:
        """Give the rows in their order, with what the models make of their pixels."""
        waiting: deque[tuple[Row, bool]] = deque()

        def regions() -> Iterator[Any]:
            for row, pixels, waited in ahead:
                waiting.append((row, pixels is not None))
                if pixels is not None:
                    self._waited.inc(waited)
                    row["waited_s"] = waited
                    yield self._region_pixels(row, pixels)

        def passed_through() -> Iterator[tuple[Row, dict[str, UInt8]]]:
            while waiting and not waiting[0][1]:
                yield waiting.popleft()[0], {}

        start = time.perf_counter()
        for result in self._predictor.predict(regions()):
            yield from passed_through()
            row, _ = waiting.popleft()
            row["predict_s"] = time.perf_counter() - start
            self._regions.inc()
            self._pixels.inc(row["region"][2] * row["region"][3])
            layers = {
                "labels": result.labels,
                "probabilities": result.probabilities,
                "uncertainty": result.uncertainty,
                "disagreement": result.disagreement,
            }
            yield row, {k: v for k, v in layers.items() if v is not None}
            start = time.perf_counter()
        yield from passed_through()

    def _region_pixels(self, row: Row, pixels: UInt8) -> Any:
        from medray.models.predict import RegionPixels

        size = (row["height"], row["width"])
        windows, how = self._settings.windows, self._settings.options.prediction
        plan = region_windows(Rectangle(*row["region"]), *size, windows, how.stitch)
        wanted = wanted_windows(row, self._settings)
        row["windows"] = int(wanted.sum())
        return RegionPixels(pixels, plan, *size, wanted)

    def _start_writing(self, row: Row, layers: dict[str, UInt8]) -> Any:
        if row["index"] == HEADER or "error" in row:
            return None
        return self._hands.start("write", row, layers, self._settings, self._out)

    def _outcome(self, row: Row, write: Any) -> Row:
        if write is not None:
            try:
                row = write.result()
            except ray.exceptions.RayError as error:
                row = row | {"error": f"{row['uri']}: the writer died ({error})"}
        if "error" in row:
            self._failures.inc()
        return row


def _is_ready(write: Any) -> bool:
    return write is None or write.is_ready()


class _Hands:
    """The processes that read and write a lane's regions.

    Actors rather than tasks: Ray ends a process that had no task for a second, and a
    lane without a GPU gives one less often; starting one costs as much as a region.
    """

    def __init__(self, gpu: bool) -> None:
        actor = ray.remote(RegionIO).options(num_cpus=0.25, max_restarts=-1)
        self._actors = [actor.remote() for _ in range(budget.hands_of(gpu))]
        # Readers and writers take turns from opposite ends.
        self._turns = {
            "read": itertools.cycle(self._actors),
            "write": itertools.cycle(reversed(self._actors)),
        }

    def start(self, name: str, *args: Any) -> _Started:
        """Start to `read` or to `write`."""
        return _Started(name, args, getattr(next(self._turns[name]), name))


class _Started:
    """Work that was given to a hand."""

    def __init__(self, name: str, args: tuple[Any, ...], method: Any) -> None:
        self._name, self._args = name, args
        self._returns = 2 if name == "read" else 1
        self._ref = method.options(num_returns=self._returns).remote(*args)

    def is_ready(self) -> bool:
        refs = self._ref if isinstance(self._ref, list) else [self._ref]
        return bool(ray.wait(refs, num_returns=len(refs), timeout=0)[0])

    def result(self) -> Any:
        """Wait for what comes of it.

        When a process dies, all that was given to it is lost, also what is innocent of
        its death. So each is repeated once in a process of its own.

        Raises:
            ray.exceptions.RayError: That one died too.
        """
        try:
            return ray.get(self._ref)
        except ray.exceptions.RayError:
            work = {"read": read_region, "write": write_region}[self._name]
            alone = ray.remote(work).options(
                num_cpus=0.25, max_retries=0, num_returns=self._returns
            )
            return ray.get(alone.remote(*self._args))


class _ReadAhead:
    """Reads the regions of a packet in their order, some bytes ahead."""

    def __init__(
        self,
        hands: _Hands,
        rows: list[Row],
        settings: RunSettings,
        ahead_bytes: int,
    ) -> None:
        self._hands, self._settings = hands, settings
        self._todo = deque(rows)
        self._under_way: deque[tuple[Row, Any]] = deque()
        self._free = ahead_bytes
        self._fill()

    def _fill(self) -> None:
        while self._todo and (self._free > 0 or not self._under_way):
            row = self._todo.popleft()
            if row["index"] == HEADER:
                self._under_way.append((row, None))
                continue
            self._free -= _halo_bytes(row, self._settings)
            self._under_way.append(
                (row, self._hands.start("read", row, self._settings))
            )

    def __iter__(self) -> Iterator[tuple[Row, UInt8 | None, float]]:
        """Give each row with its pixels, and how many seconds they were waited for."""
        while self._under_way:
            row, reading = self._under_way.popleft()
            start = time.perf_counter()
            pixels: UInt8 | None = None
            if reading is not None:
                self._free += _halo_bytes(row, self._settings)
                try:
                    row, pixels = reading.result()
                except ray.exceptions.RayError as error:
                    kind = type(error).__name__
                    row = row | {"error": f"{row['uri']}: its reader died ({kind})"}
            self._fill()
            yield row, pixels, time.perf_counter() - start


def _halo_bytes(row: Row, settings: RunSettings) -> int:
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
    row = {key: header[key] for key in _FACTS}
    total = header["height"] * header["width"]
    unreadable = sum(region.get("unreadable_px", 0) for region in regions)
    if unreadable and unreadable >= sum(sum(region["class_px"]) for region in regions):
        raise SlideError(next(r["why"] for r in regions if "why" in r))
    if unreadable:
        why = next(r["why"] for r in regions if r.get("unreadable_px"))
        said = f"{unreadable / total:.2%} of its pixels cannot be read: {why}"
        row["note"] = f"{row['note']}; {said}" if row["note"] else said
    row["unreadable_px"] = unreadable
    classes = header["classes"]
    counts = np.zeros(len(classes), np.int64)
    for region in regions:
        counts += np.asarray(region["class_px"])
    counts[0] += total - counts.sum()
    for one in (header, *regions):  # of a mask that was cleaned, its own counts
        counts = np.asarray(one.get("cleaned_px", counts))
    row |= {f"px_{name}": int(n) for name, n in zip(classes, counts, strict=True)}
    looked_at = sum(region["predicted_px"] for region in regions)
    row["predicted_px"] = looked_at
    counts[0] = max(0, looked_at - int(counts[1:].sum()))
    row["label"] = classes[int(counts.argmax())] if looked_at else classes[0]
    for layer, most in (("uncertainty", 255), ("disagreement", 1)):
        if looked_at and regions[0].get(f"{layer}_sum") is not None:
            total = sum(region[f"{layer}_sum"] for region in regions)
            row[layer] = total / most / looked_at
    for part in ("read_s", "predict_s", "waited_s", "write_s", "windows"):
        row[part] = sum(region.get(part, 0) for region in regions)
    row["first_read_at"] = min((r["read_at"] for r in regions), default=None)
    row["last_write_at"] = max((r["written_at"] for r in regions), default=None)
    return row


_FACTS = (
    "level",
    "scale",
    "downsample",
    "mpp",
    "height",
    "width",
    "level0_height",
    "level0_width",
    "regions",
    "note",
)
