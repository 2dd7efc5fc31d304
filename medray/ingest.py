"""Slides and annotations -> a dataset that training reads straight from.

The way of a slide, top to bottom:

    plan     its size, tissue and annotation; the empty OME-Zarr; a row a region
    cut      a region is read, labelled and written: one shard of pixels, one of labels
    commit   the driver notes the region and its patches; with the last one the
             pyramids are built and the slide is done
    split    slides go to train, val and test, never two of one patient apart
"""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import ray
import ray.data

from medray import cluster
from medray.annotations import (
    Area,
    rasterise,
    read_annotation,
)
from medray.annotations.matching import match_annotations
from medray.classes import Classes
from medray.commit import HEADER, Commit, Row, Summary, changed_slides
from medray.dataset import (
    LABELS,
    SPLITS,
    DatasetSettings,
    labels_uri,
    open_dataset,
    read_groups,
    slide_uri,
    split_slides,
    write_patches,
)
from medray.errors import ConfigError, MedrayError
from medray.grid import Rectangle, plan_regions
from medray.pool import Pool, poll
from medray.progress import Progress
from medray.slides import ArraySlide, Slide, open_slide
from medray.slides.digest import slide_digest
from medray.slides.listing import SlideFile, find_slides
from medray.slides.tissue import tissue_share
from medray.store import files, omezarr
from medray.store.ledger import Ledger, slide_key
from medray.store.lock import locked

log = logging.getLogger(__name__)


def ingest(
    slides: Sequence[str],
    *,
    out: str,
    annotations: str | None = None,
    classes: tuple[str, ...] = ("background", "tumour"),
    mpp: float | None = None,
    groups: str | None = None,
    splits: str | None = None,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
) -> Summary:
    """Turn slides and their annotations into a dataset of zarr-tiled patches.

    Running the same command again finishes what is missing; slides that are done and
    have not changed are skipped.

    Args:
        slides: Files, globs, folders, s3:// or gs:// addresses.
        out: Folder of the dataset; made if needed.
        annotations: Folder of SVG, GeoJSON, ASAP or ImageScope XML or mask images,
            named like their slides.
        classes: Names by label value, the background first.
        mpp: Microns per pixel of slides whose files do not say.
        groups: CSV (slide,group): slides of one group (patient) stay in one split.
        splits: CSV (slide,split) that says train, val or test itself.
        fractions: Shares of slides in train, val and test.
        seed: Decides the splits.

    Raises:
        ConfigError: The request is wrong, OUT was made with other settings, or another
            process works there.
    """
    settings = DatasetSettings(classes=Classes(tuple(classes)), mpp=mpp)
    out = files.absolute(out)
    _check_fractions(fractions)
    wanted = find_slides(slides)
    matched = match_annotations(wanted, annotations)
    group_of = read_groups(groups, "group") if groups else {}
    split_of = _read_splits(splits) if splits else None
    with locked(out, "ingest"):
        open_dataset(out, settings)
        assign = functools.partial(
            _assign_splits,
            group_of=group_of,
            split_of=split_of,
            fractions=fractions,
            seed=seed,
        )
        return _ingest(wanted, matched, settings, out, assign)


def _ingest(
    wanted: list[SlideFile],
    matched: dict[str, str],
    settings: DatasetSettings,
    out: str,
    assign_splits: Callable[[Ledger], None],
) -> Summary:
    # The regions of all slides become patches.parquet at the end.
    ledger = Ledger(out, keep_finished=True)
    todo = changed_slides(wanted, ledger, matched)
    log.info("%d slides, %d of them to do, into %s", len(wanted), len(todo), out)
    start = time.perf_counter()
    commit = Commit(ledger, _slide_row)
    if todo:
        cluster.connect()
        start = time.perf_counter()
        actor = ray.remote(_PyramidBuilder).options(num_cpus=0)
        start_builder = functools.partial(actor.remote, out)
        with (
            Progress("ingest", len(todo)) as progress,
            Pool(start_builder, "work", 1) as builders,
        ):
            for row in _chain(todo, settings, out, ledger):
                header = commit.take(row, progress)
                if header is not None:
                    builders.give([header])
                for _, complete, result in poll(builders, wait=False):
                    commit.finished(complete, result, progress)
            while builders.busy:
                for _, complete, result in poll(builders):
                    commit.finished(complete, result, progress)
            commit.close(progress)
    assign_splits(ledger)
    _write_patches(out, ledger)
    ledger.close()
    skipped = len(wanted) - len(todo)
    return commit.summary(out, skipped, time.perf_counter() - start)


def _check_fractions(fractions: tuple[float, float, float]) -> None:
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(
            f"fractions: expected three shares of train, val and test that sum to 1, "
            f"found {list(fractions)}"
        )


def _chain(
    todo: list[Row], settings: DatasetSettings, out: str, ledger: Ledger
) -> Iterator[Row]:
    """Run plan -> cut over Ray Data; give a row a region."""
    committed = {key: sorted(regions) for key, regions in ledger.regions.items()}
    shared = {"settings": settings, "out": out}
    with cluster.streaming(block_bytes=1 << 20):
        rows = (
            ray.data.from_items(todo, override_num_blocks=min(len(todo), 1000))
            .map_batches(
                _plan,
                batch_size=1,
                num_cpus=0.5,
                fn_kwargs={**shared, "committed": committed},
            )
            .repartition(target_num_rows_per_block=1)
            .map_batches(_cut, batch_size=1, num_cpus=1, fn_kwargs=shared)
        )
        for row in rows.iter_rows():
            yield json.loads(row["json"])


# --- plan -----------------------------------------------------------------------------


def _plan(
    batch: Row, *, settings: DatasetSettings, out: str, committed: dict[str, list[int]]
) -> Iterator[Row]:
    """One slide to its header row and a row for each region that is to be cut."""
    names = ("slide", "uri", "annotation", "stamp")
    header: Row = {name: str(batch[name][0]) for name in names}
    header["index"] = HEADER
    before = json.loads(batch["before"][0])
    rows: list[Row] = []
    try:
        digest = slide_digest(header["uri"])
        if header["annotation"]:
            digest += f"+{slide_digest(header['annotation'])}"
        header["digest"] = digest
        if before and before["digest"] == digest:
            unchanged = before | {name: header[name] for name in names}
            yield _packed(header | {"unchanged": unchanged, "todo": 0})
            return
        with open_slide(header["uri"]) as slide:
            facts, rows = _plan_slide(slide, header, settings)
        header |= facts
        new = _create_slide(header, settings, out)
        key = slide_key(header["slide"], digest)
        done = set() if new else set(committed.get(key, ()))
        rows = [row for row in rows if row["index"] not in done]
    except (MedrayError, OSError, MemoryError) as error:
        header["error"] = f"{error}"
        rows = []
    yield _packed(header | {"todo": len(rows)})
    for row in rows:
        yield _packed(header | row)


def _packed(row: Row) -> Row:
    return {"json": [json.dumps(row)]}


def _plan_slide(
    slide: Slide, header: Row, settings: DatasetSettings
) -> tuple[Row, list[Row]]:
    """Give a slide's facts, and its regions that hold tissue or annotation."""
    height, width = slide.levels[0].height, slide.levels[0].width
    areas: list[Area] = []
    if header["annotation"]:
        areas = _areas(header["annotation"], header["digest"], height, width, settings)
        for area in areas:
            settings.classes.value(area.class_name)
    regions = list(plan_regions(height, width, settings.region))
    # A flat slide of one region is decoded once: its tissue is found when it is read.
    at_cutting = len(regions) == 1 and len(slide.levels) == 1
    share = None
    if not at_cutting:
        share = tissue_share(slide, height, width, settings.patch)
    bounds = [area.polygon.bounds for area in areas]
    rows = []
    for index, region in enumerate(regions):
        part = _patches_of(region, share, settings.patch)
        labelled = any(
            x0 < region.right and x1 > region.x and y0 < region.bottom and y1 > region.y
            for x0, y0, x1, y1 in bounds
        )
        if labelled or part is None or part.any():
            place = [region.y, region.x, region.height, region.width]
            tissue = None if part is None else part.tolist()
            rows.append({"index": index, "region": place, "tissue": tissue})
    facts = {
        "height": height,
        "width": width,
        "mpp": slide.mpp or settings.mpp,
        "magnification": slide.magnification,
        "format": slide.format,
        "annotated": bool(header["annotation"]),
        "areas": len(areas),
        "regions": len(rows),
        "classes": settings.classes.names,
    }
    if facts["mpp"] is None:
        facts["note"] = "no mpp in the file (give --mpp); unknown to all that follows"
    return facts, rows


def _patches_of(
    region: Rectangle, share: npt.NDArray[np.float64] | None, patch: int
) -> npt.NDArray[np.float64] | None:
    """Give a region's part of the slide's tissue shares by patch."""
    if share is None:
        return None
    rows = slice(region.y // patch, -(-region.bottom // patch))
    return share[rows, region.x // patch : -(-region.right // patch)]


@functools.lru_cache(maxsize=4)
def _areas(
    uri: str, digest: str, height: int, width: int, settings: DatasetSettings
) -> list[Area]:
    """Keep the annotations at hand; the digest tells a replaced file apart."""
    return read_annotation(uri, height=height, width=width, classes=settings.classes)


def _create_slide(header: Row, settings: DatasetSettings, out: str) -> bool:
    """Make the empty OME-Zarr; it is kept if it is there for this very slide.

    Returns:
        Whether some of it is new: what was stored of this slide before is gone.
    """
    uri = slide_uri(out, header["slide"])
    attributes = {
        "kind": "slide",
        "slide": header["slide"],
        "digest": header["digest"],
        "format": header["format"],
    }
    size = (header["height"], header["width"])
    new = omezarr.create_image(
        uri, *size, mpp=header["mpp"], name=header["slide"], attributes=attributes
    )
    if header["annotated"]:
        omezarr.list_labels(uri, [LABELS])
        new |= omezarr.create_labels(
            labels_uri(out, header["slide"]),
            *size,
            mpp=header["mpp"],
            name=LABELS,
            classes=settings.classes,
            attributes=attributes,
            source="../../",
        )
    return new


# --- cut ------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _opened(uri: str, digest: str) -> Slide:
    """Keep the slides at hand open; the digest tells a replaced file apart."""
    return open_slide(uri)


def _cut(batch: Row, *, settings: DatasetSettings, out: str) -> Row:
    """Read, label and write one region; an unreadable one becomes a row with why."""
    row = json.loads(batch["json"][0])
    if row["index"] == HEADER:
        return _packed(row)
    start = time.time()
    region = Rectangle(*row["region"])
    place = {"y": region.y, "x": region.x}
    place |= {"height": region.height, "width": region.width}
    try:
        pixels = _opened(row["uri"], row["digest"]).read(**place)
        labels = np.zeros(pixels.shape[:2], np.uint8)
        if row["annotated"]:
            size = (row["height"], row["width"])
            areas = _areas(row["annotation"], row["digest"], *size, settings)
            labels = rasterise(areas, settings.classes, **place)
        tissue = row["tissue"]
        if tissue is None:
            size = (region.height, region.width)
            tissue = tissue_share(ArraySlide(pixels), *size, settings.patch).tolist()
        uri = slide_uri(out, row["slide"])
        omezarr.write_region(uri, region, np.moveaxis(pixels, 2, 0))
        if row["annotated"]:
            omezarr.write_region(labels_uri(out, row["slide"]), region, labels)
        if row["regions"] == 1:
            _build_pyramids(out, row["slide"])
    except (MedrayError, OSError, MemoryError) as error:
        return _packed(row | {"error": f"{error}"})
    patches = list(_count_patches(region, labels, tissue, settings))
    times = {"cut_at": start, "cut_s": time.time() - start}
    row["record"] = {"patches": patches} | times
    return _packed(row)


def _count_patches(
    region: Rectangle,
    labels: npt.NDArray[np.uint8],
    tissue: list[list[float]],
    settings: DatasetSettings,
) -> Iterator[Row]:
    """Describe each patch of a region; pixels of level 0."""
    side, count = settings.patch, len(settings.classes)
    for part in plan_regions(region.height, region.width, side):
        share = tissue[part.y // side][part.x // side]
        pixels = np.bincount(labels[part.slices()].ravel(), minlength=count)
        yield {
            "y": region.y + part.y,
            "x": region.x + part.x,
            "height": part.height,
            "width": part.width,
            "tissue": round(float(share), 4),
            "class_px": pixels.tolist(),
        }


class _PyramidBuilder:
    """Builds the pyramids of slides of several regions."""

    def __init__(self, out: str) -> None:
        """Take the dataset's folder."""
        self._out = out

    def work(self, headers: list[Row]) -> Iterator[list[Row]]:
        """Build the pyramids of some slides."""
        for header in headers:
            try:
                _build_pyramids(self._out, header["slide"])
                yield [{}]
            except Exception as error:  # whatever it is, it is this slide's alone
                yield [{"error": f"{error}"}]


def _build_pyramids(out: str, slide: str) -> None:
    """Fill the coarser levels, once all regions are written."""
    omezarr.build_pyramid(slide_uri(out, slide))
    if omezarr.read_attributes(labels_uri(out, slide)):
        omezarr.build_pyramid(labels_uri(out, slide))


# --- commit ---------------------------------------------------------------------------

_FACTS = (
    "height",
    "width",
    "mpp",
    "magnification",
    "format",
    "annotated",
    "areas",
    "regions",
    "note",
)


def _slide_row(header: Row, regions: list[Row]) -> Row:
    """Sum up a finished slide for slides.parquet."""
    row: Row = {key: header.get(key) for key in _FACTS}
    patches = [patch for region in regions for patch in region["patches"]]
    counts = np.zeros(len(header["classes"]), np.int64)
    for patch in patches:
        counts += np.asarray(patch["class_px"])
    counts[0] += header["height"] * header["width"] - counts.sum()
    if header["annotated"]:
        names = zip(header["classes"], counts.tolist(), strict=True)
        row |= {f"px_{name}": count for name, count in names}
    row["patches"] = len(patches)
    row["cut_s"] = sum(region["cut_s"] for region in regions)
    row["first_cut_at"] = min((r["cut_at"] for r in regions), default=None)
    ends = (region["cut_at"] + region["cut_s"] for region in regions)
    row["last_cut_at"] = max(ends, default=None)
    return row


# --- split ----------------------------------------------------------------------------


def _read_splits(uri: str) -> dict[str, str]:
    splits = read_groups(uri, "split")
    wrong = sorted(set(splits.values()).difference(SPLITS))
    if wrong:
        raise ConfigError(f"{uri}: expected the splits {SPLITS}, found {wrong}")
    return splits


def _assign_splits(
    ledger: Ledger,
    group_of: dict[str, str],
    split_of: dict[str, str] | None,
    fractions: tuple[float, float, float],
    seed: int,
) -> None:
    """Give every finished, annotated slide a split; those that have one keep it."""
    rows = [row for row in ledger.slides.values() if row["status"] == "done"]
    for row in rows:
        row["group"] = group_of.get(row["slide"], row.get("group") or row["slide"])
        present = (key for key in sorted(row) if key.startswith("px_") and row[key])
        row["stratum"] = "+".join(key.removeprefix("px_") for key in present)
    usable = [row for row in rows if row["annotated"]]
    if split_of is None:
        keep = {row["group"]: row["split"] for row in usable if row.get("split")}
        split_of = split_slides(usable, fractions=fractions, seed=seed, keep=keep)
    for row in rows:
        row["split"] = split_of.get(row["slide"], "") if row["annotated"] else ""
        ledger.commit_slide(row)


def _write_patches(out: str, ledger: Ledger) -> None:
    """Write a row a patch of all finished slides, new ones and those of before."""
    uri = files.join(out, "patches.parquet")
    before: dict[str, list[Row]] = {}
    if files.exists(uri):
        for patch in files.read_table(uri).to_pylist():
            before.setdefault(patch["slide"], []).append(patch)
    patches: list[Row] = []
    for slide, row in sorted(ledger.slides.items()):
        if row["status"] != "done":
            continue
        regions = ledger.regions.get(slide_key(slide, row["digest"]))
        found = before.get(slide, [])
        if regions is not None:
            found = [p for i in sorted(regions) for p in regions[i]["patches"]]
        common = {"slide": slide, "split": row["split"], "mpp": row["mpp"]}
        patches += [common | patch | {"split": row["split"]} for patch in found]
    write_patches(out, patches)
